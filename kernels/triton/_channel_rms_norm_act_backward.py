"""Backward kernels of channel_rms_norm_act; `channel_rms_norm_act.py` says when each is launched.

With xhat = x rstd, t = xhat factor + offset (see `_norm.modulation`), dt = dy activation'(t) and the mean over the
channels of a position, P = sum_C(dt factor xhat) / C:

    dx = rstd (dt factor - xhat P)      where the norm was not below its lower bound; there, without the second term

and for the parameters the sums over positions S = sum dt and T = sum dt xhat of every (sample, channel). x and dy are
read, and t recomputed; of the forward pass rstd alone was stored. Sums are taken in one order only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channel_rms_norm_act_forward import inverse_rms
from ._math import activation_slope
from ._norm import modulation


@triton.jit
def mean_product(b_sum, b_rstd, channels):
    """P from the sum over channels: [L]. It is 0 where x was divided by the norm's lower bound, a constant."""
    b_largest = inverse_rms(tl.zeros_like(b_rstd), channels)
    return tl.where(b_rstd >= b_largest, 0.0, b_sum / tl.cast(channels, tl.float32))


@triton.jit
def gradient_factor(b_rstd, channels):
    """What dx is multiplied by: rstd, but 0 for a single channel, which is its own norm, not what rounding leaves."""
    b_largest = inverse_rms(tl.zeros_like(b_rstd), channels)
    return tl.where((channels == 1) & (b_rstd < b_largest), 0.0, b_rstd)


