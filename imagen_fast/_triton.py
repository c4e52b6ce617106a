"""What the Triton backend of every op shares: loading, registration, facts about the device, launch configurations.

Kernels live in `kernels/triton/<op>.py`, installed as `imagen_fast.kernels.<op>`; importing that module imports Triton,
so it is done when the backend is first needed, not before. An op's front then makes operators of its launchers:

    @_triton.once
    def _operators() -> None:
        kernels = _triton.kernels("my_op")
        _triton.define("my_op_triton", kernels.forward, fake=_fake_forward)
        torch.library.register_autograd("imagen_fast::my_op_triton", ...)

    def _run_triton(call):
        _operators()
        return run_operator(torch.ops.imagen_fast.my_op_triton.default, *call)

A launcher is plain Python: it allocates, plans, and launches `wrap_triton(kernel)[grid](...)` with every argument by
name. It runs on real tensors, on fake ones while `torch.compile` traces (so `torch.compile` sees the kernels, and
Inductor compiles them), in Triton's interpreter (`TRITON_INTERPRET=1`, tensors of the CPU, for tests), and, to learn
what it would launch on a device that is not there, under `record`.

How a kernel is launched (warps, tile sizes) is data: `kernels/triton/<op>.json`, see `Configurations`. Nothing is
autotuned at run time: `imagen-fast tune` writes the tables.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch._library.triton import triton_ops_to_kernels

from ._tracing import traced_as_constant

# Triton decides when a kernel is defined, and then for good; so does this.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def once(function: Callable[[], None]) -> Callable[[], None]:
    """Run `function` at the first call only, and for real while `torch.compile` traces."""
    lock = threading.Lock()
    done = False

    # (functools.cache would not do: Dynamo looks through it.)
    @traced_as_constant
    def run() -> None:
        nonlocal done
        if not done:
            with lock:
                if not done:
                    function()
                    done = True

    return run


def kernels(op: str) -> ModuleType:
    """The module of an op's Triton kernels; imports Triton."""
    return importlib.import_module(f"{__package__}.kernels.{op}")


