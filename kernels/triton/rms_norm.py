"""Triton kernels of `imagen_fast.ops.rms_norm`: y = s rstd weight with s = x + residual, and its gradients.

    stays   A program has whole rows in its registers, several narrow ones or a wide one: each is read once. Backward,
            it goes on to the next rows with the sum of dy xhat so far; what the programs have summed is joined.
    walk    A row is wider than that: one program walks over it twice. Backward, the sum of dy xhat has a kernel of its
            own, whose programs take some columns of some rows.

Everything is deterministic: sums have one order, which depends on the sizes and the device alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from ..layout import empty_rows_like
from . import _rms_norm as _kernels
from ._rows import row_strides

CONFIGURATIONS = Configurations("rms_norm")


class _Tile(NamedTuple):
    """One program's tile, as the kernels take it: arguments by name."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def _tile_of_rows(kind: str, x: Tensor) -> _Tile | None:
    """The tile of whole rows, or None if they are too wide."""
    block_c = power_of_two_at_least(x.shape[2])
    row = CONFIGURATIONS.find(kind, device_of(x), block_c)
    return None if row is None else _Tile(max(row["tile"] // block_c, 1), block_c, row["num_warps"])


def _walk(kind: str, x: Tensor) -> dict[str, int]:
    row = CONFIGURATIONS[kind, device_of(x)]
    return {"BLOCK_C": row["tile"], "num_warps": row["num_warps"]}


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y and s = x + residual, dense in the memory order of x, and rstd (outer, inner) in float32; s is empty without a
    residual.

    x and residual are (outer, inner, C) with dense rows, weight is (C,).
    """
    outer, inner, width = x.shape
    y = empty_rows_like(x, width)
    summed = x.new_empty(0) if residual is None else empty_rows_like(x, width)
    rstd = x.new_empty((outer, inner), dtype=torch.float32)
    if x.numel() == 0:
        return y, summed, rstd
    arguments = dict(
        row_strides(x=x, residual=residual, y=y),
        p_x=x,
        p_residual=x if residual is None else residual,  # a pointer that is not followed
        p_weight=weight,
        p_y=y,
        p_sum=y if residual is None else summed,
        p_rstd=rstd,
        inner=inner,
        width=width,
        stride_weight=weight.stride(0),
        eps=eps,
        HAS_RESIDUAL=residual is not None,
    )
    tile = _tile_of_rows("forward", x)
    if tile is not None:
        grid = (ceil_div(outer * inner, tile.BLOCK_R),)
        wrap_triton(_kernels.rms_norm_kernel)[grid](**arguments, rows=outer * inner, **tile._asdict())
    else:
        wrap_triton(_kernels.rms_norm_walk_kernel)[(outer * inner,)](**arguments, **_walk("forward_walk", x))
    return y, summed, rstd


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    """dx, dense in the memory order of x, and dweight (C,). x is s, of the forward pass; dsum its gradient, or None.

    Bits of `needs`: 1 for dx, 2 for dweight; what is not asked for comes back empty.
    """
    dx = empty_rows_like(x, x.shape[2]) if needs & 1 else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if needs & 2 else 0)
    if x.numel() == 0:
        return dx, dweight.zero_()
    if not needs & 3:
        return dx, dweight
    tile = _tile_of_rows("backward", x)
    if tile is not None:
        _backward_of_rows(dy, dsum, x, rstd, weight, dx, dweight, tile)
        return dx, dweight
    if needs & 1:
        wrap_triton(_kernels.rms_norm_backward_walk_kernel)[(x.shape[0] * x.shape[1],)](
            **_inputs(dy, dsum, x, rstd, weight, dx), **_walk("backward_walk", x)
        )
    if needs & 2:
        _weight_walk(dy, x, rstd, dweight)
    return dx, dweight


def _inputs(
    dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, dx: Tensor | None
) -> dict[str, Any]:
    """The arguments of the kernels that give dx, by name."""
    return dict(
        row_strides(dy=dy, dsum=dsum, s=x, dx=dx),
        p_dy=dy,
        p_dsum=dy if dsum is None else dsum,  # a pointer that is not followed
        p_s=x,
        p_rstd=rstd,
        p_weight=weight,
        p_dx=x if dx is None else dx,
        inner=x.shape[1],
        width=x.shape[2],
        stride_weight=weight.stride(0),
        HAS_DSUM=dsum is not None,
    )


def _parts(x: Tensor, programs: int, block_r: int) -> tuple[int, int]:
    """The rows of x split for about so many programs: how many parts, and the rows of each, a multiple of block_r."""
    rows = x.shape[0] * x.shape[1]
    rows_of_part = ceil_div(ceil_div(rows, block_r), programs) * block_r
    return ceil_div(rows, rows_of_part), rows_of_part


def _backward_of_rows(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dx: Tensor,
    dweight: Tensor,
    tile: _Tile,
) -> None:
    """Writes those of dx and dweight that have elements."""
    needs_x, needs_weight = dx.numel() > 0, dweight.numel() > 0
    device = device_of(x)
    row = CONFIGURATIONS.find("backward", device, tile.BLOCK_C)
    assert row is not None
    programs = device.multiprocessors * row["programs_per_multiprocessor"]
    parts, rows_of_part = _parts(x, programs, tile.BLOCK_R)
    partial = x.new_empty((parts, x.shape[2]) if needs_weight else 0, dtype=torch.float32)
    wrap_triton(_kernels.rms_norm_backward_kernel)[(parts,)](
        **_inputs(dy, dsum, x, rstd, weight, dx if needs_x else None),
        p_partial=partial,
        rows=x.shape[0] * x.shape[1],
        rows_of_program=rows_of_part,
        NEEDS_X=needs_x,
        NEEDS_WEIGHT=needs_weight,
        **tile._asdict(),
    )
    if needs_weight:
        _join(partial, dweight)


def _weight_walk(dy: Tensor, x: Tensor, rstd: Tensor, dweight: Tensor) -> None:
    """Writes dweight, of rows of any width."""
    device, width = device_of(x), x.shape[2]
    row = CONFIGURATIONS["weight_walk", device]
    blocks = ceil_div(width, row["columns"])
    programs = ceil_div(device.multiprocessors * row["programs_per_multiprocessor"], blocks)
    parts, rows_of_part = _parts(x, programs, row["rows"])
    partial = x.new_empty((parts, width), dtype=torch.float32)
    wrap_triton(_kernels.rms_norm_weight_walk_kernel)[(parts * blocks,)](
        **row_strides(dy=dy, s=x),
        p_dy=dy,
        p_s=x,
        p_rstd=rstd,
        p_partial=partial,
        rows=x.shape[0] * x.shape[1],
        rows_of_part=rows_of_part,
        inner=x.shape[1],
        width=width,
        BLOCK_R=row["rows"],
        BLOCK_C=row["columns"],
        num_warps=row["num_warps"],
    )
    _join(partial, dweight)


def _join(partial: Tensor, dweight: Tensor) -> None:
    """dweight from its partial sums (parts, C)."""
    parts, width = partial.shape
    row = CONFIGURATIONS["join", device_of(partial)]
    wrap_triton(_kernels.rms_norm_join_kernel)[(ceil_div(width, row["columns"]),)](
        p_partial=partial,
        p_dweight=dweight,
        parts=parts,
        width=width,
        BLOCK_S=min(power_of_two_at_least(parts), row["parts"]),
        BLOCK_C=row["columns"],
        num_warps=row["num_warps"],
    )
