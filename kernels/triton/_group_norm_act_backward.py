"""Backward kernels of group_norm_act; `group_norm_act.py` says when each is launched.

With xhat = (x - mean) rstd, t = xhat factor + offset (see `_norm.modulation`), dt = dy activation'(t), and the sums
over positions S = sum dt and T = sum dt xhat of every (sample, channel), n values in a group:

    dx = rstd (dt factor - sum_group(factor S) / n - xhat sum_group(factor T) / n)

x and dy are read, and t recomputed; nothing of it was stored. Sums are taken in one order only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import activation_slope
from ._norm import modulation, of_channels, product, sum_of_groups


@triton.jit
def group_norm_act_backward_slab_kernel(
    p_dy,  # (B, C, L)
    p_x,
    p_mean,  # (B, G)
    p_mean_error,
    p_rstd,
    p_weight,  # (C,)
    p_bias,
    p_scale,  # (B, C)
    p_shift,
    p_dx,  # (B, C, L)
    p_sum_dt,  # (B, C)
    p_sum_dt_xhat,
    channels,
    positions,
    groups,
    channels_per_group,
    stride_c,
    stride_l,
    stride_weight,
    stride_bias,
    stride_scale_b,
    stride_scale_c,
    stride_shift_b,
    stride_shift_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEEDS_X: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """All of the program's groups in one tile, read once."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(groups, GROUPS)
    i_b = i_program // blocks
    i_g = (i_program % blocks) * GROUPS  # the first group
    i_c = i_g * channels_per_group  # the first channel
    n_groups = tl.minimum(groups - i_g, GROUPS)

    o_k, o_c, o_l = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
    m_k, m_c = o_k < n_groups, o_c < n_groups * channels_per_group
    m_kc = (o_c // channels_per_group)[None, :] == o_k[:, None]  # [K, C]
    m_kc = m_kc & m_c[None, :]
    m_x = m_c[:, None] & (o_l < positions)[None, :]  # [C, L]
    o_x = o_c.to(tl.int64)[:, None] * stride_c + o_l.to(tl.int64)[None, :] * stride_l
    offset = i_b * channels * positions + i_c * stride_c

    b_x = tl.load(p_x + offset + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + offset + o_x, mask=m_x, other=0.0).to(tl.float32)
    o_g = i_b * groups + i_g + o_k
    b_mean = of_channels(tl.load(p_mean + o_g, mask=m_k, other=0.0), m_kc)  # [C]
    b_mean_error = of_channels(tl.load(p_mean_error + o_g, mask=m_k, other=0.0), m_kc)
    b_rstd = of_channels(tl.load(p_rstd + o_g, mask=m_k, other=0.0), m_kc)
    b_factor, b_offset = modulation(
        p_weight,
        p_bias,
        p_scale + i_b * stride_scale_b,
        p_shift + i_b * stride_shift_b,
        stride_weight,
        stride_bias,
        stride_scale_c,
        stride_shift_c,
        i_c + o_c,
        m_c,
        HAS_WEIGHT,
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    b_xhat = tl.where(m_x, (b_x - b_mean[:, None] - b_mean_error[:, None]) * b_rstd[:, None], 0.0)
    b_dt = b_dy * activation_slope(b_xhat * b_factor[:, None] + b_offset[:, None], ACTIVATION)
    b_dt = tl.where(m_x, b_dt, 0.0)
    b_sum_dt = tl.sum(b_dt, axis=1)  # [C]
    b_sum_dt_xhat = tl.sum(b_dt * b_xhat, axis=1)
    o_bc = i_b * channels + i_c + o_c
    tl.store(p_sum_dt + o_bc, b_sum_dt, mask=m_c)
    tl.store(p_sum_dt_xhat + o_bc, b_sum_dt_xhat, mask=m_c)

    if NEEDS_X:
        size = product(channels_per_group, positions)
        b_constant = b_rstd * of_channels(sum_of_groups(b_factor * b_sum_dt, m_kc) / size, m_kc)  # [C]
        b_slope = b_rstd * of_channels(sum_of_groups(b_factor * b_sum_dt_xhat, m_kc) / size, m_kc)
        b_dx = b_dt * (b_rstd * b_factor)[:, None] - b_constant[:, None] - b_xhat * b_slope[:, None]
        tl.store(p_dx + offset + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)


@triton.jit
def group_norm_act_backward_sums_kernel(
    p_dy,  # (B, C, L)
    p_x,
    p_mean,  # (B, G)
    p_mean_error,
    p_rstd,
    p_weight,  # (C,)
    p_bias,
    p_scale,  # (B, C)
    p_shift,
    p_split_dt,  # (B, splits, C)
    p_split_dt_xhat,
    channels,
    positions,
    groups,
    channels_per_group,
    splits,
    split_size,  # positions of a split
    stride_c,
    stride_l,
    stride_weight,
    stride_bias,
    stride_scale_b,
    stride_scale_c,
    stride_shift_b,
    stride_shift_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """S and T of BLOCK_C channels over the positions of one split."""
    i_program = tl.program_id(0).to(tl.int64)
    i_split = i_program % splits
    blocks = tl.cdiv(channels, BLOCK_C)
    i_b = i_program // splits // blocks
    o_c = (i_program // splits) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_l = tl.arange(0, BLOCK_L)
    i_l = i_split * split_size
    n_positions = tl.minimum(positions - i_l, split_size)

    o_g = i_b * groups + o_c // channels_per_group
    b_mean = tl.load(p_mean + o_g, mask=m_c, other=0.0)
    b_mean_error = tl.load(p_mean_error + o_g, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_g, mask=m_c, other=0.0)
    b_factor, b_offset = modulation(
        p_weight,
        p_bias,
        p_scale + i_b * stride_scale_b,
        p_shift + i_b * stride_shift_b,
        stride_weight,
        stride_bias,
        stride_scale_c,
        stride_shift_c,
        o_c,
        m_c,
        HAS_WEIGHT,
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    offset = i_b * channels * positions + i_l * stride_l
    b_sum_dt = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    b_sum_dt_xhat = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for j in range(0, n_positions, BLOCK_L):
        m_x = m_c[:, None] & (j + o_l < n_positions)[None, :]
        o_x = o_c[:, None] * stride_c + (j + o_l).to(tl.int64)[None, :] * stride_l + offset
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_xhat = (b_x - b_mean[:, None] - b_mean_error[:, None]) * b_rstd[:, None]
        b_dt = b_dy * activation_slope(b_xhat * b_factor[:, None] + b_offset[:, None], ACTIVATION)
        b_sum_dt += tl.where(m_x, b_dt, 0.0)
        b_sum_dt_xhat += tl.where(m_x, b_dt * b_xhat, 0.0)
    o_split = (i_b * splits + i_split) * channels + o_c
    tl.store(p_split_dt + o_split, tl.sum(b_sum_dt, axis=1), mask=m_c)
    tl.store(p_split_dt_xhat + o_split, tl.sum(b_sum_dt_xhat, axis=1), mask=m_c)


@triton.jit
def group_norm_act_backward_join_kernel(
    p_split_dt,  # (B, splits, C)
    p_split_dt_xhat,
    p_weight,  # (C,)
    p_scale,  # (B, C)
    p_sum_dt,  # (B, C)
    p_sum_dt_xhat,
    p_group_dt,  # (B, G)
    p_group_dt_xhat,
    channels,
    positions,
    groups,
    channels_per_group,
    splits,
    stride_weight,
    stride_scale_b,
    stride_scale_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S and T of one group's channels over all positions, and the means over the group of factor S and factor T."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_g = i_program // groups, i_program % groups
    o_s = tl.arange(0, BLOCK_S)
    b_group_dt = tl.zeros([BLOCK_C], tl.float32)
    b_group_dt_xhat = tl.zeros([BLOCK_C], tl.float32)
    for c in range(0, channels_per_group, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < channels_per_group
        o_c = i_g * channels_per_group + o_c
        b_sum_dt = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        b_sum_dt_xhat = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for s in range(0, splits, BLOCK_S):
            m_sc = (s + o_s < splits)[:, None] & m_c[None, :]
            o_sc = (i_b * splits + s + o_s)[:, None] * channels + o_c[None, :]
            b_sum_dt += tl.load(p_split_dt + o_sc, mask=m_sc, other=0.0)
            b_sum_dt_xhat += tl.load(p_split_dt_xhat + o_sc, mask=m_sc, other=0.0)
        b_s, b_t = tl.sum(b_sum_dt, axis=0), tl.sum(b_sum_dt_xhat, axis=0)  # [C]
        tl.store(p_sum_dt + i_b * channels + o_c, b_s, mask=m_c)
        tl.store(p_sum_dt_xhat + i_b * channels + o_c, b_t, mask=m_c)
        b_factor, _ = modulation(
            p_weight,
            p_weight,
            p_scale + i_b * stride_scale_b,
            p_scale,
            stride_weight,
            0,
            stride_scale_c,
            0,
            o_c,
            m_c,
            HAS_WEIGHT,
            False,
            HAS_SCALE,
            False,
        )
        b_group_dt += tl.where(m_c, b_factor * b_s, 0.0)
        b_group_dt_xhat += tl.where(m_c, b_factor * b_t, 0.0)
    size = product(channels_per_group, positions)
    tl.store(p_group_dt + i_program, tl.sum(b_group_dt, axis=0) / size)
    tl.store(p_group_dt_xhat + i_program, tl.sum(b_group_dt_xhat, axis=0) / size)


@triton.jit
def group_norm_act_backward_apply_kernel(
    p_dy,  # (B, C, L)
    p_x,
    p_mean,  # (B, G)
    p_mean_error,
    p_rstd,
    p_group_dt,  # (B, G)
    p_group_dt_xhat,
    p_weight,  # (C,)
    p_bias,
    p_scale,  # (B, C)
    p_shift,
    p_dx,  # (B, C, L)
    channels,
    positions,
    groups,
    channels_per_group,
    splits,
    split_size,  # positions of a split
    stride_c,
    stride_l,
    stride_weight,
    stride_bias,
    stride_scale_b,
    stride_scale_c,
    stride_shift_b,
    stride_shift_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dx of BLOCK_C channels at the positions of one split, backwards over x as in the forward pass."""
    i_program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_split = i_program % splits
    blocks = tl.cdiv(channels, BLOCK_C)
    i_b = i_program // splits // blocks
    o_c = (i_program // splits) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_l = tl.arange(0, BLOCK_L)
    i_l = i_split * split_size
    n_positions = tl.minimum(positions - i_l, split_size)

    o_g = i_b * groups + o_c // channels_per_group
    b_mean = tl.load(p_mean + o_g, mask=m_c, other=0.0)
    b_mean_error = tl.load(p_mean_error + o_g, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_g, mask=m_c, other=0.0)
    b_constant = tl.load(p_group_dt + o_g, mask=m_c, other=0.0)
    b_slope = tl.load(p_group_dt_xhat + o_g, mask=m_c, other=0.0)
    b_factor, b_offset = modulation(
        p_weight,
        p_bias,
        p_scale + i_b * stride_scale_b,
        p_shift + i_b * stride_shift_b,
        stride_weight,
        stride_bias,
        stride_scale_c,
        stride_shift_c,
        o_c,
        m_c,
        HAS_WEIGHT,
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    offset = i_b * channels * positions + i_l * stride_l
    for j in range(0, n_positions, BLOCK_L):
        m_x = m_c[:, None] & (j + o_l < n_positions)[None, :]
        o_x = o_c[:, None] * stride_c + (j + o_l).to(tl.int64)[None, :] * stride_l + offset
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_xhat = (b_x - b_mean[:, None] - b_mean_error[:, None]) * b_rstd[:, None]
        b_dt = b_dy * activation_slope(b_xhat * b_factor[:, None] + b_offset[:, None], ACTIVATION)
        b_dx = b_dt * b_factor[:, None] - b_constant[:, None] - b_xhat * b_slope[:, None]
        tl.store(p_dx + o_x, (b_rstd[:, None] * b_dx).to(p_dx.dtype.element_ty), mask=m_x)
