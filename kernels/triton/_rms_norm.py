"""The kernels of rms_norm; `rms_norm.py` says when each is launched.

A tile is [BLOCK_R rows, BLOCK_C columns], by the width alone, so that a row's result does not depend on how many rows
there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._norm import inverse_deviation
from ._rows import row_offsets


@triton.jit
def rms_norm_kernel(
    p_x,  # (outer, inner, C)
    p_residual,
    p_weight,  # (C,)
    p_y,  # (outer, inner, C)
    p_sum,  # strided as y
    p_rstd,  # (outer, inner)
    rows,
    inner,
    width,
    stride_x_o,
    stride_x_i,
    stride_residual_o,
    stride_residual_i,
    stride_y_o,
    stride_y_i,
    stride_weight,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_R whole rows, read once."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < rows, o_c < width
    m = m_r[:, None] & m_c[None, :]
    o_y = row_offsets(o_r, inner, stride_y_o, stride_y_i)[:, None] + o_c[None, :]

    o_x = row_offsets(o_r, inner, stride_x_o, stride_x_i)[:, None] + o_c[None, :]
    b_s = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        o_residual = row_offsets(o_r, inner, stride_residual_o, stride_residual_i)[:, None] + o_c[None, :]
        b_residual = tl.load(p_residual + o_residual, mask=m, other=0.0).to(tl.float32)
        b_sum = (b_s + b_residual).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_y, b_sum, mask=m)
        b_s = b_sum.to(tl.float32)  # what is normalised has been rounded
    b_rstd = inverse_deviation(tl.sum(b_s * b_s, axis=1) / tl.cast(width, tl.float32), eps)  # [R]
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)
    b_weight = tl.load(p_weight + o_c * stride_weight, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_s * b_rstd[:, None] * b_weight[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _sum_part(p_x, p_residual, o_c, m_c, HAS_RESIDUAL: tl.constexpr):
    """x + residual of a part of a row, rounded to their dtype."""
    b_s = tl.load(p_x + o_c, mask=m_c, other=0.0)
    if HAS_RESIDUAL:
        b_residual = tl.load(p_residual + o_c, mask=m_c, other=0.0)
        b_s = (b_s.to(tl.float32) + b_residual.to(tl.float32)).to(p_x.dtype.element_ty)
    return b_s


@triton.jit
def rms_norm_walk_kernel(
    p_x,  # (outer, inner, C)
    p_residual,
    p_weight,  # (C,)
    p_y,  # (outer, inner, C)
    p_sum,  # strided as y
    p_rstd,  # (outer, inner)
    inner,
    width,
    stride_x_o,
    stride_x_i,
    stride_residual_o,
    stride_residual_i,
    stride_y_o,
    stride_y_i,
    stride_weight,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A row that is wider than a tile: once for its mean square, once for y."""
    i_r = tl.program_id(0).to(tl.int64)
    o_y = row_offsets(i_r, inner, stride_y_o, stride_y_i)
    p_x += row_offsets(i_r, inner, stride_x_o, stride_x_i)
    p_residual += row_offsets(i_r, inner, stride_residual_o, stride_residual_i)
    b_squares = tl.zeros([BLOCK_C], tl.float32)
    for c in range(0, width, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_s = _sum_part(p_x, p_residual, o_c, o_c < width, HAS_RESIDUAL).to(tl.float32)
        b_squares += b_s * b_s
    b_rstd = inverse_deviation(tl.sum(b_squares, axis=0) / tl.cast(width, tl.float32), eps)
    tl.store(p_rstd + i_r, b_rstd)
    for c in range(0, width, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        # Added once more, not read back: what other threads of the program have written may not be visible yet.
        b_sum = _sum_part(p_x, p_residual, o_c, m_c, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(p_sum + o_y + o_c, b_sum, mask=m_c)
        b_weight = tl.load(p_weight + o_c.to(tl.int64) * stride_weight, mask=m_c, other=0.0).to(tl.float32)
        b_y = b_sum.to(tl.float32) * b_rstd * b_weight
        tl.store(p_y + o_y + o_c, b_y.to(p_y.dtype.element_ty), mask=m_c)


@triton.jit
def rms_norm_backward_kernel(
    p_dy,  # (outer, inner, C)
    p_dsum,
    p_s,
    p_rstd,  # (outer, inner)
    p_weight,  # (C,)
    p_dx,  # (outer, inner, C)
    p_partial,  # (programs, C)
    rows,
    rows_of_program,  # a multiple of BLOCK_R
    inner,
    width,
    stride_dy_o,
    stride_dy_i,
    stride_dsum_o,
    stride_dsum_i,
    stride_s_o,
    stride_s_i,
    stride_dx_o,
    stride_dx_i,
    stride_weight,
    HAS_DSUM: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of the program's rows, each read once, and the sum of dy xhat over them."""
    i_program = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < width
    b_weight = tl.load(p_weight + o_c * stride_weight, mask=m_c, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, rows_of_program, BLOCK_R):
        o_r = i_program * rows_of_program + r + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        m = m_r[:, None] & m_c[None, :]
        o_dy = row_offsets(o_r, inner, stride_dy_o, stride_dy_i)[:, None] + o_c[None, :]
        o_s = row_offsets(o_r, inner, stride_s_o, stride_s_i)[:, None] + o_c[None, :]
        b_dy = tl.load(p_dy + o_dy, mask=m, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
        b_xhat = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32) * b_rstd[:, None]
        if NEEDS_WEIGHT:
            b_dweight += b_dy * b_xhat
        if NEEDS_X:
            b_g = b_dy * b_weight[None, :]
            b_mean = tl.sum(b_g * b_xhat, axis=1) / tl.cast(width, tl.float32)  # [R]
            b_dx = b_rstd[:, None] * (b_g - b_xhat * b_mean[:, None])
            if HAS_DSUM:
                o_dsum = row_offsets(o_r, inner, stride_dsum_o, stride_dsum_i)[:, None] + o_c[None, :]
                b_dx += tl.load(p_dsum + o_dsum, mask=m, other=0.0).to(tl.float32)
            o_dx = row_offsets(o_r, inner, stride_dx_o, stride_dx_i)[:, None] + o_c[None, :]
            tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m)
    if NEEDS_WEIGHT:
        tl.store(p_partial + i_program * width + o_c, tl.sum(b_dweight, axis=0), mask=m_c)


@triton.jit
def rms_norm_backward_walk_kernel(
    p_dy,  # (outer, inner, C)
    p_dsum,
    p_s,
    p_rstd,  # (outer, inner)
    p_weight,  # (C,)
    p_dx,  # (outer, inner, C)
    inner,
    width,
    stride_dy_o,
    stride_dy_i,
    stride_dsum_o,
    stride_dsum_i,
    stride_s_o,
    stride_s_i,
    stride_dx_o,
    stride_dx_i,
    stride_weight,
    HAS_DSUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of a row that is wider than a tile: once for mean(g xhat), once for dx."""
    i_r = tl.program_id(0).to(tl.int64)
    p_dy += row_offsets(i_r, inner, stride_dy_o, stride_dy_i)
    p_dsum += row_offsets(i_r, inner, stride_dsum_o, stride_dsum_i)
    p_s += row_offsets(i_r, inner, stride_s_o, stride_s_i)
    p_dx += row_offsets(i_r, inner, stride_dx_o, stride_dx_i)
    b_rstd = tl.load(p_rstd + i_r)
    b_products = tl.zeros([BLOCK_C], tl.float32)
    for c in range(0, width, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        b_weight = tl.load(p_weight + o_c.to(tl.int64) * stride_weight, mask=m_c, other=0.0).to(tl.float32)
        b_g = tl.load(p_dy + o_c, mask=m_c, other=0.0).to(tl.float32) * b_weight
        b_xhat = tl.load(p_s + o_c, mask=m_c, other=0.0).to(tl.float32) * b_rstd
        b_products += b_g * b_xhat
    b_mean = tl.sum(b_products, axis=0) / tl.cast(width, tl.float32)
    for c in range(0, width, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        b_weight = tl.load(p_weight + o_c.to(tl.int64) * stride_weight, mask=m_c, other=0.0).to(tl.float32)
        b_g = tl.load(p_dy + o_c, mask=m_c, other=0.0).to(tl.float32) * b_weight
        b_xhat = tl.load(p_s + o_c, mask=m_c, other=0.0).to(tl.float32) * b_rstd
        b_dx = b_rstd * (b_g - b_xhat * b_mean)
        if HAS_DSUM:
            b_dx += tl.load(p_dsum + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_dx + o_c, b_dx.to(p_dx.dtype.element_ty), mask=m_c)


@triton.jit
def rms_norm_weight_walk_kernel(
    p_dy,  # (outer, inner, C)
    p_s,
    p_rstd,  # (outer, inner)
    p_partial,  # (parts, C)
    rows,
    rows_of_part,  # a multiple of BLOCK_R
    inner,
    width,
    stride_dy_o,
    stride_dy_i,
    stride_s_o,
    stride_s_i,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of dy xhat over a part of the rows, of BLOCK_C columns: for rows that are wider than a tile."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK_C)
    i_part = i_program // blocks
    o_c = i_program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < width
    b_dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, rows_of_part, BLOCK_R):
        o_r = i_part * rows_of_part + r + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        m = m_r[:, None] & m_c[None, :]
        o_dy = row_offsets(o_r, inner, stride_dy_o, stride_dy_i)[:, None] + o_c[None, :]
        o_s = row_offsets(o_r, inner, stride_s_o, stride_s_i)[:, None] + o_c[None, :]
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
        b_xhat = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32) * b_rstd[:, None]
        b_dweight += tl.load(p_dy + o_dy, mask=m, other=0.0).to(tl.float32) * b_xhat
    tl.store(p_partial + i_part * width + o_c, tl.sum(b_dweight, axis=0), mask=m_c)


@triton.jit
def rms_norm_join_kernel(
    p_partial,  # (parts, C)
    p_dweight,  # (C,)
    parts,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The weight's gradient, of BLOCK_C columns: the parts in order."""
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < width
    b_dweight = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(0, parts, BLOCK_S):
        o_s = (s + tl.arange(0, BLOCK_S)).to(tl.int64)
        m = (o_s < parts)[:, None] & m_c[None, :]
        b_dweight += tl.load(p_partial + o_s[:, None] * width + o_c[None, :], mask=m, other=0.0)
    tl.store(p_dweight + o_c, tl.sum(b_dweight, axis=0).to(p_dweight.dtype.element_ty), mask=m_c)
