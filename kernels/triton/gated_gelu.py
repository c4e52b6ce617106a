"""Triton kernels of `imagen_fast.ops.gated_gelu`: gelu(gate) * value, and its gradients

    dgate = dy value gelu'(gate)        dvalue = dy gelu(gate)

A program takes one tile of [BLOCK_R rows, BLOCK_C columns]: a part of one wide row, or several narrow rows. Of packed
rows (gate, value) the value is the same tensor, `first_value` elements on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import triton
import triton.language as tl

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from ..layout import empty_rows_like
from ._math import GELU, GELU_TANH, activation, activation_slope
from ._rows import row_offsets, row_strides

CONFIGURATIONS = Configurations("gated_gelu")


@triton.jit
def _tile(rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's rows [R] and columns [C], and which of its elements there are [R, C]."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK_C)
    o_r = i_program // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = i_program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_r, o_c, (o_r < rows)[:, None] & (o_c < width)[None, :]


@triton.jit
def gated_gelu_kernel(
    p_gate,  # (outer, inner, C)
    p_value,
    p_y,
    rows,
    inner,
    width,
    first_value,
    stride_gate_o,
    stride_gate_i,
    stride_value_o,
    stride_value_i,
    stride_y_o,
    stride_y_i,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_r, o_c, m = _tile(rows, width, BLOCK_R, BLOCK_C)
    o_gate = row_offsets(o_r, inner, stride_gate_o, stride_gate_i)[:, None] + o_c[None, :]
    o_value = row_offsets(o_r, inner, stride_value_o, stride_value_i)[:, None] + (first_value + o_c)[None, :]
    o_y = row_offsets(o_r, inner, stride_y_o, stride_y_i)[:, None] + o_c[None, :]
    b_gate = tl.load(p_gate + o_gate, mask=m, other=0.0).to(tl.float32)
    b_value = tl.load(p_value + o_value, mask=m, other=0.0).to(tl.float32)
    b_y = activation(b_gate, ACTIVATION) * b_value
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def gated_gelu_backward_kernel(
    p_dy,  # (outer, inner, C)
    p_gate,
    p_value,
    p_dgate,
    p_dvalue,
    rows,
    inner,
    width,
    first_value,  # of dvalue too
    stride_dy_o,
    stride_dy_i,
    stride_gate_o,
    stride_gate_i,
    stride_value_o,
    stride_value_i,
    stride_dgate_o,
    stride_dgate_i,
    stride_dvalue_o,
    stride_dvalue_i,
    ACTIVATION: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_r, o_c, m = _tile(rows, width, BLOCK_R, BLOCK_C)
    o_dy = row_offsets(o_r, inner, stride_dy_o, stride_dy_i)[:, None] + o_c[None, :]
    o_gate = row_offsets(o_r, inner, stride_gate_o, stride_gate_i)[:, None] + o_c[None, :]
    b_dy = tl.load(p_dy + o_dy, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_gate, mask=m, other=0.0).to(tl.float32)
    if NEEDS_GATE:
        o_value = row_offsets(o_r, inner, stride_value_o, stride_value_i)[:, None] + (first_value + o_c)[None, :]
        o_dgate = row_offsets(o_r, inner, stride_dgate_o, stride_dgate_i)[:, None] + o_c[None, :]
        b_value = tl.load(p_value + o_value, mask=m, other=0.0).to(tl.float32)
        b_dgate = b_dy * b_value * activation_slope(b_gate, ACTIVATION)
        tl.store(p_dgate + o_dgate, b_dgate.to(p_dgate.dtype.element_ty), mask=m)
    if NEEDS_VALUE:
        o_dvalue = row_offsets(o_r, inner, stride_dvalue_o, stride_dvalue_i)[:, None] + (first_value + o_c)[None, :]
        b_dvalue = b_dy * activation(b_gate, ACTIVATION)
        tl.store(p_dvalue + o_dvalue, b_dvalue.to(p_dvalue.dtype.element_ty), mask=m)


def _launch(kind: str, kernel: Any, gate: Tensor, value: Tensor | None, tanh: bool, **arguments: Any) -> None:
    """Launch a kernel on all tiles; gate has elements."""
    packed = value is None
    width = gate.shape[2] // 2 if packed else gate.shape[2]
    rows = gate.shape[0] * gate.shape[1]
    row = CONFIGURATIONS[kind, device_of(gate)]
    block_c = min(power_of_two_at_least(width), row["tile"])
    block_r = row["tile"] // block_c
    wrap_triton(kernel)[(ceil_div(rows, block_r) * ceil_div(width, block_c),)](
        p_gate=gate,
        p_value=gate if packed else value,
        **row_strides(gate=gate, value=gate if packed else value),
        **arguments,
        rows=rows,
        inner=gate.shape[1],
        width=width,
        first_value=width if packed else 0,
        ACTIVATION=(GELU_TANH if tanh else GELU).value,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=row["num_warps"],
    )


def forward(gate: Tensor, value: Tensor | None, tanh: bool) -> Tensor:
    """y (outer, inner, C), dense in the memory order of gate.

    gate and value are (outer, inner, C) with dense rows, or gate is (outer, inner, 2 C) and packs both.
    """
    y = empty_rows_like(gate, gate.shape[2] // 2 if value is None else gate.shape[2])
    if y.numel() > 0:
        _launch("forward", gated_gelu_kernel, gate, value, tanh, p_y=y, **row_strides(y=y))
    return y


def backward(dy: Tensor, gate: Tensor, value: Tensor | None, tanh: bool, needs: int) -> tuple[Tensor, Tensor]:
    """The gradients of gate and value, dense in their memory orders; packed in the first if there is no value.

    Bits of `needs`: 1 for gate, 2 for value; what is not asked for comes back empty.
    """
    dgate = empty_rows_like(gate, gate.shape[2]) if needs & 1 else gate.new_empty(0)
    dvalue = gate.new_empty(0) if value is None or not needs & 2 else empty_rows_like(value, gate.shape[2])
    needs_gate, needs_value = bool(needs & 1), bool(needs & (1 if value is None else 2))
    if dy.numel() > 0 and (needs_gate or needs_value):
        to = dgate if value is None else dvalue
        _launch(
            "backward",
            gated_gelu_backward_kernel,
            gate,
            value,
            tanh,
            p_dy=dy,
            p_dgate=dgate,
            p_dvalue=to,
            **row_strides(dy=dy, dgate=dgate if needs_gate else None, dvalue=to if needs_value else None),
            NEEDS_GATE=needs_gate,
            NEEDS_VALUE=needs_value,
        )
    return dgate, dvalue
