"""Device functions of the exact quantile of magnitudes: radix select on their bits, in digits of 11, 10 and 10 bits.

Magnitudes of float32 are ordered as their bits are, read as an integer: the key, below 2^31. A histogram of the leading
digit says in which of its bins the wanted rank lies, one of the next digit among the keys in that bin says more, and
after three the key is known, and how many there are of it. The one above it is the same again, or the least of those
that are greater. All counts are integers, so that neither order nor number of programs matter.

A sample that one program holds is done by `quantile`. For larger ones each digit is a launch of its own: programs
`count` their part of the sample in a workspace of COUNTS int64 for each sample, zeros at first, and the next launch
begins with `first_digit`, `second_digit` or `neighbours`, which make of the counts what it needs to know.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FFFFFFF)  # of every NaN, and of nothing else

_BINS_1 = tl.constexpr(2048)
_BINS = tl.constexpr(1024)  # of the second and the third digit
_LAST_BIN = tl.constexpr(2047)  # of the first digit: NaN

# The workspace of a sample: counts of the three digits; the complement of the least key that begins with greater digits
# than the first two found; then digits found (the key without those to come) and the rank among the keys that begin so.
_COUNTS_2 = tl.constexpr(2048)
_COUNTS_3 = tl.constexpr(3072)
_ABOVE = tl.constexpr(4096)
_FOUND_1 = tl.constexpr(4097)
_RANK_1 = tl.constexpr(4098)
_FOUND_2 = tl.constexpr(4099)
_RANK_2 = tl.constexpr(4100)
COUNTS = tl.constexpr(4104)


@triton.jit
def float64_of(bits):
    """A float64 by its bits, as the launchers pass it: a float argument would be rounded to float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def keys_of(b_x, m_x):
    """The keys of values in float32, and -1 where there is none, as one row."""
    b_key = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_key = tl.where(b_key > _INFINITY, _NAN, b_key)
    b_key = tl.where(m_x, b_key, -1)
    return tl.reshape(b_key, [b_key.numel])


@triton.jit
def place(q_bits, size):
    """Rank and weight of the quantile among `size` values."""
    q_bits = tl.cast(q_bits, tl.int64)
    product = float64_of(q_bits) * (tl.cast(size, tl.int64) - 1).to(tl.float64)
    # A fused product and difference would make a small weight of what is none. So the product's bits are changed, by
    # what is 0 for q up to 1, and the compiler does not know that.
    product = (product.to(tl.int64, bitcast=True) ^ (q_bits >> 62)).to(tl.float64, bitcast=True)
    rank = product.to(tl.int64)
    return rank, product - rank.to(tl.float64)


@triton.jit
def _find(b_count, rank):
    """The bin that `rank` lies in, the rank among its keys, and how many these are."""
    b_through = tl.cumsum(b_count, axis=0)
    m_before = b_through <= rank
    digit = tl.sum(m_before.to(tl.int32), axis=0)
    before = tl.max(tl.where(m_before, b_through, 0), axis=0)
    through = tl.min(tl.where(m_before, 0x7FFFFFFFFFFFFFFF, b_through.to(tl.int64)), axis=0)
    return digit, rank - before, through - before


@triton.jit
def interpolated(lower, upper, weight, has_nan):
    """Between the values of two keys, in float64, rounded once to float32."""
    v = lower.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    above = upper.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    difference = above - v
    between = tl.where(weight < 0.5, v + difference * weight, above - difference * (1.0 - weight))
    between = tl.where((upper >= _INFINITY) | (lower == upper), above, between)
    result = tl.where(weight == 0.0, v, between)
    return tl.where(has_nan, float("nan"), result).to(tl.float32)


