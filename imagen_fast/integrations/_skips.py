"""Skip connections that are read where they are: a U-Net's up path without the concatenation.

A residual block reads the hidden state and the skip connection twice: its first norm, which writes to memory of its
own, and its 1x1 convolution, whose weight is one for the channels of both. Both read two tensors for less than what
writing one costs: on the CPU, in channels-last, where this package's product multiplies. Elsewhere the two are
concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._joined_norm import joined_group_norm_act
from ._fused import why_called
from ._kept import values_kept
from ._packed import is_channels_last, product_of


def parts(x: Tensor, skip: Tensor, norm: nn.Module, shortcut: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """x and skip, if a block can read both; else their concatenation, and None.

    Args:
        x, skip: (B, C, H, W) and (B, C', H, W).
        norm, shortcut: of the block.
    """
    alike = type(x) is type(skip) is Tensor and x.dtype == skip.dtype and x.device == skip.device and x.dim() == 4
    if alike and values_kept() and is_channels_last(x) and is_channels_last(skip) and x.shape[2:] == skip.shape[2:]:
        readable = why_called(norm, nn.GroupNorm) is None and norm.num_channels == x.shape[1] + skip.shape[1]
        if readable and x.shape[1] % 2 == skip.shape[1] % 2 == 0 and shortcut is not None:
            product = product_of(shortcut, x)
            if product is not None and shortcut.in_channels == norm.num_channels:
                return x, skip
    return torch.cat((x, skip), dim=1), None


def norm_act(norm: Any, x: Tensor, skip: Tensor, activation: str | None) -> Tensor:
    """`activation(norm(torch.cat((x, skip), dim=1)))` of what `parts` has found readable."""
    return joined_group_norm_act(x, skip, norm.num_groups, norm.weight, norm.bias, activation, norm.eps)


class Joined:
    """A hidden state and a skip connection in the place of their concatenation."""

    def __init__(self, hidden: Tensor, skip: Tensor) -> None:
        self.hidden, self.skip = hidden, skip


class Skip:
    """A skip connection on its way to `torch.cat`, which makes it and a hidden state `Joined`; a tensor to all else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.cat and len(args[0]) == 2 and (*args[1:], *kwargs.values()) == (1,):
            hidden, skip = args[0]
            if isinstance(hidden, Tensor) and isinstance(skip, cls):
                return Joined(hidden, skip.tensor)
        return function(*_tensors(args), **dict(zip(kwargs, _tensors(kwargs.values()), strict=True)))


def _tensors(values: Any) -> list[Any]:
    return [
        value.tensor if isinstance(value, Skip) else _tensors(value) if isinstance(value, list | tuple) else value
        for value in values
    ]


def skips_for(resnets: Sequence[nn.Module], kind: type[nn.Module], skips: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Skip connections as the blocks that they are for should get them.

    Args:
        resnets: the blocks.
        kind: the class of which they must be, in their fused form, and plain.
        skips: the tensors.
    """
    ready = values_kept() and all(
        type(resnet) is not kind and why_called(resnet, kind, ()) is None for resnet in resnets
    )
    return tuple(map(Skip, skips)) if ready else skips
