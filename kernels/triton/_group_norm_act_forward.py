"""Forward kernels of group_norm_act; `group_norm_act.py` says when each is launched.

A tile is [BLOCK_C channels, BLOCK_L positions]. NCHW and NHWC differ in strides alone. A program has GROUPS consecutive
groups of one sample: 1, unless so few channels are of one group that NHWC memory would be read in fragments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import activation
from ._norm import inverse_deviation, modulation, of_channels, product, sum_and_error, sum_of_groups


@triton.jit
def group_norm_act_slab_kernel(
    p_x,  # (B, C, L)
    p_y,
    p_mean,  # (B, G)
    p_mean_error,
    p_rstd,
    p_weight,  # (C,)
    p_bias,
    p_scale,  # (B, C)
    p_shift,
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
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    o_x = i_b * channels * positions + (i_c + o_c)[:, None] * stride_c + o_l.to(tl.int64)[None, :] * stride_l

    # Summed from each group's first value, and kept with what its rounding loses: so a large mean costs no accuracy.
    o_origin = i_b * channels * positions + (i_c + o_k * channels_per_group) * stride_c
    b_origin = tl.load(p_x + o_origin, mask=m_k, other=0.0).to(tl.float32)  # [K]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_delta = tl.where(m_x, b_x - of_channels(b_origin, m_kc)[:, None], 0.0)
    size = product(channels_per_group, positions)
    b_mean = sum_of_groups(tl.sum(b_delta, axis=1), m_kc) / size  # [K]
    b_mean, b_mean_error = sum_and_error(b_origin, b_mean)
    b_x = b_x - of_channels(b_mean, m_kc)[:, None] - of_channels(b_mean_error, m_kc)[:, None]
    b_x = tl.where(m_x, b_x, 0.0)
    b_rstd = inverse_deviation(sum_of_groups(tl.sum(b_x * b_x, axis=1), m_kc) / size, eps)
    o_g = i_b * groups + i_g + o_k
    tl.store(p_mean + o_g, b_mean, mask=m_k)
    tl.store(p_mean_error + o_g, b_mean_error, mask=m_k)
    tl.store(p_rstd + o_g, b_rstd, mask=m_k)

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
    b_factor *= of_channels(b_rstd, m_kc)
    b_y = activation(b_x * b_factor[:, None] + b_offset[:, None], ACTIVATION)
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def group_norm_act_statistics_kernel(
    p_x,  # (B, C, L)
    p_split_mean,  # (B, G, splits), less the group's first value
    p_split_m2,
    channels,
    positions,
    groups,
    channels_per_group,
    splits,
    split_size,  # positions of a split
    stride_c,
    stride_l,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Mean, less the group's first value, and sum of squared deviations from the mean, over one split's positions."""
    i_program = tl.program_id(0).to(tl.int64)
    i_split = i_program % splits
    blocks = tl.cdiv(groups, GROUPS)
    i_b = i_program // splits // blocks
    i_g = (i_program // splits) % blocks * GROUPS
    i_c = i_g * channels_per_group
    n_groups = tl.minimum(groups - i_g, GROUPS)
    n_channels = n_groups * channels_per_group
    i_l = i_split * split_size
    n_positions = tl.minimum(positions - i_l, split_size)

    o_k, o_c, o_l = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
    o_origin = i_b * channels * positions + (i_c + o_k * channels_per_group) * stride_c
    b_origin = tl.load(p_x + o_origin, mask=o_k < n_groups, other=0.0).to(tl.float32)  # [K]
    p_x += i_b * channels * positions + i_c * stride_c + i_l * stride_l
    b_count = tl.zeros([BLOCK_K], tl.float32)
    b_mean = tl.zeros([BLOCK_K], tl.float32)
    b_m2 = tl.zeros([BLOCK_K], tl.float32)
    for c in range(0, GROUPS * channels_per_group, BLOCK_C):
        m_c = c + o_c < n_channels
        m_kc = ((c + o_c) // channels_per_group)[None, :] == o_k[:, None]
        m_kc = m_kc & m_c[None, :]
        b_channels = tl.sum(m_kc.to(tl.float32), axis=1)  # [K]
        b_center = of_channels(b_origin, m_kc)
        for j in range(0, n_positions, BLOCK_L):
            m_x = m_c[:, None] & (j + o_l < n_positions)[None, :]
            o_x = (c + o_c).to(tl.int64)[:, None] * stride_c + (j + o_l).to(tl.int64)[None, :] * stride_l
            b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_x = tl.where(m_x, b_x - b_center[:, None], 0.0)
            b_tile_count = b_channels * tl.minimum(n_positions - j, BLOCK_L).to(tl.float32)
            b_tile_mean = sum_of_groups(tl.sum(b_x, axis=1), m_kc) / tl.maximum(b_tile_count, 1.0)
            b_x = tl.where(m_x, b_x - of_channels(b_tile_mean, m_kc)[:, None], 0.0)
            b_tile_m2 = sum_of_groups(tl.sum(b_x * b_x, axis=1), m_kc)
            # Joins two sets by their means and sums of squares: Chan, Golub and LeVeque, 1983.
            b_part = b_tile_count / tl.maximum(b_count + b_tile_count, 1.0)
            b_delta = b_tile_mean - b_mean
            b_mean += b_delta * b_part
            b_m2 += b_tile_m2 + b_delta * b_delta * (b_count * b_part)
            b_count += b_tile_count
    o_split = (i_b * groups + i_g + o_k) * splits + i_split
    tl.store(p_split_mean + o_split, b_mean, mask=o_k < n_groups)
    tl.store(p_split_m2 + o_split, b_m2, mask=o_k < n_groups)


@triton.jit
def group_norm_act_apply_kernel(
    p_x,  # (B, C, L)
    p_y,
    p_split_mean,  # (B, G, splits), less the group's first value
    p_split_m2,
    p_mean,  # (B, G)
    p_mean_error,
    p_rstd,
    p_weight,  # (C,)
    p_bias,
    p_scale,  # (B, C)
    p_shift,
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
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the splits' statistics, always in the same order, and apply them to the positions of one split.

    Programs go backwards over x, whose end the second level cache still holds from `group_norm_act_statistics_kernel`.
    """
    i_program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_split = i_program % splits
    blocks = tl.cdiv(groups, GROUPS)
    i_b = i_program // splits // blocks
    i_g = (i_program // splits) % blocks * GROUPS
    i_c = i_g * channels_per_group
    n_groups = tl.minimum(groups - i_g, GROUPS)
    n_channels = n_groups * channels_per_group
    i_l = i_split * split_size
    n_positions = tl.minimum(positions - i_l, split_size)

    o_k, o_s = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_S)
    m_k = o_k < n_groups
    m_ks = m_k[:, None] & (o_s < splits)[None, :]
    o_g = i_b * groups + i_g + o_k
    b_split_mean = tl.load(p_split_mean + o_g[:, None] * splits + o_s[None, :], mask=m_ks, other=0.0)
    b_split_m2 = tl.load(p_split_m2 + o_g[:, None] * splits + o_s[None, :], mask=m_ks, other=0.0)
    b_first = tl.load(p_split_mean + o_g * splits, mask=m_k, other=0.0)
    b_count = tl.minimum(positions - o_s.to(tl.int64) * split_size, split_size).to(tl.float32) * channels_per_group
    size = product(channels_per_group, positions)
    b_delta = tl.where(m_ks, b_count[None, :] * (b_split_mean - b_first[:, None]), 0.0)
    b_mean = b_first + tl.sum(b_delta, axis=1) / size  # [K]
    b_delta = b_split_mean - b_mean[:, None]
    b_m2 = tl.sum(tl.where(m_ks, b_split_m2 + b_count[None, :] * b_delta * b_delta, 0.0), axis=1)
    b_rstd = inverse_deviation(b_m2 / size, eps)
    o_origin = i_b * channels * positions + (i_c + o_k * channels_per_group) * stride_c
    b_origin = tl.load(p_x + o_origin, mask=m_k, other=0.0).to(tl.float32)
    b_mean, b_mean_error = sum_and_error(b_origin, b_mean)
    m_written = o_k < tl.where(i_split == 0, n_groups, 0)
    tl.store(p_mean + o_g, b_mean, mask=m_written)
    tl.store(p_mean_error + o_g, b_mean_error, mask=m_written)
    tl.store(p_rstd + o_g, b_rstd, mask=m_written)

    o_c, o_l = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
    offset = i_b * channels * positions + i_c * stride_c + i_l * stride_l
    for c in range(0, GROUPS * channels_per_group, BLOCK_C):
        m_c = c + o_c < n_channels
        m_kc = ((c + o_c) // channels_per_group)[None, :] == o_k[:, None]
        m_kc = m_kc & m_c[None, :]
        b_factor, b_offset = modulation(
            p_weight,
            p_bias,
            p_scale + i_b * stride_scale_b,
            p_shift + i_b * stride_shift_b,
            stride_weight,
            stride_bias,
            stride_scale_c,
            stride_shift_c,
            i_c + c + o_c,
            m_c,
            HAS_WEIGHT,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SHIFT,
        )
        b_factor *= of_channels(b_rstd, m_kc)
        b_center, b_center_error = of_channels(b_mean, m_kc), of_channels(b_mean_error, m_kc)
        for j in range(0, n_positions, BLOCK_L):
            m_x = m_c[:, None] & (j + o_l < n_positions)[None, :]
            o_x = (c + o_c).to(tl.int64)[:, None] * stride_c + (j + o_l).to(tl.int64)[None, :] * stride_l + offset
            b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_x = b_x - b_center[:, None] - b_center_error[:, None]
            b_t = b_x * b_factor[:, None] + b_offset[:, None]
            tl.store(p_y + o_x, activation(b_t, ACTIVATION).to(p_y.dtype.element_ty), mask=m_x)
