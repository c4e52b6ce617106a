"""The gated GELU of a feed-forward layer, in plain PyTorch; `imagen_fast.ops.gated_gelu` explains it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..layout import dense_rows_like


def gated_gelu(gate: Tensor, value: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(gate) * value`, or of the two halves of `gate`; see `imagen_fast.ops.gated_gelu`."""
    packed = gate
    if value is None:
        gate, value = packed.chunk(2, dim=-1)
    return dense_rows_like(F.gelu(gate, approximate=approximate) * value, packed)
