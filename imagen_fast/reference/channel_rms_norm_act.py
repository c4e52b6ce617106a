"""RMS normalisation over channels, scale and shift, activation, in plain PyTorch; see
`imagen_fast.ops.channel_rms_norm_act`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import dense, dense_like
from .group_norm_act import ACTIVATIONS, per_channel

EPS = 1e-12
"""The norm that shorter vectors are divided by, as in `torch.nn.functional.normalize`."""


def channel_rms_norm_act(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """`act(normalize(x, dim=1) * sqrt(C) * weight * (1 + scale) + shift)`, in x's dtype and layout.

    Steps are done, and rounded, in x's dtype, as a model written in PyTorch does them; a parameter of a wider dtype
    widens the steps after it. The norm alone is kept in float32 for 16 bits: in float16 it would overflow at 65504, and
    1e-12 would be 0.
    """
    x = dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(EPS)
    y = (x / norm).to(x.dtype) * x.shape[1] ** 0.5 * per_channel(weight, x)
    if scale is not None:
        y = y * (1 + per_channel(scale, x))
    if shift is not None:
        y = y + per_channel(shift, x)
    return dense_like(ACTIVATIONS[activation](y).to(x.dtype), x)
