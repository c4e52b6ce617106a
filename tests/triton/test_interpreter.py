"""Every Triton kernel is executed, by Triton's interpreter, on the tests of its op.

The interpreter is chosen when Triton is imported, so each op has a pytest process of its own. It runs the tests of
`tests/ops/test_<op>.py` that use the fixture `kernel`, and what is particular to the kernels:
`tests/triton/interpreted/test_<op>.py`. To run one such process by hand:

    TRITON_INTERPRET=1 pytest tests/ops/test_group_norm_act.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
OPS = sorted(file.stem for file in (TESTS.parent / "kernels" / "triton").glob("[!_]*.py"))


@pytest.mark.parametrize("op", OPS)
def test_kernels_in_the_interpreter(op: str, record_property: Callable[[str, object], None]) -> None:
    pytest.importorskip("triton")
    files = [TESTS / "ops" / f"test_{op}.py", TESTS / "triton" / "interpreted" / f"test_{op}.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore::RuntimeWarning"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "faster_interpreter",
        "--rootdir",
        str(TESTS.parent),
        *(str(f) for f in files if f.exists()),
    ]
    # The interpreter is NumPy on small arrays; several threads only get in each other's way.
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    closing = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""
    record_property("closing line", f"{op} in the interpreter: {closing}")
    passed = re.search(r"(\d+) passed", closing)
    if run.returncode or not passed:
        pytest.fail(f"in the interpreter: {closing}\n\n{run.stdout[-20000:]}\n{run.stderr[-5000:]}", pytrace=False)
