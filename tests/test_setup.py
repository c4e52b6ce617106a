"""Set-up: what an import costs, that the pins hold together, and what `make` says on a machine that lacks something."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from imagen_fast import __version__

ROOT = Path(__file__).parents[1]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def pins(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- Import


def test_importing_everything_costs_little_beside_torch():
    code = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import imagen_fast, imagen_fast.ops, imagen_fast.nn, imagen_fast.testing, imagen_fast.backends
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "transformers", "diffusers", "matplotlib", "torchvision"}, new
assert "torch.utils.cpp_extension" not in sys.modules, "nothing is compiled on import"
print(seconds)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


def test_importing_needs_no_compiler_and_writes_nothing(tmp_path):
    environment = {"PATH": "", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import imagen_fast, imagen_fast.ops"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    assert not list(tmp_path.iterdir())


def test_what_make_test_gpu_links_together_is_the_package(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import gpu
    finally:
        sys.path.remove(str(ROOT / "tools"))
    gpu.put_together(tmp_path)
    code = "import imagen_fast, imagen_fast.bench as bench; print(imagen_fast.__file__, bench.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    folder = tmp_path / "imagen_fast"
    assert done.stdout.split() == [str(folder / "__init__.py"), str(folder / "bench" / "__init__.py")]


# ---- Pins


def test_every_pin_is_exact():
    for requirement in pins("requirements.txt") + pins("requirements-torch.txt"):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], str(requirement)


def test_nothing_but_the_first_step_installs_torch():
    assert [canonical(pin.name) for pin in pins("requirements-torch.txt")] == ["torch"]
    assert not {"torch", "torchvision", "torchaudio"} & {canonical(pin.name) for pin in pins("requirements.txt")}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_python_gets_one_pin_of_a_package(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    applying = [pin for pin in pins("requirements.txt") if not pin.marker or pin.marker.evaluate(environment)]
    names = [canonical(pin.name) for pin in applying]
    assert len(names) == len(set(names))
    assert {"numpy", "pillow", "pytest", "ninja", "setuptools"} <= set(names)


def test_what_the_package_declares_is_pinned():
    try:
        declared = [Requirement(line) for line in metadata.requires("imagen-fast") or ()]
    except metadata.PackageNotFoundError:
        pytest.skip("imagen_fast is not installed")
    pinned = {canonical(pin.name): pin for pin in pins("requirements.txt") + pins("requirements-torch.txt")}
    optional_later = {"triton", "diffusers"}  # no command of the Makefile needs them
    for requirement in declared:
        if canonical(requirement.name) in optional_later:
            continue
        pin = pinned.get(canonical(requirement.name))
        assert pin is not None, f"{requirement} is not in requirements.txt"
        (version,) = (specifier.version for specifier in pin.specifier)
        assert requirement.specifier.contains(version), f"{pin} does not satisfy {requirement}"


def test_the_version_is_written_once_and_the_same():
    try:
        assert metadata.version("imagen-fast") == __version__
    except metadata.PackageNotFoundError:
        pytest.skip("imagen_fast is not installed")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---- make


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile and the files that its stamps depend on, and no `.venv`."""
    requirements = [path.name for path in ROOT.glob("requirements*.txt")]
    for name in ("Makefile", *requirements, "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=checkout, capture_output=True, text=True, env=environment)


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench"])
@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param(None, "needs Python 3.10 or newer and finds no", id="no-python"),
        pytest.param('[ "$1" = --version ] && echo Python 3.9.18 || exit 1', "is Python 3.9.18", id="old-python"),
        pytest.param('case "$2" in *venv*) exit 1;; esac', "its venv module is missing", id="no-venv"),
    ],
)
def test_make_says_what_the_machine_lacks(checkout, target, script, message):
    python = checkout / "python"
    if script is not None:
        program(python, script)
    done = make(checkout, target, f"PYTHON={python}")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (checkout / ".venv" / ".created").exists()


def fake_venv(checkout: Path, compiles: bool = True) -> Path:
    """A `.venv` whose programs write down how they were called; its stamps say that torch and the pins are there."""
    log = checkout / "log"
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    library = "imagen_fast/lib/libimagen_fast_cpu.so"
    build = f'case "$*" in *build_ext*) mkdir -p imagen_fast/lib && touch {library};; esac' if compiles else ""
    for name in ("python", "imagen-fast"):
        program(programs / name, f'echo {name} "$@" >> "{log}"\n{build}')
    for stamp in (".created", ".torch", ".requirements", ".hosts"):
        (checkout / ".venv" / stamp).touch()
    return log


BUILD, INSTALL = "setup.py -q build_ext --inplace", "install -q -e . --no-build-isolation --no-deps"


@needs_make
def test_make_builds_once_and_again_when_a_source_changes(checkout):
    source = checkout / "csrc" / "kernel.cpp"
    source.parent.mkdir()
    source.write_text("")
    log = fake_venv(checkout)
    for _ in range(2):
        assert make(checkout, "test").returncode == 0
        assert (log.read_text().count(BUILD), log.read_text().count(INSTALL)) == (1, 1)
    os.utime(source, (2**31, 2**31))
    assert make(checkout, "test").returncode == 0
    assert (log.read_text().count(BUILD), log.read_text().count(INSTALL)) == (2, 1)
    assert log.read_text().count("-m pytest") == 3


@needs_make
def test_make_goes_on_without_a_compiler_and_looks_for_one_again(checkout):
    log = fake_venv(checkout, compiles=False)
    for calls in (1, 2):
        assert make(checkout, "test").returncode == 0
        assert (log.read_text().count(BUILD), log.read_text().count(INSTALL)) == (calls, 1)
    assert log.read_text().count("-m pytest") == 2


@needs_make
def test_make_clean_keeps_the_environment_and_the_results(checkout):
    fake_venv(checkout)
    (checkout / "out").mkdir()
    (checkout / "out" / "demo.png").touch()
    assert make(checkout, "test").returncode == 0
    (checkout / "build").mkdir()
    assert make(checkout, "clean").returncode == 0
    assert not (checkout / "build").exists()
    assert not (checkout / "imagen_fast" / "lib").exists()
    assert (checkout / ".venv" / ".requirements").exists()
    assert (checkout / "out" / "demo.png").exists()


def test_ci_runs_the_linters_and_the_tests_and_fails_if_either_does(tmp_path):
    """With a `make` that fails for lint: both run, the status is a failure, and pytest's line is the last one."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
    tools = tmp_path / "tools"
    tools.mkdir()
    log = tmp_path / "log"

    def run(script: str) -> subprocess.CompletedProcess[str]:
        program(tools / "make", f'echo "$@" >> {log}\n{script}')
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True)

    passing = run("echo 3 passed, 1 skipped in 0.12s")
    assert passing.returncode == 0
    assert passing.stdout.splitlines()[-1] == "3 passed, 1 skipped in 0.12s"
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["lint", "test"]
    lint_fails = run('case "$*" in *lint) exit 2;; esac; echo 3 passed in 0.12s')
    assert lint_fails.returncode == 2
    assert lint_fails.stdout.splitlines()[-1] == "3 passed in 0.12s"
    tests_fail = run('case "$*" in *test) echo "1 failed, 2 passed in 0.12s"; echo make: error; exit 2;; esac')
    assert tests_fail.returncode == 2
    assert tests_fail.stdout.splitlines()[-1] == "1 failed, 2 passed in 0.12s"