def define(name: str, launcher: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Make the operator `imagen_fast::<name>` of a launcher, whose annotations give its schema.

    `torch.compile` sees through it to the kernels, except in the interpreter, whose kernels are plain Python.

    Args:
        launcher: called with the operator's arguments; the first is a tensor. Results are new tensors.
        fake: what the results look like, for tensors without data.
    """
    run = _on_its_device(launcher)
    registered: Callable[..., Any] = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    registered(f"imagen_fast::{name}", run, mutates_args=()).register_fake(fake)
    if not INTERPRETED:
        triton_ops_to_kernels[f"imagen_fast::{name}"] = _kernels_of(sys.modules[launcher.__module__])


def _kernels_of(module: ModuleType) -> list[object]:
    """The kernels of a module of kernels and of those that it imports from.

    Their sources are part of the key of compiled graphs that PyTorch keeps on disk; by itself it finds those alone that
    a launcher names.
    """
    from triton.runtime import JITFunction

    modules = [module]
    for each in modules:  # which grows
        for value in vars(each).values():
            name = value.__name__ if inspect.ismodule(value) else str(getattr(value, "__module__", ""))
            if name.startswith(f"{__package__}.kernels.") and sys.modules[name] not in modules:
                modules.append(sys.modules[name])
    found = [value for each in modules for value in vars(each).values() if isinstance(value, JITFunction)]
    return list(dict.fromkeys(found))


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; make that the device of the first argument."""

    @functools.wraps(launcher)
    def run(x: torch.Tensor, *arguments: Any) -> Any:
        if x.device.type != "cuda" or not torch.cuda.is_available() or x.device.index == torch.cuda.current_device():
            return launcher(x, *arguments)
        with torch.cuda.device(x.device):
            return launcher(x, *arguments)

    run.__signature__ = inspect.signature(launcher, eval_str=True)  # type: ignore[attr-defined]
    return run


class Device(NamedTuple):
    """What a launcher may ask about a device.

    Attributes:
        architecture: the compute capability, such as "9.0", or AMD's name, such as "gfx942".
        multiprocessors: how many multiprocessors (AMD: compute units).
        warp_size: threads in a warp: 32, or 64 on AMD.
        shared_memory: the bytes of shared memory that one block may have.
    """

    architecture: str
    multiprocessors: int
    warp_size: int
    shared_memory: int


# One device of each architecture that kernels are compiled for without having it: A100, H200, B200, RTX 5090, MI300X.
KNOWN_DEVICES = {
    device.architecture: device
    for device in (
        Device("8.0", 108, 32, 163 * 1024),
        Device("9.0", 132, 32, 227 * 1024),
        Device("10.0", 148, 32, 227 * 1024),
        Device("12.0", 170, 32, 99 * 1024),
        Device("gfx942", 304, 64, 64 * 1024),
    )
}
_WITHOUT_A_DEVICE = KNOWN_DEVICES["9.0"]


class Launch(NamedTuple):
    """A launch that did not happen: see `record`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Recording(NamedTuple):
    device: Device
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def record(device: Device) -> Iterator[list[Launch]]:
    """Launchers in this block plan for `device`, and their launches are put into the list instead of being done.

    Example:
        >>> with record(KNOWN_DEVICES["gfx942"]) as launches:
        ...     kernels("group_norm_act").forward(torch.empty(1, 64, 8, 8, device="meta"), ...)
        >>> [launch.kernel.__name__ for launch in launches]
    """
    recording = _Recording(device, [])
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append(Launch(self.kernel, grid, arguments))


def wrap_triton(kernel: Any) -> Any:
    """`kernel` so that `wrap_triton(kernel)[grid](...)` launches it, or does what stands for that where it is."""
    recording = _recording.get()
    if recording is not None:
        return _Recorder(kernel, recording.launches)
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def device_of(x: torch.Tensor) -> Device:
    """Facts about the device of x; about an H200 where there is none, as in the interpreter."""
    recording = _recording.get()
    if recording is not None:
        return recording.device
    if x.device.type != "cuda" or not torch.cuda.is_available():
        return _WITHOUT_A_DEVICE
    return _facts(torch.cuda.current_device() if x.device.index is None else x.device.index)


@functools.cache
def _facts(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"{properties.major}.{properties.minor}"
    return Device(
        architecture,
        properties.multi_processor_count,
        properties.warp_size,
        getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        ),  # (ROCm has one limit)
    )


class Configurations:
    """How an op's kernels are launched, from the table `kernels/triton/<op>.json`.

    The table has rows for each kind of launch and each architecture, by the longest beginning of the architecture's
    name that it holds ("gfx942", "gfx9"; "9.0", "9."), else "default". The row that serves is the first whose "up_to"
    is at least the size in question; a row without "up_to" serves any size.

        {"forward": {"default": [{"up_to": 4096, "num_warps": 4}, {"up_to": 32768, "num_warps": 16}]}}

    Example:
        >>> Configurations("my_op").find("forward", device_of(x), size=6000)
        {'up_to': 32768, 'num_warps': 16}
    """

    def __init__(self, op: str) -> None:
        file = self.folder() / f"{op}.json"
        self.table: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(file.read_text())

    @staticmethod
    def folder() -> Path:
        """Where the tables are."""
        return Path(importlib.import_module(f"{__package__}.kernels").__file__ or "").parent

    def find(self, kind: str, device: Device, size: int = 0) -> dict[str, Any] | None:
        """The row for a launch of this kind and size, or None if the table has none so large."""
        return next((row for row in self.rows(kind, device) if "up_to" not in row or size <= row["up_to"]), None)

    def __getitem__(self, where: tuple[str, Device]) -> dict[str, Any]:
        """The one row of a kind that does not depend on the size."""
        row = self.find(*where)
        assert row is not None, f"no launch configuration {where[0]!r} for {where[1]}"
        return row

    def rows(self, kind: str, device: Device) -> list[dict[str, Any]]:
        """The rows of a kind that serve a device."""
        by_architecture = self.table[kind]
        beginnings = [name for name in by_architecture if device.architecture.startswith(name)]
        return by_architecture[max(beginnings, key=len, default="default")]


def power_of_two_at_least(n: int) -> int:
    """The smallest power of two that is not below n, by comparisons alone: n may be symbolic while tracing."""
    power = 1
    while power < n:
        power *= 2
    return power


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b
