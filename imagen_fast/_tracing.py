"""What `torch.compile` is told about plain Python functions that it meets while tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_as_constant(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does, without its import of Dynamo, which takes seconds.

    While tracing, the function is called for real and its result baked in.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
