"""Fixtures that run a test on every kernel that this machine has; how tests are shared among workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Its key does not see an operator's schema or autograd formula: a graph compiled before one of them changed would be
# taken for the one to test.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# Several workers share the processors, each with the processes that its tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import imagen_fast
from imagen_fast import _native, backends

CPU_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")  # each machine has a prefix of this list


# GPU kernels that run on tensors of the CPU in this process. The tests of `tests/triton` and `tests/cuda` start such a
# process, and it is for those kernels alone.
EMULATED = [name for name, emulated in backends._EMULATED.items() if emulated]


def _kernels() -> list[str]:
    """Every backend but eager; the C++ one once for each instruction set."""
    if EMULATED:
        return EMULATED
    if _native.unavailable_reason() is not None:
        return ["cpu"]
    best = CPU_CAPABILITIES.index(_native.cpu_capability())
    return [f"cpu-{capability}" for capability in CPU_CAPABILITIES[: best + 1]]


@pytest.fixture(params=_kernels())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one kernel: a backend, and for the C++ kernels an instruction set."""
    backend, _, capability = request.param.partition("-")
    if backend in EMULATED:
        if torch.float64 in request.node.callspec.params.values():
            pytest.skip("kernels for the GPU take no float64")
        slow = request.node.get_closest_marker("not_interpreted")
        if slow and backend == "triton":
            pytest.skip(slow.args[0])
        with imagen_fast.use_backend(backend):
            yield request.param
        return
    if backend == "cpu" and _native.unavailable_reason() is not None:
        pytest.skip(_native.unavailable_reason() or "")
    best = _native.cpu_capability()
    with imagen_fast.use_backend(backend):
        _native.set_cpu_capability(capability)
        try:
            yield request.param
        finally:
            _native.set_cpu_capability(best)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one backend, eager among them; the C++ kernels with the best instruction set alone."""
    if request.param == "cpu" and _native.unavailable_reason() is not None:
        pytest.skip(_native.unavailable_reason() or "")
    with imagen_fast.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that PyTorch or a C++ kernel allocates is full of NaN, so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, its default
    native = _native.unavailable_reason() is None
    if native:
        _native.poison_outputs(True)
    try:
        assert torch.empty(3).isnan().all()
        assert not native or _native.unwritten_output(1000).isnan().all()
        yield
    finally:
        if native:
            _native.poison_outputs(False)
        torch.use_deterministic_algorithms(before)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "not_interpreted(reason): too slow for Triton's interpreter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process that emulates a GPU, of the tests of ops those that run every kernel."""
    if EMULATED:
        folder = Path(__file__).parent / "ops"
        out = [item for item in items if folder in item.path.parents and "kernel" not in item.fixturenames]
        if EMULATED == ["triton"]:
            out += [item for item in items if item not in out and _is_like_another(item, items)]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: FIRST.index(file) if (file := _file(item.nodeid)) in FIRST else len(FIRST))


def _is_like_another(item: pytest.Item, items: list[pytest.Item]) -> bool:
    """Whether it is a test in float16 that is there in bfloat16. To the interpreter, which takes long, both are 16 bits
    that are widened and rounded; they differ in their range, and in what is told of dtypes."""
    parameters = getattr(item, "callspec", None)
    if parameters is None or torch.float16 not in parameters.params.values():
        return False
    name = getattr(item, "originalname", item.name)
    if any(word in name for word in ("dtypes", "large", "range", "infinit", "finite", "overflow")):
        return False
    return any(
        getattr(other, "originalname", other.name) == name and torch.bfloat16 in other.callspec.params.values()
        for other in items
        if other.path == item.path and hasattr(other, "callspec")
    )


# `make test` has two workers. Each takes a file at a time, so that it makes the file's fixtures once, but a test at a
# time of files whose tests start processes that take long. What takes longest comes first, so that no worker waits long
# for the other one at the end.
PROCESSES = ("tests/cuda/test_on_the_emulator.py", "tests/triton/test_interpreter.py")
FIRST = (*PROCESSES, "tests/triton/test_offline.py", "tests/test_build.py")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if _file(nodeid) in PROCESSES else _file(nodeid)

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a test has to say at the end of the run: `record_property("closing line", ...)`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "closing line" and report.when == "call":
                terminalreporter.write_line(value)
