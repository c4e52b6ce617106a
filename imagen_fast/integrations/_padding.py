"""Texts of which all tokens are padding, in attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tracing import makes_tensors_to_keep
from ._once import once_of_graph


def with_means(mixed: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """What attention gives where a text without a token to attend to attends to all of them alike, as in T5.

    The op gives it zeros.

    Args:
        mixed: (B, H, L, D), what the op gave.
        v: (B, H, K, D).
        key_mask: (B, K) bool, as the op's.
    """
    on_cpu = mixed.device.type == "cpu"
    if on_cpu and once_of_graph() is not None:  # `prepared_text` lets no such text into a record
        return mixed
    empty = ~key_mask.any(1)
    if on_cpu and makes_tensors_to_keep(mixed.device) and not torch._C._is_tracing() and not empty.any():
        return mixed
    return torch.where(empty[:, None, None, None], v.mean(2, keepdim=True), mixed)
