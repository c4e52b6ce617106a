"""Memory layouts that kernels read in place: dense NCHW and dense NHWC ("channels-last"), for any rank.

A tensor is (B, C, positions...). PyTorch names the channels-last format for rank 4 and 5 only; rank 3 has it too, with
strides (C * L, 1, C), for example as the transpose of a (B, L, C) sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense with its channels innermost. Can be true of a contiguous tensor too (one channel, say)."""
    rank = x.dim()
    if rank == 3:
        return x.transpose(1, 2).is_contiguous()
    return rank > 3 and x.is_contiguous(memory_format=_CHANNELS_LAST[rank])


def is_dense(x: Tensor) -> bool:
    """Whether x is dense in one of the two layouts."""
    return x.is_contiguous() or is_channels_last(x)


def dense(x: Tensor) -> Tensor:
    """x itself if it is dense in one of the two layouts, else a copy in the one that its strides suggest."""
    if is_dense(x):
        return x
    return channels_last(x) if x.dim() > 2 and x.stride(1) == 1 else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """x with its channels innermost, copied only if it is not so already."""
    if x.dim() < 3:
        return x.contiguous()
    if x.dim() == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def dense_like(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout of x, copied only if it is not so already; x is of the same shape and dense."""
    if x.is_contiguous():
        return y.contiguous()
    return channels_last(y)
