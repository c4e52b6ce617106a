"""What kernels on the last dimension share: rows (outer, inner, C), each dense, at two strides."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl


@triton.jit
def row_offsets(o_r, inner, stride_o, stride_i):
    """Where rows o_r, a number or a tile of them among 0 ... outer * inner - 1, begin."""
    o_r = o_r.to(tl.int64)
    return (o_r // inner) * stride_o + (o_r % inner) * stride_i


def row_strides(**tensors: Tensor | None) -> dict[str, int]:
    """The strides of rows as the kernels take them, arguments by name; 0 for a tensor that is not there."""
    strides = {}
    for name, x in tensors.items():
        outer, inner = (0, 0) if x is None else x.stride()[:2]
        strides |= {f"stride_{name}_o": outer, f"stride_{name}_i": inner}
    return strides
