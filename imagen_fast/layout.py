"""Memory layouts that kernels read in place: dense NCHW and dense NHWC ("channels-last"), for any rank.

A tensor is (B, C, positions...). PyTorch names the channels-last format for rank 4 and 5 only; rank 3 has it too, with
strides (C * L, 1, C), for example as the transpose of a (B, L, C) sequence.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense with its channels innermost. Can be true of a contiguous tensor too (one channel, say)."""
    # By hand: `is_contiguous(memory_format=...)` does not work under `torch.vmap`.
    shape, strides = x.shape, x.stride()
    if len(shape) < 3:
        return False
    expected = 1
    for i in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[i] != 1 and strides[i] != expected:
            return x.numel() == 0
        expected *= shape[i]
    return True


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
    return x if is_channels_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def dense_like(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout of x, copied only if it is not so already; x is of the same shape and dense."""
    if x.is_contiguous():
        return y.contiguous()
    return channels_last(y)


def has_one_position_stride(x: Tensor) -> bool:
    """Whether the positions of x (B, C, positions...) lie at one distance from each other; batch and channels may lie
    anywhere. So do both dense layouts, halves of a batch or of the channels, and what is expanded over them."""
    if x.is_contiguous():
        return True
    shape, strides = x.shape, x.stride()
    expected = None
    for i in range(len(shape) - 1, 1, -1):
        if shape[i] != 1:
            if strides[i] == 0 or (expected is not None and strides[i] != expected):
                return False
            expected = strides[i] * shape[i]
    return True


# Ops on the last dimension see x (..., C) as rows (outer, inner, C) whose last dimension is dense: two strides, enough
# for a window into a sequence or a part of a packed projection. Their results are dense and contiguous; of a tensor of
# rank 3 they keep the order of the first two dimensions in memory.


def rows(x: Tensor) -> Tensor:
    """x (..., C) as (outer, inner, C), copied only if there are no two strides that do."""
    if x.dim() != 3:
        x = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    return x if has_dense_rows(x) else x.contiguous()


def is_rows(x: Tensor) -> bool:
    """Whether `rows` needs no copy."""
    if not has_dense_rows(x):
        return False
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    return (
        x.dim() == 3
        or x.numel() == 0
        or all(stride == size * inner for (_, stride), (size, inner) in itertools.pairwise(leading))
    )


def has_dense_rows(x: Tensor) -> bool:
    """Whether the last dimension of x is dense."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def has_inner_first(x: Tensor) -> bool:
    """Whether x (outer, inner, C) is in memory as (inner, outer, C). What is expanded, with a stride of 0, is not."""
    return 0 < x.stride(0) < x.stride(1)


def dense_rows_like(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout that the results of an op on the rows of x have; both are of one shape."""
    if x.dim() == 3 and has_dense_rows(x) and has_inner_first(x):
        return y.transpose(0, 1).contiguous().transpose(0, 1)
    return y.contiguous()


def empty_rows_like(x: Tensor, width: int) -> Tensor:
    """The same without data, for x (outer, inner, C) and rows of `width`."""
    outer, inner, _ = x.shape
    if has_inner_first(x):
        return x.new_empty((inner, outer, width)).transpose(0, 1)
    return x.new_empty((outer, inner, width))
