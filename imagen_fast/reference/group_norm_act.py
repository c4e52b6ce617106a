"""Group normalisation, scale and shift, activation, in plain PyTorch; `imagen_fast.ops.group_norm_act` explains it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import dense, dense_like

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda t: t,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
}


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    eps: float = 1e-5,
) -> Tensor:
    """`act(group_norm(x) * (1 + scale) + shift)`, in x's dtype and layout; see `imagen_fast.ops.group_norm_act`.

    Steps are done, and rounded, in x's dtype, as a model written in PyTorch does them; a parameter of a wider dtype
    widens the steps after it.
    """
    x = dense(x)
    # PyTorch's channels-last kernel for the CPU takes the variance as E[x²] - E[x]²: at mean 1000 and deviation 1 it is
    # off by 0.33 in float32. Its NCHW kernel is accurate. One position is both, and rows of positions are neither.
    y = x.contiguous().flatten(2) if x.dim() > 3 else x.contiguous()
    if _affine_in_group_norm(x, weight, bias):
        y = torch.group_norm(y, num_groups, weight, bias, eps).view(x.shape)
    else:
        y = torch.group_norm(y, num_groups, None, None, eps).view(x.shape)
        y = y if weight is None else y * per_channel(weight, x)
        y = y if bias is None else y + per_channel(bias, x)
    if scale is not None:
        y = y * (1 + per_channel(scale, x))
    if shift is not None:
        y = y + per_channel(shift, x)
    return dense_like(ACTIVATIONS[activation](y).to(x.dtype), x)


def _affine_in_group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `torch.group_norm` takes these parameters.

    It takes no other dtype than x's; its backward pass fails with a bias and no weight, and leaves the gradients of the
    parameters unwritten where there are no positions.
    """
    same_dtype = all(parameter is None or parameter.dtype == x.dtype for parameter in (weight, bias))
    return same_dtype and (bias is None or weight is not None) and x.numel() > 0


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """Anything that broadcasts to (B, C), reshaped so that it broadcasts to x of shape (B, C, positions...)."""
    batch_and_channels = (1,) * (2 - parameter.dim()) + tuple(parameter.shape)
    return parameter.reshape(batch_and_channels + (1,) * (x.dim() - 2))
