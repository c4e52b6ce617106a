"""The product of rows in bfloat16 with a weight that was packed before, on the CPU, without gradients.

    y = x W^T + bias + add
    y = (x, more) W^T + bias + add, for rows that lie in two tensors

It is for machines that have instructions for bfloat16 in AVX-512 but no matrix tiles: a panel of the weight stays in a
cache while all rows meet it, and the next one is on its way there. How a packed weight lies in memory is described in
`csrc/packed_linear/problem.h`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..layout import rows

_PANEL = 64  # columns that lie together
_MOST_TERMS = 4096  # of a panel that stays in a second cache of 1 MiB, beside the rows that it meets

_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")
_LIBRARY.define("packed_linear_pack(Tensor weight) -> Tensor")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, int columns, Tensor? bias, Tensor? add, Tensor? more=None) -> Tensor"
)


class Panels(NamedTuple):
    """A packed weight.

    Attributes:
        packed: (panels, 64 * terms).
        columns: of the result.
    """

    packed: Tensor
    columns: int

    def product(
        self, x: Tensor, bias: Tensor | None = None, add: Tensor | None = None, more: Tensor | None = None
    ) -> Tensor:
        """x (..., terms) times the weight, plus bias (columns,) and add (..., columns), all of them bfloat16.

        With `more` (..., further terms) the weight is one for the terms of both.
        """
        added, continued = (None if tensor is None else rows(tensor) for tensor in (add, more))
        y = torch.ops.imagen_fast.packed_linear(rows(x), self.packed, self.columns, bias, added, continued)
        return y if x.dim() == 3 else y.view(*x.shape[:-1], self.columns)


def is_faster(weight: Tensor) -> bool:
    """Whether a weight (columns, terms) should be packed by `pack`, on this machine, rather than for oneDNN."""
    return (
        weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.shape[1] % 2 == 0
        and weight.shape[1] <= _MOST_TERMS
        and _native.unavailable_reason() is None
        and _native.cpu_capability() == "avx512_bf16"
        and _native.matrix_tiles() != "hardware"
    )


def packed_bytes(columns: int, terms: int) -> int:
    """What a packed weight takes: whole panels."""
    return -(-columns // _PANEL) * _PANEL * terms * torch.bfloat16.itemsize


def pack(weight: Tensor) -> Panels:
    """Pack a weight (columns, terms) in bfloat16; the number of terms must be even."""
    return Panels(torch.ops.imagen_fast.packed_linear_pack(rows(weight)[0]), weight.shape[0])
