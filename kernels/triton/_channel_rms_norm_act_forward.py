"""Forward kernels of channel_rms_norm_act; `channel_rms_norm_act.py` says when each is launched.

A tile is [BLOCK_C channels, BLOCK_L positions]. NCHW and NHWC differ in strides alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import activation
from ._norm import modulation

_EPS = tl.constexpr(1e-12)  # the norm that shorter vectors are divided by
_SMALL = tl.constexpr(2.0**-96)  # squares of the largest float32 times this are far from overflow


@triton.jit
def inverse_rms(b_squares, channels):
    """sqrt(C) / max(|x|, eps) from the sum of squares of each position: [L]"""
    b_norm = tl.sqrt_rn(b_squares)
    b_norm = tl.where(b_norm < _EPS, _EPS, b_norm)  # a NaN stays one
    return tl.div_rn(tl.sqrt_rn(tl.zeros_like(b_norm) + tl.cast(channels, tl.float32)), b_norm)


@triton.jit
def some_overflow(b_squares):
    """Whether the sum of squares of any position is infinite."""
    return tl.max((b_squares == float("inf")).to(tl.int32), axis=0) > 0


@triton.jit
def inverse_rms_of_scaled(b_squares, b_scaled_squares, channels):
    """The same where a sum has overflowed, from that of the values times 2^-96."""
    b_scaled = inverse_rms(b_scaled_squares, channels) * _SMALL
    return tl.where(b_squares == float("inf"), b_scaled, inverse_rms(b_squares, channels))


@triton.jit
def sum_of_squares(p_x, o_x, m_l, channels, stride_c, FACTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of FACTOR x, over all channels of the positions at o_x: [L] to [L]"""
    o_c = tl.arange(0, BLOCK_C)
    b_squares = tl.zeros([BLOCK_C, o_x.shape[0]], tl.float32)
    for c in range(0, channels, BLOCK_C):
        m_x = (c + o_c < channels)[:, None] & m_l[None, :]
        o_cx = (c + o_c).to(tl.int64)[:, None] * stride_c + o_x[None, :]
        b_x = tl.load(p_x + o_cx, mask=m_x, other=0.0).to(tl.float32) * FACTOR
        b_squares += b_x * b_x
    return tl.sum(b_squares, axis=0)


@triton.jit
def channel_rms_norm_act_tile_kernel(
    p_x,  # (B, C, L)
    p_y,
    p_rstd,  # (B, L)
    p_weight,  # (C,)
    p_scale,  # (B, C)
    p_shift,
    channels,
    positions,
    stride_c,
    stride_l,
    stride_weight,
    stride_scale_b,
    stride_scale_c,
    stride_shift_b,
    stride_shift_c,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Some positions with all their channels in one tile, read once."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, BLOCK_L)
    i_b = i_program // blocks
    o_c, o_l = tl.arange(0, BLOCK_C), i_program % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    m_c, m_l = o_c < channels, o_l < positions
    m_x = m_c[:, None] & m_l[None, :]  # [C, L]
    o_x = i_b * channels * positions + o_c.to(tl.int64)[:, None] * stride_c + o_l[None, :] * stride_l

    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_squares = tl.sum(b_x * b_x, axis=0)  # [L]
    b_rstd = inverse_rms(b_squares, channels)
    if some_overflow(b_squares):
        b_scaled = b_x * _SMALL
        b_rstd = inverse_rms_of_scaled(b_squares, tl.sum(b_scaled * b_scaled, axis=0), channels)
    tl.store(p_rstd + i_b * positions + o_l, b_rstd, mask=m_l)

    b_factor, b_offset = modulation(
        p_weight,
        p_weight,
        p_scale + i_b * stride_scale_b,
        p_shift + i_b * stride_shift_b,
        stride_weight,
        0,
        stride_scale_c,
        stride_shift_c,
        o_c,
        m_c,
        True,
        False,
        HAS_SCALE,
        HAS_SHIFT,
    )
    b_t = b_x * b_rstd[None, :] * b_factor[:, None] + b_offset[:, None]
    tl.store(p_y + o_x, activation(b_t, ACTIVATION).to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def channel_rms_norm_act_loop_kernel(
    p_x,  # (B, C, L)
    p_y,
    p_rstd,  # (B, L)
    p_weight,  # (C,)
    p_scale,  # (B, C)
    p_shift,
    channels,
    positions,
    stride_c,
    stride_l,
    stride_weight,
    stride_scale_b,
    stride_scale_c,
    stride_shift_b,
    stride_shift_c,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Some positions, BLOCK_C of their channels at a time: once for the norm, once to apply it."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, BLOCK_L)
    i_b = i_program // blocks
    o_l = i_program % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < positions
    o_x = i_b * channels * positions + o_l * stride_l  # [L]

    b_squares = sum_of_squares(p_x, o_x, m_l, channels, stride_c, 1.0, BLOCK_C)
    b_rstd = inverse_rms(b_squares, channels)
    if some_overflow(b_squares):
        b_scaled_squares = sum_of_squares(p_x, o_x, m_l, channels, stride_c, _SMALL, BLOCK_C)
        b_rstd = inverse_rms_of_scaled(b_squares, b_scaled_squares, channels)
    tl.store(p_rstd + i_b * positions + o_l, b_rstd, mask=m_l)

    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_factor, b_offset = modulation(
            p_weight,
            p_weight,
            p_scale + i_b * stride_scale_b,
            p_shift + i_b * stride_shift_b,
            stride_weight,
            0,
            stride_scale_c,
            stride_shift_c,
            o_c,
            m_c,
            True,
            False,
            HAS_SCALE,
            HAS_SHIFT,
        )
        m_x = m_c[:, None] & m_l[None, :]
        o_cx = o_c.to(tl.int64)[:, None] * stride_c + o_x[None, :]
        b_x = tl.load(p_x + o_cx, mask=m_x, other=0.0).to(tl.float32)
        b_t = b_x * b_rstd[None, :] * b_factor[:, None] + b_offset[:, None]
        tl.store(p_y + o_cx, activation(b_t, ACTIVATION).to(p_y.dtype.element_ty), mask=m_x)
