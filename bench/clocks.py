"""One batch on the clock: of the host for the CPU, of the device for a GPU.

A GPU runs behind the host, and what is wanted is its own time:

- Two events in the stream frame the calls of a batch. In front of them the device is kept busy by a spin kernel for as
  long as the host takes to queue the batch, so that no call waits for its launch: what is timed is what the device
  does, gaps between its kernels included, as in the replay of a CUDA graph.
- A case with the tag "overhead" asks what a call costs the host, and is timed from the first call to the end of the
  last one's work, with nothing in front.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..provenance import last_level_cache

_UNKNOWN_CACHE = 64 << 20  # bytes to sweep where the system does not tell
_SPIN_MARGIN = 2.0  # the host is held to half the speed at which it has queued the calls before
_LONGEST_SPIN = 0.1  # seconds; a batch that takes longer to queue is bound by the host, and is seen to be
_CALLS_IN_QUEUE = 64  # a device's queue holds about a thousand launches; a call makes a dozen


class Clock(Protocol):
    """How the calls of a batch are timed on a kind of device."""

    most_calls: int
    """In a batch"""

    def synchronize(self) -> None:
        """Wait until what was called is done."""

    def seconds(self, call: Callable[[Any], Any], states: Sequence[Any], queueing: float, whole: bool) -> float:
        """Seconds for a call with each of the states.

        `queueing` is how long the host takes to make all the calls; `whole` asks for the host's time as well.
        """

    def sweeper(self) -> Callable[[], object]:
        """A function that fills the caches with what nobody needs."""


class HostClock:
    """For the CPU, where a call returns when it is done."""

    most_calls = 1000

    def synchronize(self) -> None:
        pass

    def seconds(self, call: Callable[[Any], Any], states: Sequence[Any], queueing: float, whole: bool) -> float:
        start = time.perf_counter()
        for state in states:
            call(state)
        return time.perf_counter() - start

    def sweeper(self) -> Callable[[], object]:
        return _sweep("cpu")


class DeviceClock:
    """For a CUDA device; see the top of this file."""

    most_calls = _CALLS_IN_QUEUE

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cycles_per_second = self._measure_spin()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[Any], Any], states: Sequence[Any], queueing: float, whole: bool) -> float:
        if whole:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for state in states:
                call(state)
            torch.cuda.synchronize()
            return time.perf_counter() - start
        torch.cuda._sleep(int(min(_SPIN_MARGIN * queueing, _LONGEST_SPIN) * self._cycles_per_second))
        self._start.record()
        for state in states:
            call(state)
        self._end.record()
        torch.cuda.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3

    def sweeper(self) -> Callable[[], object]:
        return _sweep("cuda")

    def _measure_spin(self) -> float:
        """Cycles of the spin kernel in a second: the device's clock, which no interface of every version tells."""
        cycles = 10_000_000
        for _ in range(2):  # the first one wakes the device
            self._start.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            torch.cuda.synchronize()
        return cycles / (self._start.elapsed_time(self._end) * 1e-3)


def _sweep(device: str) -> Callable[[], object]:
    buffer = torch.zeros(2 * (last_level_cache(device) or _UNKNOWN_CACHE), dtype=torch.uint8, device=device)
    return lambda: buffer.add_(1)


def clock(device: str) -> Clock:
    """The clock for tensors on `device`, "cpu" or "cuda"."""
    return DeviceClock() if device == "cuda" else HostClock()
