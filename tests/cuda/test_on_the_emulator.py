"""Runs the tests of the CUDA kernels, in a process whose "cuda" backend is the host emulator.

All of them on the plain library; those marked `instrumented` also where data races are reported, and where accesses out
of bounds are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
OPS = sorted({source.parent.name for source in ROOT.glob("csrc/*/cuda*.cu")} - {"common"})


def library(flavour: str) -> str:
    command = [sys.executable, ROOT / "tools" / "build_emulator.py", "--flavour", flavour]
    build = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return build.stdout.split()[-1]


def environment(flavour: str) -> dict[str, str]:
    chosen = {"IMAGEN_FAST_CUDA_EMULATOR": library(flavour), "OMP_NUM_THREADS": "1"}
    if flavour == "address":
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-print-file-name=libasan.so"]
        chosen["LD_PRELOAD"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        chosen["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    return os.environ | chosen


def failures(report: Path) -> str:
    """The failed tests of a report, each with what it said."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            found.append(f"---- {case.get('classname')}::{case.get('name')}\n{(problem.text or '')[-3000:]}")
    return "\n".join(found)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(not OPS, reason="no op has CUDA kernels")
@pytest.mark.parametrize("flavour", ["plain", "races", "address"])
def test_cuda_kernels(flavour: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    files = [str(TESTS / "cuda")]
    if flavour == "plain":
        files += [str(file) for op in OPS for file in sorted((TESTS / "ops").glob(f"test_{op}*.py"))]
    options = ["-q", "-p", "no:cacheprovider", "--durations=5", f"--junit-xml={report}"]
    options += ["-m", "instrumented"] if flavour != "plain" else []
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env=environment(flavour),
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    if run.returncode == 1 and report.exists():
        pytest.fail(f"CUDA kernels on the emulator ({flavour}):\n{failures(report)}", pytrace=False)
    if run.returncode == 5 and flavour != "plain":
        pytest.skip("no test is marked `instrumented`")
    output = f"{run.stdout[-6000:]}\n{run.stderr[-6000:]}"
    assert run.returncode == 0, f"the process for the CUDA kernels ended with {run.returncode}:\n{output}"
    outcome = run.stdout.strip().splitlines()[-1]
    sys.modules[f"{__name__.rpartition('.')[0]}.conftest"].summary.append(f"CUDA emulator, {flavour}: {outcome}")
