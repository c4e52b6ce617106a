"""The native library and the wheel: what they hold, what they must not hold, and what happens without a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from imagen_fast import _cuda, _native

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT / "tools"))
import build_emulator  # noqa: E402

OBJECTS = ROOT / "build" / "native" / "libimagen_fast_cpu"

needs_library = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the native library is not built")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm and readelf")


def output_of(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """(type, demangled name) of each symbol, as `nm` has them."""
    lines = output_of("nm", "--demangle", "--format=posix", *options, file).splitlines()
    found = (re.fullmatch(r"(.+?) ([A-Za-z])( [0-9a-f]+)*\s*", line) for line in lines)
    return [(match[2], match[1]) for match in found if match]


# ---- The library


@needs_library
@needs_nm
def test_library_serves_every_python():
    python = [name for _, name in symbols(_native.LIBRARY, "--dynamic") if re.match(r"_?Py[A-Z_]", name)]
    assert not python, f"CPython symbols tie the library to one Python: {python[:5]}"


@needs_library
@needs_nm
def test_library_needs_only_torch_cpu_and_the_c_and_cpp_runtimes():
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", output_of("readelf", "--dynamic", "--wide", _native.LIBRARY)))
    allowed = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= allowed


@needs_library
@needs_nm
def test_library_uses_the_stable_abi_of_torch_alone():
    """Symbols in C++ namespaces of torch change between versions; the stable ones are C functions."""
    unstable = [
        name
        for kind, name in symbols(_native.LIBRARY, "--dynamic")
        if kind == "U" and re.match(r"(c10|at|torch)::|vtable for (c10|at|torch)", name)
    ]
    assert not unstable, f"not part of the stable ABI: {unstable[:5]}"


@pytest.mark.skipif(not OBJECTS.is_dir(), reason="built elsewhere")
@needs_nm
def test_instruction_sets_share_no_code():
    """Of weak symbols with one name the linker keeps any one: an AVX-512 copy must never serve an older machine."""
    kernels = sorted(OBJECTS.glob("*.cpu_kernel*.o"))
    assert kernels, "no kernel objects where the build puts them"
    for file in kernels:
        namespace = f"imagen_fast::isa_{file.name.split('.')[-2]}::"
        weak = [name for kind, name in symbols(file, "--defined-only") if kind in "WVu"]
        # (DW.ref.…: the address of a function of the C++ runtime, no code.)
        shared = [name for name in weak if namespace not in name and not name.startswith("DW.ref.")]
        assert not shared, f"{file.name} defines weak symbols outside {namespace}: {shared[:5]}"


@needs_library
def test_environment_chooses_the_instruction_set():
    code = "from imagen_fast import _native; print(_native.cpu_capability())"
    environment = {**os.environ, "IMAGEN_FAST_CPU_CAPABILITY": "default"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["default"]


@needs_library
def test_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match=r"'avx3' is not one that this machine and build have: default"):
        _native.set_cpu_capability("avx3")


@needs_library
def test_unknown_instruction_set_in_the_environment_is_explained():
    environment = {**os.environ, "IMAGEN_FAST_CPU_CAPABILITY": "avx3"}
    run = subprocess.run([sys.executable, "-m", "imagen_fast", "env"], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert re.search(r"IMAGEN_FAST_CPU_CAPABILITY: .*'avx3' .* have: default", run.stderr)


# ---- The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not by importing it: in a process that has looked for pip, setuptools cannot be imported any more.
    if "pip" not in {distribution.name for distribution in importlib.metadata.distributions()}:
        pytest.skip("needs pip")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        "pip",
        "wheel",
        ROOT,
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--wheel-dir",
        folder,
    ]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@needs_library
def test_wheel_is_for_every_python_on_this_platform(wheel: Path):
    assert re.fullmatch(r"imagen_fast-[0-9.a-z]+-py3-none-linux_\w+\.whl", wheel.name)


@needs_library
def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"imagen_fast"}
    assert {"imagen_fast/lib/libimagen_fast_cpu.so", "imagen_fast/py.typed", "imagen_fast/kernels/__init__.py"} <= set(
        names
    )
    assert ("imagen_fast/lib/libimagen_fast_cuda.so" in names) == _cuda.LIBRARY.exists()
    unwanted = [name for name in names if re.search(r"/(tests|results|csrc)/|\.(cpp|h|o|pyc|npy)$", name)]
    assert not unwanted
    # What the sources hold, the wheel holds: no module lost, none left over from an earlier build.
    sources = {f.relative_to(ROOT).as_posix() for f in (ROOT / "imagen_fast").rglob("*.py")}
    assert {n for n in names if n.endswith(".py") and not re.match(r"imagen_fast/(kernels|bench)/", n)} == sources


@needs_library
@pytest.mark.skipif(not OBJECTS.is_dir(), reason="needs a build in place")
def test_second_build_has_nothing_to_do(wheel: Path):
    assert "no work to do" in output_of(build_emulator.setup_module().find_ninja(), "-C", OBJECTS, "-n")


# ---- Without a working compiler


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the native build reads."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_compiler_the_build_says_so_and_succeeds(sources: Path):
    run = build(sources, CXX="", PATH=str(sources))
    assert run.returncode == 0, run.stderr
    assert "NO C++ COMPILER FOUND" in run.stderr
    assert not list(sources.rglob("*.so"))


def test_a_compiler_that_is_not_there_is_an_error(sources: Path):
    run = build(sources, CXX="no-such-compiler")
    assert run.returncode != 0
    assert "CXX names is not there: no-such-compiler" in run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_source_that_does_not_compile_is_an_error(sources: Path):
    for folder in (sources / "csrc").iterdir():  # the others would only take time
        if folder.name != "common":
            shutil.rmtree(folder)
    (sources / "csrc" / "common" / "parallel.cpp").write_text("this is not C++\n")
    run = build(sources)
    assert run.returncode != 0
    assert "libimagen_fast_cpu.so could not be built" in run.stderr
    assert "Traceback" not in run.stderr


# ---- The folder named `kernels`


def in_checkout(code: str, **environment: str) -> None:
    """Run `code` with the checkout first on the path, as for a user who works in it."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_kernels_is_no_package():
    """Hosts ask `find_spec("kernels")` for Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    in_checkout("from importlib.util import find_spec as f; s = f('kernels'); assert s is None or s.origin is None, s")
    in_checkout("import imagen_fast.kernels as k; assert 'triton' in k.__file__, k.__file__")


def test_hugging_face_kernels_wins_where_it_is_installed(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "from importlib.util import find_spec as f; s = f('kernels'); assert s and s.origin, s"
    in_checkout(code, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize(("host", "name"), [("transformers", "T5EncoderModel"), ("diffusers", "IFPipeline")])
def test_hosts_import_from_the_checkout(host: str, name: str):
    pytest.importorskip(host)
    in_checkout(f"import imagen_fast; from {host} import {name}")
