"""T5's layer norm, in plain PyTorch; `imagen_fast.ops.rms_norm` explains it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import dense_rows_like


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6
) -> Tensor | tuple[Tensor, Tensor]:
    """`weight * x / sqrt(mean(x**2) + eps)`, with `residual` of x + residual; see `imagen_fast.ops.rms_norm`.

    As in transformers' `T5LayerNorm`, what a 16-bit weight multiplies has been rounded to x's dtype.
    """
    summed = x if residual is None else dense_rows_like(x + residual, x)
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        y = y.to(x.dtype)
    y = dense_rows_like((weight * y).to(x.dtype), x)
    return y if residual is None else (y, summed)
