"""What the ops of the form act(norm(x) * weight * (1 + scale) + shift) share: checks, and arguments for operators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..layout import is_dense
from . import _checks

ACTIVATION_CODES: dict[str | None, int] = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


def check_x(x: Tensor) -> None:
    """x is (B, C, positions...) of rank 2 to 5."""
    _checks.floating("x", x)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x must have 2 to 5 dimensions (B, C, positions...), got shape {tuple(x.shape)}")


def check_per_channel(name: str, parameter: Tensor, x: Tensor, *, required: bool = False) -> None:
    """The parameter is (C,)."""
    _checks.parameter(name, parameter, x, required=required)
    channels = x.shape[1]
    if parameter.shape != (channels,):
        flatten = f"; pass {name}.flatten()" if parameter.dim() > 1 and parameter.numel() == channels else ""
        raise ValueError(
            f"{name} must have shape ({channels},), the channels of x, got {tuple(parameter.shape)}{flatten}"
        )


def check_per_sample(name: str, parameter: Tensor, x: Tensor) -> None:
    """The parameter is (B, C) or broadcasts to it."""
    _checks.parameter(name, parameter, x)
    batch, channels = x.shape[:2]
    if parameter.shape != (batch, channels) and not _broadcasts(parameter.shape, batch, channels):
        raise ValueError(
            f"{name} must have shape ({batch}, {channels}), the batch and channels of x, or broadcast to it, "
            f"got {tuple(parameter.shape)}"
        )


def _broadcasts(shape: torch.Size, batch: int, channels: int) -> bool:
    return len(shape) <= 2 and all(
        size in (1, full) for size, full in zip(reversed(shape), (channels, batch), strict=False)
    )


def check_activation(activation: str | None) -> None:
    if not isinstance(activation, str | None) or activation not in ACTIVATION_CODES:
        _checks.one_of("activation", activation, tuple(ACTIVATION_CODES))


def notes(x: Tensor) -> list[str]:
    """What `explain` adds about x."""
    return [] if is_dense(x) else ["x will be copied: its strides are neither dense NCHW nor dense NHWC"]


def accumulator(x: Tensor) -> torch.dtype:
    """What statistics and sums are in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_sample(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """scale or shift as (B, C).

    What is broadcast gets a wide dtype first: so its gradient is rounded once, after its sum over what is broadcast.
    """
    if parameter is None or parameter.shape == x.shape[:2]:
        return parameter
    return parameter.to(accumulator(x)).expand(x.shape[:2])


def bits(flags: Iterable[bool]) -> int:
    """Flag i as bit i: the argument `needs` of an operator, which tells what gradients are asked for."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def fake_gradients(x: Tensor, parameters: Iterable[Tensor | None], needs: int) -> list[Tensor]:
    """What the CPU's backward operators return for parameters: empty for those whose bit in `needs` is not set."""
    return [
        p.new_empty(p.shape) if p is not None and needs >> i & 1 else x.new_empty(0, dtype=torch.float32)
        for i, p in enumerate(parameters)
    ]
