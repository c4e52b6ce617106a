"""Calls of gated_gelu that are compiled for every architecture: both halves packed, as T5-XXL has them, and apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imagen_fast import ops


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    def packed() -> Tensor:
        return ops.gated_gelu(torch.empty(2, 77, 20480, dtype=torch.bfloat16, requires_grad=True))

    def apart() -> Tensor:
        return ops.gated_gelu(*(torch.empty(2, 77, 2048, requires_grad=True) for _ in range(2)), approximate="none")

    yield "2x77x10240, tanh, bfloat16, packed", packed
    yield "2x77x2048, none, float32", apart
