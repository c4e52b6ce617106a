"""The gradients of a norm's parameters, from sums that the backward kernels of the GPU backends return.

With t the argument of the activation, dt = dL/dt, and the sums over positions of every (sample, channel),
S = sum dt and T = sum dt * xhat:

    dshift  = S                         dscale = weight * T + bias * S
    dweight = sum_B (1 + scale) * T     dbias  = sum_B (1 + scale) * S

These are a few (B, C) matrices: on a GPU a handful of PyTorch's kernels, which `torch.compile` joins. (The C++ kernels
of the CPU, where each such call costs as much as a small norm, do it themselves.)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    weight: bool
    bias: bool
    scale: bool
    shift: bool


def parameter_gradients(
    sum_dt: Tensor,
    sum_dt_xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dbias, dscale and dshift, each rounded once, to its parameter's dtype; None where it is not needed.

    Args:
        sum_dt, sum_dt_xhat: (B, C), float32 or float64.
        weight, bias: (C,), as the forward pass got them.
        scale, shift: (B, C), as the forward pass got them.
        needs: which of the four; what is needed is not None above.
    """
    dweight = dbias = dscale = dshift = None
    if scale is not None:
        factor = 1 + scale.to(sum_dt.dtype)  # wide before the addition, as in the kernels
    if needs.weight and weight is not None:
        dweight = (sum_dt_xhat if scale is None else sum_dt_xhat * factor).sum(0).to(weight.dtype)
    if needs.bias and bias is not None:
        dbias = (sum_dt if scale is None else sum_dt * factor).sum(0).to(bias.dtype)
    if needs.scale and scale is not None:
        dscale = sum_dt_xhat if weight is None else sum_dt_xhat * weight
        dscale = (dscale if bias is None else dscale + sum_dt * bias).to(scale.dtype)
    if needs.shift and shift is not None:
        dshift = sum_dt.to(shift.dtype)
    return dweight, dbias, dscale, dshift
