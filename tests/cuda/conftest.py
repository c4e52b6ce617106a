"""CUDA kernels without a GPU, on the host emulator.

`test_<op>.py` hold what is particular to an op's CUDA kernels: every path of its plan, devices of other sizes, orders
of execution. They run in a process of their own, which `test_on_the_emulator.py` starts, together with the op's tests
in `tests/ops`. By hand:

    export IMAGEN_FAST_CUDA_EMULATOR=$(python tools/build_emulator.py)
    python -m pytest tests/cuda tests/ops/test_group_norm_act.py

The other files test the emulator, the process and the build, and run with all other tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import imagen_fast
from imagen_fast import _cuda

HERE = Path(__file__).parent
FOR_EVERY_PROCESS = {"test_emulator.py", "test_on_the_emulator.py", "test_build.py", "test_resources.py"}

collect_ignore = [file.name for file in HERE.glob("test_*.py") if (file.name in FOR_EVERY_PROCESS) == _cuda.emulated()]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "instrumented: also runs with data races and accesses out of bounds reported")


if _cuda.emulated():

    @pytest.fixture(autouse=True)
    def _on_cuda() -> Iterator[None]:
        with imagen_fast.use_backend("cuda"):
            yield


@pytest.fixture
def emulator() -> Iterator[Callable[..., None]]:
    """Sets options of the emulator for one test: `emulator(order="reverse", capability=80, multiprocessors=16)`.

    A capability comes first: it sets the other properties of the device too.
    """

    def set_options(**options: object) -> None:
        for name, value in options.items():
            _cuda.set_emulator_option(name, value)

    reason = _cuda.unavailable_reason()  # loads the library
    assert reason is None, reason
    yield set_options
    set_options(order="forward", seed=0, capability=90)
