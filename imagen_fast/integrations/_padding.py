"""Texts of which all tokens are padding, in attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ._once import once_of_graph


def with_means(mixed: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """What attention gives where a text without a token to attend to attends to all of them alike, as in T5.

    The op gives it zeros.

    Args:
        mixed: (B, H, L, D), what the op gave.
        v: (B, H, K, D).
        key_mask: (B, K) bool, as the op's.
    """
    empty = ~key_mask.any(1)
    recorded = torch.compiler.is_compiling() or once_of_graph() is not None  # for any mask
    if not recorded and empty.device.type == "cpu" and not empty.any():
        return mixed
    return torch.where(empty[:, None, None, None], v.mean(2, keepdim=True), mixed)
