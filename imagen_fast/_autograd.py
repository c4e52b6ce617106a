"""Operators with autograd formulas in Python, called without the detours that a small call would pay for.

With `torch.library.register_autograd` alone, every call outside of inference mode goes from the dispatcher to Python,
from there, where a gradient is asked for, to a `torch.autograd.Function`, and through the dispatcher a second time: 5
to 10 microseconds without a gradient and 30 with one. `run_operator` knows the formula and the kernel, and goes to
either directly. `torch.compile`, and whoever calls the operator itself, goes the common way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_functions: dict[Callable[..., Any], Callable[..., Any]] = {}  # of an operator that can be differentiated


def register_autograd(
    name: str, formula: Callable[..., Any], *, setup_context: Callable[..., None], lib: torch.library.Library
) -> None:
    """What `torch.library.register_autograd` does, for `run_operator` too."""
    torch.library.register_autograd(name, formula, setup_context=setup_context, lib=lib)
    namespace, _, plain = name.partition("::")
    operator = getattr(getattr(torch.ops, namespace), plain).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    _functions[operator] = type(plain, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def run_operator(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call an operator with all its arguments in their order."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return operator(*arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _functions.get(operator, operator)(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
