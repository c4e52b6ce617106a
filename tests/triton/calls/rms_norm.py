"""Calls of rms_norm that are compiled for every architecture: rows that stay on the chip, and wider ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from imagen_fast import ops


def calls() -> Iterator[tuple[str, Callable[[], Tensor | tuple[Tensor, Tensor]]]]:
    yield _call(768, torch.float32, False)
    yield _call(4096, torch.bfloat16, True)
    yield _call(20480, torch.bfloat16, True)


def _call(width: int, dtype: torch.dtype, residual: bool) -> tuple[str, Callable[[], Tensor | tuple[Tensor, Tensor]]]:
    def call() -> Tensor | tuple[Tensor, Tensor]:
        make = partial(torch.empty, 2, 77, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(width, requires_grad=True)
        return ops.rms_norm(make(), weight, residual=make() if residual else None)

    return f"2x77x{width}, {str(dtype).removeprefix('torch.')}{', residual' if residual else ''}", call
