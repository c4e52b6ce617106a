"""A recorder for tensors of the CPU that keeps what a CUDA graph keeps: operators, and the tensors they read and write.

A replay runs these operators again on these very tensors. So it sees new numbers in them, and nothing else that has
changed: no Python is run, and a weight that lies elsewhere now is not found.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagen_fast.integrations import _graphed

_SYNCHRONIZING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class _Operators(TorchDispatchMode):
    def __init__(self, refused: set[Any]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.refused = refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.refused:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Operators:
    """A recording."""

    def __init__(self, function: Callable[[], Any], refused: set[Any]) -> None:
        with _Operators(refused) as mode:
            self.result = function()
        self.calls = mode.calls

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                for kept, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != fresh.data_ptr():
                        kept.copy_(fresh)


class OperatorRecorder:
    """In the place of `CudaRecorder`. `fails` is raised by the next recording."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.refused = _SYNCHRONIZING
        self.fails: Exception | None = None
        self.recordings: list[Operators] = []
        self.busy = False

    def is_busy(self) -> bool:
        return self.busy

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        return function()

    def record(self, function: Callable[[], Any], device: torch.device, beside: Any) -> Operators:
        if self.fails is not None:
            raise self.fails
        self.recordings.append(Operators(function, self.refused))
        return self.recordings[-1]

    def in_order(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def random_state(self, device: torch.device) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)


def recording_here(monkeypatch: pytest.MonkeyPatch) -> OperatorRecorder:
    """Have models that are accelerated from now on record on the CPU."""
    recorder = OperatorRecorder()
    monkeypatch.setattr(_graphed, "recorder_here", lambda: recorder)
    # The recorder is a dispatch mode itself; a CUDA graph is none, and nothing in a model looks different under it.
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    return recorder
