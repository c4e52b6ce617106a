"""Memory layouts that kernels read in place: dense NCHW and dense NHWC ("channels-last"), for any rank.

A tensor is (B, C, positions...). PyTorch names the channels-last format for rank 4 and 5 only; rank 3 has it too, with
strides (C * L, 1, C), for example as the transpose of a (B, L, C) sequence.
"""

from __future__ import annotations

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
