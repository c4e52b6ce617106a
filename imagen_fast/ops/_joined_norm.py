"""Group norm of two pictures beside each other in their channels, read where they are, on the CPU without gradients.

    y = activation(group_norm(cat((x, skip), dim=1)))

For U-Nets, whose up path joins hidden states with skip connections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from . import _norms

_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")
_LIBRARY.define(
    "_group_norm_act_joined_cpu(Tensor x, Tensor skip, int num_groups, Tensor? weight, Tensor? bias, int activation, "
    "float eps) -> Tensor"
)


def available() -> bool:
    """Whether there is a kernel."""
    return _native.unavailable_reason() is None


def joined_group_norm_act(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    eps: float,
) -> Tensor:
    """
    Args:
        x, skip: (B, C, H, W) of one dtype, both channels-last, alike but for their channels.
        num_groups, weight, bias, activation, eps: as of `ops.group_norm_act`, for the channels of both.

    Returns:
        (B, C of x + C of skip, H, W), channels-last.
    """
    code = _norms.ACTIVATION_CODES[activation]
    return torch.ops.imagen_fast._group_norm_act_joined_cpu.default(x, skip, num_groups, weight, bias, code, eps)
