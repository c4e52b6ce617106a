"""What `torch.compile` is told about plain Python functions that it meets, and what is not kept while tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_as_constant(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does, without its import of Dynamo, which takes seconds.

    While tracing, the function is called for real and its result baked in.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@traced_as_constant
def transforms_active() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which kernels do not see."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether calls are recorded by a compiler, or seen by a mode of PyTorch: tensors may be its own."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def makes_tensors_to_keep(device: torch.device) -> bool:
    """Whether a tensor made now is no tracer's, and does not lie in the memory of a CUDA graph."""
    if is_traced():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