@triton.jit
def channel_rms_norm_act_backward_tile_kernel(
    p_dy,  # (B, C, L)
    p_x,
    p_rstd,  # (B, L)
    p_weight,  # (C,)
    p_scale,  # (B, C)
    p_shift,
    p_dx,  # (B, C, L)
    p_split_dt,  # (B, splits, C)
    p_split_dt_xhat,
    channels,
    positions,
    splits,
    split_size,  # positions of a split
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
    NEEDS_X: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dx, and S and T over the positions of one split, in tiles that have all channels."""
    i_program = tl.program_id(0).to(tl.int64)
    i_split = i_program % splits
    i_b = i_program // splits
    i_l = i_split * split_size
    n_positions = tl.minimum(positions - i_l, split_size)
    o_c, o_l = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
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
    offset = i_b * channels * positions + i_l * stride_l
    b_sum_dt = tl.zeros([BLOCK_C], tl.float32)
    b_sum_dt_xhat = tl.zeros([BLOCK_C], tl.float32)
    for j in range(0, n_positions, BLOCK_L):
        m_l = j + o_l < n_positions
        m_x = m_c[:, None] & m_l[None, :]
        o_x = o_c.to(tl.int64)[:, None] * stride_c + (j + o_l).to(tl.int64)[None, :] * stride_l + offset
        b_rstd = tl.load(p_rstd + i_b * positions + i_l + j + o_l, mask=m_l, other=0.0)
        b_xhat = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) * b_rstd[None, :]
        b_dy = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dt = b_dy * activation_slope(b_xhat * b_factor[:, None] + b_offset[:, None], ACTIVATION)
        b_dt = tl.where(m_x, b_dt, 0.0)
        if NEEDS_SUMS:
            b_sum_dt += tl.sum(b_dt, axis=1)
            b_sum_dt_xhat += tl.sum(tl.where(m_x, b_dt * b_xhat, 0.0), axis=1)
        if NEEDS_X:
            b_g = b_dt * b_factor[:, None]
            b_mean = mean_product(tl.sum(tl.where(m_x, b_g * b_xhat, 0.0), axis=0), b_rstd, channels)
            b_dx = gradient_factor(b_rstd, channels)[None, :] * (b_g - b_xhat * b_mean[None, :])
            tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    if NEEDS_SUMS:
        o_split = i_program * channels + o_c
        tl.store(p_split_dt + o_split, b_sum_dt, mask=m_c)
        tl.store(p_split_dt_xhat + o_split, b_sum_dt_xhat, mask=m_c)


@triton.jit
def channel_rms_norm_act_backward_means_kernel(
    p_dy,  # (B, C, L)
    p_x,
    p_rstd,  # (B, L)
    p_weight,  # (C,)
    p_scale,  # (B, C)
    p_shift,
    p_mean,  # (B, L)
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
    """P of some positions, BLOCK_C of their channels at a time."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, BLOCK_L)
    i_b = i_program // blocks
    o_l = i_program % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < positions
    o_x = i_b * channels * positions + o_l * stride_l  # [L]
    b_rstd = tl.load(p_rstd + i_b * positions + o_l, mask=m_l, other=0.0)
    b_sum = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
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
        b_xhat = tl.load(p_x + o_cx, mask=m_x, other=0.0).to(tl.float32) * b_rstd[None, :]
        b_dy = tl.load(p_dy + o_cx, mask=m_x, other=0.0).to(tl.float32)
        b_dt = b_dy * activation_slope(b_xhat * b_factor[:, None] + b_offset[:, None], ACTIVATION)
        b_sum += tl.where(m_x, b_dt * b_factor[:, None] * b_xhat, 0.0)
    b_mean = mean_product(tl.sum(b_sum, axis=0), b_rstd, channels)
    tl.store(p_mean + i_b * positions + o_l, b_mean, mask=m_l)


@triton.jit
def channel_rms_norm_act_backward_apply_kernel(
    p_dy,  # (B, C, L)
    p_x,
    p_rstd,  # (B, L)
    p_mean,
    p_weight,  # (C,)
    p_scale,  # (B, C)
    p_shift,
    p_dx,  # (B, C, L)
    p_split_dt,  # (B, splits, C)
    p_split_dt_xhat,
    channels,
    positions,
    splits,
    split_size,  # positions of a split
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
    NEEDS_X: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dx of BLOCK_C channels, and their S and T, at the positions of one split, from P.

    Programs go backwards over x, whose end the second level cache still holds from
    `channel_rms_norm_act_backward_means_kernel`.
    """
    i_program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_split = i_program % splits
    blocks = tl.cdiv(channels, BLOCK_C)
    i_b = i_program // splits // blocks
    o_c = (i_program // splits) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_l = tl.arange(0, BLOCK_L)
    i_l = i_split * split_size
    n_positions = tl.minimum(positions - i_l, split_size)
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
    offset = i_b * channels * positions + i_l * stride_l
    b_sum_dt = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    b_sum_dt_xhat = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for j in range(0, n_positions, BLOCK_L):
        m_l = j + o_l < n_positions
        m_x = m_c[:, None] & m_l[None, :]
        o_x = o_c[:, None] * stride_c + (j + o_l).to(tl.int64)[None, :] * stride_l + offset
        b_rstd = tl.load(p_rstd + i_b * positions + i_l + j + o_l, mask=m_l, other=0.0)
        b_xhat = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) * b_rstd[None, :]
        b_dy = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dt = b_dy * activation_slope(b_xhat * b_factor[:, None] + b_offset[:, None], ACTIVATION)
        if NEEDS_SUMS:
            b_sum_dt += tl.where(m_x, b_dt, 0.0)
            b_sum_dt_xhat += tl.where(m_x, b_dt * b_xhat, 0.0)
        if NEEDS_X:
            b_mean = tl.load(p_mean + i_b * positions + i_l + j + o_l, mask=m_l, other=0.0)
            b_dx = b_dt * b_factor[:, None] - b_xhat * b_mean[None, :]
            b_dx = gradient_factor(b_rstd, channels)[None, :] * b_dx
            tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    if NEEDS_SUMS:
        o_split = (i_b * splits + i_split) * channels + o_c
        tl.store(p_split_dt + o_split, tl.sum(b_sum_dt, axis=1), mask=m_c)
        tl.store(p_split_dt_xhat + o_split, tl.sum(b_sum_dt_xhat, axis=1), mask=m_c)


@triton.jit
def channel_rms_norm_act_backward_join_kernel(
    p_split_dt,  # (B, splits, C)
    p_split_dt_xhat,
    p_sum_dt,  # (B, C)
    p_sum_dt_xhat,
    channels,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S and T of BLOCK_C channels of one sample, over all splits in order."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    i_b = i_program // blocks
    o_c = i_program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_s = tl.arange(0, BLOCK_S)
    b_sum_dt = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_sum_dt_xhat = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(0, splits, BLOCK_S):
        m_sc = (s + o_s < splits)[:, None] & m_c[None, :]
        o_sc = (i_b * splits + s + o_s)[:, None] * channels + o_c[None, :]
        b_sum_dt += tl.load(p_split_dt + o_sc, mask=m_sc, other=0.0)
        b_sum_dt_xhat += tl.load(p_split_dt_xhat + o_sc, mask=m_sc, other=0.0)
    tl.store(p_sum_dt + i_b * channels + o_c, tl.sum(b_sum_dt, axis=0), mask=m_c)
    tl.store(p_sum_dt_xhat + i_b * channels + o_c, tl.sum(b_sum_dt_xhat, axis=0), mask=m_c)
