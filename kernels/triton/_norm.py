"""Device functions of the normalisations: modulation by weight, bias, scale and shift, and sums over groups."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def modulation(
    p_weight,
    p_bias,
    p_scale,  # of the sample
    p_shift,
    stride_weight,
    stride_bias,
    stride_scale,
    stride_shift,
    o_c,
    m_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """factor and offset per channel, with (xhat weight + bias) (1 + scale) + shift = xhat factor + offset."""
    b_factor = tl.full(o_c.shape, 1.0, tl.float32)
    b_offset = tl.full(o_c.shape, 0.0, tl.float32)
    if HAS_WEIGHT:
        b_factor = tl.load(p_weight + o_c * stride_weight, mask=m_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_offset = tl.load(p_bias + o_c * stride_bias, mask=m_c, other=0.0).to(tl.float32)
    if HAS_SCALE:
        b_scale = 1.0 + tl.load(p_scale + o_c * stride_scale, mask=m_c, other=0.0).to(tl.float32)
        b_factor = b_factor * b_scale
        b_offset = b_offset * b_scale
    if HAS_SHIFT:
        b_offset += tl.load(p_shift + o_c * stride_shift, mask=m_c, other=0.0).to(tl.float32)
    return b_factor, b_offset


@triton.jit
def sum_of_groups(b_c, m_kc):
    """The sum over each group's channels: [C] to [K]. m_kc [K, C] says which channel is of which group. Selected, not
    multiplied, so that a NaN stays in its group."""
    return tl.sum(tl.where(m_kc, b_c[None, :], 0.0), axis=1)


@triton.jit
def of_channels(b_k, m_kc):
    """For each channel, its group's value: [K] to [C]."""
    return tl.sum(tl.where(m_kc, b_k[:, None], 0.0), axis=0)


@triton.jit
def product(a, b):
    """a * b of two sizes in float32, where an int32 could overflow."""
    return tl.cast(a, tl.float32) * tl.cast(b, tl.float32)


@triton.jit
def inverse_deviation(b_variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(b_variance + tl.cast(eps, tl.float32)))


@triton.jit
def sum_and_error(a, b):
    """a + b, and what its rounding lost: Knuth's two-sum."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
