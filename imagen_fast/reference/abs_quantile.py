"""The quantile of magnitudes in plain PyTorch; `imagen_fast.ops.abs_quantile` explains it."""

from __future__ import annotations

import torch
from torch import Tensor


def abs_quantile(x: Tensor, q: float) -> Tensor:
    """(B,) in float32, or float64 for float64: by sorting; see `imagen_fast.ops.abs_quantile`.

    `torch.quantile` is not used: it takes rank and weight in float32 and at most 2^24 values.
    """
    values = x.abs().flatten(1).sort(dim=1).values  # NaN comes last
    n = values.shape[1]
    place = float(q) * (n - 1)  # in float64, whatever number q is
    rank = int(place)
    weight = place - rank
    lower, upper = values[:, rank].double(), values[:, min(rank + 1, n - 1)].double()
    if weight == 0:
        result = lower
    else:
        difference = upper - lower
        between = lower + difference * weight if weight < 0.5 else upper - difference * (1 - weight)
        result = torch.where(upper.isinf() | (lower == upper), upper, between)
    largest = values[:, -1]
    result = torch.where(largest.isnan(), largest.double(), result)
    return result.to(torch.promote_types(x.dtype, torch.float32))
