"""Runs the tests of the CUDA kernels, in a process whose "cuda" backend is the host emulator.

All of them on the plain library; those marked `instrumented` also where data races are reported, and where accesses out
of bounds are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "tools"))
import build_emulator  # noqa: E402

TESTS = ROOT / "tests"
OPS = sorted({source.parent.name for source in ROOT.glob("csrc/*/cuda*.cu")} - {"common"})


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
def test_cuda_kernels(flavour: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    report = tmp_path / "report.xml"
    files = [str(TESTS / "cuda")]
    if flavour == "plain":
        files += [str(file) for op in OPS for file in sorted((TESTS / "ops").glob(f"test_{op}*.py"))]
    # Of what goes to the file descriptors, such as AddressSanitizer's reports, pytest keeps its hands.
    options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "--durations=5", f"--junit-xml={report}"]
    options += ["-m", "instrumented"] if flavour != "plain" else []
    variables = {"IMAGEN_FAST_CUDA_EMULATOR": str(build_emulator.build(flavour)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env=os.environ | variables | build_emulator.environment(flavour),
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
    record_property("closing line", f"CUDA emulator, {flavour}: {outcome}")
