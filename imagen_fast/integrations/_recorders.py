"""What records a function's launches, to be repeated: CUDA graphs. The tests put another recorder in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """What was recorded: `replay` repeats it, and `result` then holds its results."""

    result: Any

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what a function does on devices of one type."""

    device_type: str

    def is_busy(self) -> bool:
        """Whether this thread records already."""

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        """Call the function, for what it does the first time only."""

    def record(self, function: Callable[[], Any], device: torch.device, beside: Any) -> Recording:
        """Record a call; its memory may be that of another recording, which never runs at the same time."""

    def in_order(self, device: torch.device) -> AbstractContextManager[None]:
        """What is queued inside begins after all that was queued inside before, on whichever stream."""

    def random_state(self, device: torch.device) -> Tensor:
        """Of the device's generator."""

    def set_random_state(self, state: Tensor, device: torch.device) -> None:
        """Of the device's generator."""


@dataclass
class _CudaRecording:
    graph: Any
    result: Any

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """CUDA graphs."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Event] = {}

    def is_busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        current, side = torch.cuda.current_stream(device), self._stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = function()
        current.wait_stream(side)
        return result

    def record(self, function: Callable[[], Any], device: torch.device, beside: Any) -> Recording:
        graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside.graph.pool()
        # Other threads may go on allocating and copying meanwhile.
        recording = torch.cuda.graph(graph, pool, self._stream(device), capture_error_mode="thread_local")
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            try:
                with recording:
                    result = function()
            finally:  # a recording that fails does not leave its stream by itself
                torch.cuda.set_stream(current)
        return _CudaRecording(graph, result)

    @contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        stream, last = torch.cuda.current_stream(device), self._last.get(device)
        if last is None:
            with torch.cuda.device(device):
                last = self._last[device] = torch.cuda.Event()
        else:
            stream.wait_event(last)
        yield
        last.record(stream)

    def random_state(self, device: torch.device) -> Tensor:
        return torch.cuda.get_rng_state(device)

    def set_random_state(self, state: Tensor, device: torch.device) -> None:
        torch.cuda.set_rng_state(state, device)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def recorder_here() -> Recorder | None:
    """What records on this machine; None without a CUDA device."""
    return CudaRecorder() if torch.cuda.is_available() else None
