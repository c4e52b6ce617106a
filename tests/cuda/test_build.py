"""The CUDA library: what it holds and needs, that it loads where there is no GPU, and how nvcc is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from imagen_fast import _cuda

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "tools"))
import build_emulator  # noqa: E402

needs_library = pytest.mark.skipif(not _cuda.LIBRARY.exists(), reason="the CUDA library is not built")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm and readelf")


def output_of(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


# ---- The library


@needs_library
@needs_nm
def test_it_needs_the_stable_abi_of_torch_and_no_cuda_library() -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", output_of("readelf", "--dynamic", "--wide", _cuda.LIBRARY)))
    runtimes = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2", "librt.so.1"}
    assert "libtorch.so" in needed, "it leads to libtorch_cuda.so, and so to the current stream"
    assert {name for name in needed if not name.startswith("ld-linux")} <= {
        "libtorch.so",
        "libtorch_cpu.so",
        "libpthread.so.0",
    } | runtimes
    undefined = [line.split()[-1] for line in output_of("nm", "-DC", "--undefined-only", _cuda.LIBRARY).splitlines()]
    assert not [name for name in undefined if re.match(r"(c10|at|torch)::|_?Py[A-Z_]|cuda|cu[A-Z]", name)]


@needs_library
@needs_nm
def test_it_shows_no_name_of_the_runtime_inside() -> None:
    """Another library's CUDA runtime in the same process must not meet this one's."""
    defined = output_of("nm", "-D", "--defined-only", _cuda.LIBRARY)
    assert not re.search(r" [TW] _*cuda", defined)


@needs_library
def test_it_loads_without_a_gpu_and_registers_every_op() -> None:
    ops = sorted({source.parent.name for source in ROOT.glob("csrc/*/cuda*.cu")} - {"common"})
    code = f"""
import torch, imagen_fast.ops
from imagen_fast import _cuda
torch.ops.load_library(str(_cuda.LIBRARY))
for op in {ops}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"imagen_fast::{{op}}_cuda", "CUDA"), op
print(_cuda.library())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"CUDA( \d+\.\d[af]?(\+PTX)?)+\n", run.stdout)


# ---- How it is built


@pytest.fixture
def setup() -> ModuleType:
    return build_emulator.setup_module()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit that only says what it is, and that nothing but CUDA_HOME leads to."""
    home = tmp_path / "cuda"
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in\n*--dryrun*) echo "#\\$ TOP={home}/bin/.." >&2;;\n'
        "*--list-gpu-arch*) echo compute_80; echo compute_90;;\nesac\n"
    )
    nvcc.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "IMAGEN_FAST_CUDA_ARCHS", "IMAGEN_FAST_NO_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def test_the_toolkit_of_cuda_home(setup: ModuleType, toolkit: Path) -> None:
    found = setup.find_toolkit()
    assert (found.nvcc, found.libraries) == (toolkit / "bin" / "nvcc", toolkit / "lib64")
    assert found.architectures == {"80", "90"}


def test_an_nvcc_on_the_path_may_be_a_script(
    setup: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = setup.find_toolkit()
    assert (found.nvcc, found.libraries) == (script, toolkit / "lib64")


def test_a_toolkit_without_its_runtime_is_passed_over(
    setup: ModuleType, toolkit: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    assert setup.find_toolkit() is None
    assert "has no libcudart_static.a" in capfd.readouterr().err


def test_what_the_compiler_does_not_know_is_left_out_and_said(
    setup: ModuleType, toolkit: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert setup.cuda_architectures(setup.find_toolkit()) == ["8.0", "9.0"]
    assert "does not know the architectures 10.0, 12.0+PTX" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [("9.0;12.0", "does not know the architectures 12.0"), ("sm_90", "'sm_90' is no architecture")],
)
def test_what_was_asked_for_must_be_built(
    setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, asked: str, message: str
) -> None:
    monkeypatch.setenv("IMAGEN_FAST_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=message):
        setup.cuda_architectures(setup.find_toolkit())


def test_architectures_as_nvcc_takes_them(setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEN_FAST_CUDA_ARCHS", "8.0, 9.0a+PTX")
    architectures = setup.cuda_architectures(setup.find_toolkit())
    assert [setup.gencode(each)[1] for each in architectures] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=[sm_90a,compute_90a]",
    ]
    assert [setup.gencode(each)[1] for each in ("10.0", "10.0a", "12.0+PTX")] == [
        "arch=compute_90,code=sm_100",
        "arch=compute_100a,code=sm_100a",
        "arch=compute_90,code=[sm_120,compute_90]",
    ]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_no_cuda_where_it_is_not_wanted_or_not_there(
    setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def names() -> list[str]:
        return [library.name for library in setup.libraries()]

    assert names() == ["libimagen_fast_cpu.so", "libimagen_fast_cuda.so"]
    monkeypatch.setenv("IMAGEN_FAST_NO_CUDA", "1")
    assert names() == ["libimagen_fast_cpu.so"]
    assert "IMAGEN_FAST_NO_CUDA is set" in capfd.readouterr().err
    monkeypatch.delenv("IMAGEN_FAST_NO_CUDA")
    monkeypatch.setenv("CUDA_HOME", str(toolkit / "nowhere"))
    assert names() == ["libimagen_fast_cpu.so"]
    assert "no nvcc found" in capfd.readouterr().err