@triton.jit
def quantile(b_key, size, q_bits):
    """Of the `size` values whose keys the program holds."""
    rank, weight = place(q_bits, size)
    m_key = b_key >= 0
    b_count = tl.histogram(b_key >> 20, _BINS_1, mask=m_key)
    nans = tl.sum(tl.where(tl.arange(0, _BINS_1) == _LAST_BIN, b_count, 0), axis=0)
    digit, rank, _ = _find(b_count, rank)
    found = digit << 10
    m_key = (b_key >> 20) == digit
    digit, rank, _ = _find(tl.histogram((b_key >> 10) & 1023, _BINS, mask=m_key), rank)
    found = (found | digit) << 10
    m_key = (b_key >> 10) == (found >> 10)
    digit, rank, same = _find(tl.histogram(b_key & 1023, _BINS, mask=m_key), rank)
    lower = found | digit
    above = tl.min(tl.where(b_key > lower, b_key, _NAN), axis=0)
    return interpolated(lower, tl.where(rank + 1 < same, lower, above), weight, nans > 0)


@triton.jit
def count(b_key, found, DIGIT: tl.constexpr):
    """How many of the keys that begin with the digits found have which next one: [bins]."""
    if DIGIT == 1:
        return tl.histogram(b_key >> 20, _BINS_1, mask=b_key >= 0)
    elif DIGIT == 2:
        return tl.histogram((b_key >> 10) & 1023, _BINS, mask=(b_key >> 20) == (found >> 20))
    else:
        return tl.histogram(b_key & 1023, _BINS, mask=(b_key >> 10) == (found >> 10))


@triton.jit
def no_counts(DIGIT: tl.constexpr):
    if DIGIT == 1:
        return tl.zeros([_BINS_1], tl.int32)
    else:
        return tl.zeros([_BINS], tl.int32)


@triton.jit
def add_counts(p_counts, b_count, DIGIT: tl.constexpr):
    """To the sample's."""
    if DIGIT == 1:
        o_bin = tl.arange(0, _BINS_1)
    elif DIGIT == 2:
        o_bin = _COUNTS_2 + tl.arange(0, _BINS)
    else:
        o_bin = _COUNTS_3 + tl.arange(0, _BINS)
    tl.atomic_add(p_counts + o_bin, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def add_above(p_counts, least):
    """The least key of a part of the sample that begins with greater digits than the first two found."""
    tl.atomic_max(p_counts + _ABOVE, (least ^ _NAN).to(tl.int64), sem="relaxed")


@triton.jit
def first_digit(p_counts, size, q_bits, write):
    """The key's first digit, after its launch; `write` is true in one program of the sample."""
    rank, _ = place(q_bits, size)
    digit, rank, _ = _find(tl.load(p_counts + tl.arange(0, _BINS_1)), rank)
    found = digit << 20
    tl.store(p_counts + _FOUND_1, found.to(tl.int64), mask=write)
    tl.store(p_counts + _RANK_1, rank, mask=write)
    return found


@triton.jit
def second_digit(p_counts, write):
    """The key's first two digits, after the launch for the second."""
    digit, rank, _ = _find(tl.load(p_counts + _COUNTS_2 + tl.arange(0, _BINS)), tl.load(p_counts + _RANK_1))
    found = tl.load(p_counts + _FOUND_1).to(tl.int32) | (digit << 10)
    tl.store(p_counts + _FOUND_2, found.to(tl.int64), mask=write)
    tl.store(p_counts + _RANK_2, rank, mask=write)
    return found


@triton.jit
def counted_quantile(p_counts, size, q_bits):
    """The sample's quantile, after the launch for the third digit."""
    _, weight = place(q_bits, size)
    o_bin = tl.arange(0, _BINS)
    b_count = tl.load(p_counts + _COUNTS_3 + o_bin)
    digit, rank, same = _find(b_count, tl.load(p_counts + _RANK_2))
    found = tl.load(p_counts + _FOUND_2).to(tl.int32)
    lower = found | digit
    above = tl.load(p_counts + _ABOVE).to(tl.int32) ^ _NAN
    above = tl.min(tl.where((o_bin > digit) & (b_count > 0), found | o_bin, above), axis=0)
    has_nan = tl.load(p_counts + _LAST_BIN) > 0
    return interpolated(lower, tl.where(rank + 1 < same, lower, above), weight, has_nan)
