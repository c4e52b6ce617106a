"""Device functions that draw the noise of `imagen_fast/reference/philox.py`: the same words, normals within 2 ulp.

The transform and its order are those of `csrc/common/philox.h`, on float32, with results in two parts where that is
what keeps them within 2 ulp.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log(1 + f) = f - f^2 / 2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], minimax to 1e-9, from the highest power down
_LOG_8 = tl.constexpr(0.06746642291545868)
_LOG_7 = tl.constexpr(-0.11675652861595154)
_LOG_6 = tl.constexpr(0.11888162046670914)
_LOG_5 = tl.constexpr(-0.1240558922290802)
_LOG_4 = tl.constexpr(0.14219552278518677)
_LOG_3 = tl.constexpr(-0.1666799634695053)
_LOG_2 = tl.constexpr(0.2000211924314499)
_LOG_1 = tl.constexpr(-0.25000008940696716)
_LOG_0 = tl.constexpr(0.3333331346511841)
# sin(2 pi r) = 2 pi r + r^3 P(r^2) and cos(2 pi r) = 1 + r^2 P(r^2) on [-1/8, 1/8], to 1e-10
_SIN_3 = tl.constexpr(41.48757553100586)
_SIN_2 = tl.constexpr(-76.69837951660156)
_SIN_1 = tl.constexpr(81.60520935058594)
_SIN_0 = tl.constexpr(-41.34170150756836)
_COS_3 = tl.constexpr(59.24596405029297)
_COS_2 = tl.constexpr(-85.44374084472656)
_COS_1 = tl.constexpr(64.93932342529297)
_COS_0 = tl.constexpr(-19.739208221435547)

# 2 pi, and log 2, in two parts: the first rounded to float32, or to so few bits that small multiples of it are exact
_TWO_PI = tl.constexpr(6.2831854820251465)
_TWO_PI_LOW = tl.constexpr(-1.7484556025237907e-07)
_LOG_TWO = tl.constexpr(0.693359375)
_LOG_TWO_LOW = tl.constexpr(-2.12194440e-4)

_TO_UNIT = tl.constexpr(2.0**-32)
_HALF_STEP = tl.constexpr(2.0**-33)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added to a float32, it leaves the nearest integer in the last bits
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def words(seed, o_counter, row, STAGE: tl.constexpr):
    """The four words of each counter (int64), as uint32; of the seed (int64) and the row, the low bits count."""
    low = o_counter.to(tl.uint32)
    high = (o_counter >> 32).to(tl.uint32)
    stage = tl.full([], STAGE, tl.uint32)
    return tl.philox(seed, low, high, row.to(tl.uint32), stage)


@triton.jit
def _radius(b_word):
    """sqrt(-2 log u), u = (word + 1/2) / 2^32"""
    u = b_word.to(tl.float32) * _TO_UNIT + _HALF_STEP
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    n = exponent.to(tl.float32)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    p = tl.fma(f, _LOG_8, _LOG_7)
    p = tl.fma(p, f, _LOG_6)
    p = tl.fma(p, f, _LOG_5)
    p = tl.fma(p, f, _LOG_4)
    p = tl.fma(p, f, _LOG_3)
    p = tl.fma(p, f, _LOG_2)
    p = tl.fma(p, f, _LOG_1)
    p = tl.fma(p, f, _LOG_0)
    tail = tl.fma(n, _LOG_TWO_LOW, p * (f2 * f))
    tail = tl.fma(f2, -0.5, tail)
    return tl.sqrt_rn(tl.fma(n, _LOG_TWO, f + tail) * -2.0)


@triton.jit
def box_muller(b_for_radius, b_for_angle):
    """Two normals of two words: radius cos(2 pi f) and radius sin(2 pi f), f = int32(word) / 2^32."""
    radius = _radius(b_for_radius)
    turns = b_for_angle.to(tl.int32, bitcast=True).to(tl.float32) * _TO_UNIT
    # Within an eighth of a turn from the nearest quarter
    shifted = tl.fma(turns, 4.0, _ROUNDER)
    r = tl.fma(shifted - _ROUNDER, -0.25, turns)
    r2 = r * r
    p = tl.fma(r2, _COS_3, _COS_2)
    p = tl.fma(p, r2, _COS_1)
    p = tl.fma(p, r2, _COS_0)
    cos_high = tl.fma(r2, p, 1.0)
    cos_low = tl.fma(r2, p, 1.0 - cos_high)
    p = tl.fma(r2, _SIN_3, _SIN_2)
    p = tl.fma(p, r2, _SIN_1)
    p = tl.fma(p, r2, _SIN_0)
    rest = r * tl.fma(r2, p, _TWO_PI_LOW)
    sin_high = tl.fma(r, _TWO_PI, rest)
    sin_low = tl.fma(r, _TWO_PI, -sin_high) + rest
    cosine = tl.fma(radius, cos_high, radius * cos_low)
    sine = tl.fma(radius, sin_high, radius * sin_low)

    quadrant = shifted.to(tl.int32, bitcast=True)
    turned = (quadrant & 1) != 0
    first, second = tl.where(turned, sine, cosine), tl.where(turned, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return first, second


@triton.jit
def normals_of_counters(seed, o_counter, row, STAGE: tl.constexpr):
    """The normals of the elements 4 e, ..., 4 e + 3 for counters e [C, L]: [C, 4 L]."""
    w0, w1, w2, w3 = words(seed, o_counter, row, STAGE)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normals_of_elements(seed, o_element, row, STAGE: tl.constexpr):
    """The normal of each element (int64), for elements that do not lie in fours: four times the work."""
    w0, w1, w2, w3 = words(seed, o_element >> 2, row, STAGE)
    later = (o_element & 2) != 0
    first, second = box_muller(tl.where(later, w2, w0), tl.where(later, w3, w1))
    return tl.where((o_element & 1) != 0, second, first)
