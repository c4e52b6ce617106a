"""Registers, shared memory and spills of every CUDA kernel, from the log of the build that is tested.

The tables in `resources/` say what they were; what takes noticeably more is a regression. After a change that is worth
it: `python setup.py build_ext --inplace && python tools/cuda_resources.py --write`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imagen_fast import _cuda

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "tools"))
import build_emulator  # noqa: E402
import cuda_resources  # noqa: E402
from kernel_resources import regressions, spills  # noqa: E402

WRITE = "python setup.py build_ext --inplace && python tools/cuda_resources.py --write"

pytestmark = pytest.mark.skipif(
    not _cuda.LIBRARY.exists() or not cuda_resources.LOGS.is_dir(), reason="the CUDA library is not built here"
)


def test_the_build_is_of_these_sources() -> None:
    ninja = build_emulator.setup_module().find_ninja()  # the one that built
    run = subprocess.run([ninja, "-C", str(cuda_resources.LOGS), "-n"], capture_output=True, text=True, check=True)
    assert "no work to do" in run.stdout, "build first: python setup.py build_ext --inplace"


def test_nothing_spills() -> None:
    spilled = spills(cuda_resources.built())
    assert not spilled, "registers spill to memory:\n" + "\n".join(spilled)


def test_no_kernel_takes_more_than_it_did() -> None:
    problems = [
        p for op, kernels in cuda_resources.built().items() for p in cuda_resources.TABLES.regressions(op, kernels)
    ]
    assert not problems, "\n".join([*problems, f"If all of this is meant: {WRITE}"])


LOG = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN11imagen_fast1kI6__halfEEvPKT_Pfi' for 'sm_90a'
ptxas info    : Function properties for _ZN11imagen_fast1kI6__halfEEvPKT_Pfi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 14.009 ms
ptxas info    : Compiling entry function '_ZN11imagen_fast1kI6__halfEEvPKT_Pfi' for 'sm_80'
ptxas info    : Function properties for _ZN11imagen_fast1kI6__halfEEvPKT_Pfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 1 barriers, 372 bytes cmem[0]
"""


def test_the_log_is_read() -> None:
    ((name, resources),) = cuda_resources.parse(LOG).items()
    assert name in ("k<__half>", "_ZN11imagen_fast1kI6__halfEEvPKT_Pfi")
    assert resources == {
        "90a": {"registers": 24, "shared": 1024, "local": 16, "spilled": 20},
        "80": {"registers": 22, "shared": 0, "local": 0, "spilled": 0},
    }


def test_a_regression_is_seen() -> None:
    before = {"registers": 40, "shared": 128, "local": 0, "spilled": 0}
    assert regressions("k", before, {**before, "registers": 44}) == []
    assert regressions("k", before, {**before, "registers": 45}) == ["k: 45 of registers, was 40"]
    assert regressions("k", before, {**before, "local": 8, "spilled": 4}) == [
        "k: 8 of local, was 0",
        "k: 4 of spilled, was 0",
    ]
