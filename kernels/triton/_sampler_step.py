"""Device functions of sampler_step: what is done to a tile [BLOCK_C channels, BLOCK_L positions] of a sample.

Tuples stand for what belongs together:

    tensor    a pointer to the sample, the strides of channels and of positions
    tile      the first position, the channels [C], the positions [L] (all int64), which of them there are [C, L], which
              channels there are [C], and how many positions
    row       the index, and the coefficients that make x0, the next sample and the noise: see `row_of`
    noise     the tensor, a pointer to the seed, the index of the row
    guidance  multiplier and slope: see `_guided`

Where its coefficient is 0 a tensor is not read, so that infinities and NaN there do not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import normals_of_counters, normals_of_elements
from ._quantile import float64_of
from ._tiles import tile_at

# How the guided output is made
NO_GUIDANCE = tl.constexpr(0)
PLAIN = tl.constexpr(1)
BY_SUMS = tl.constexpr(2)  # over the sample: removal of the parallel component, rescaling

# What x0 is divided by, before it is clipped to [-1, 1]
NO_THRESHOLD = tl.constexpr(0)  # by nothing, and not clipped
STATIC = tl.constexpr(1)  # by 1
KNOWN = tl.constexpr(2)  # by a dynamic threshold, whatever the quantile is
QUANTILE = tl.constexpr(3)

# Where noise comes from
NO_NOISE = tl.constexpr(0)
TENSOR = tl.constexpr(1)
SEED_BY_FOURS = tl.constexpr(2)  # elements of a tile lie in fours, which have one counter
SEED = tl.constexpr(3)

_STAGE = tl.constexpr(0)  # of the noise stream
SUMS = tl.constexpr(5)  # of a sample: see `no_sums`


@triton.jit
def row_of(p_rows, p_index, steps, stride_row):
    """The index, and the coefficients of its row: NaN if there is no such row."""
    index = tl.load(p_index)
    known = (index >= 0) & (index < steps)
    p_row = p_rows + index * stride_row
    for_x0 = (_column(p_row, 0, known), _column(p_row, 1, known), _column(p_row, 2, known))
    for_next = (_column(p_row, 3, known), _column(p_row, 4, known), _column(p_row, 5, known), _column(p_row, 6, known))
    for_noise = (_column(p_row, 7, known), _column(p_row, 8, known), _column(p_row, 9, known))
    return index, for_x0, for_next, for_noise


@triton.jit
def _column(p_row, COLUMN: tl.constexpr, known):
    return tl.load(p_row + COLUMN, mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def tile_of(i_tile, channels, positions, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """A sample's i-th tile."""
    i_c, i_l = tile_at(tl.cast(i_tile, tl.int64), positions, BLOCK_C, BLOCK_L)
    o_c, o_l = i_c + tl.arange(0, BLOCK_C), i_l + tl.arange(0, BLOCK_L)
    m_c = o_c < channels
    return i_l, o_c, o_l, m_c[:, None] & (o_l < positions)[None, :], m_c, positions


@triton.jit
def read(tensor, tile):
    """A tile in float32."""
    return _read(tensor, tile, tile[3])


@triton.jit
def _read_for(weight, tensor, tile):
    """A tile in float32; zeros where the weight is 0."""
    # (As a number of positions, so that the compiler sees which vectors are whole.)
    m_l = tile[2] < tl.where(weight != 0.0, tile[5], 0)
    return _read(tensor, tile, tile[4][:, None] & m_l[None, :])


@triton.jit
def _read(tensor, tile, m_x):
    p_x, stride_c, stride_l = tensor
    o_x = tile[1][:, None] * stride_c + tile[2][None, :] * stride_l
    return tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def write(tensor, tile, b_x):
    p_x, stride_c, stride_l = tensor
    o_x = tile[1][:, None] * stride_c + tile[2][None, :] * stride_l
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=tile[3])


@triton.jit
def _term(coefficient, b_x):
    return tl.where(coefficient != 0.0, coefficient * b_x, 0.0)


@triton.jit
def _draw(noise, tile, NOISE: tl.constexpr):
    tensor, p_seed, index = noise
    i_l, o_c, o_l, _, _, positions = tile
    if NOISE == TENSOR:
        return read(tensor, tile)
    elif NOISE == SEED_BY_FOURS:
        o_counter = ((o_c * positions + i_l) // 4)[:, None] + tl.arange(0, o_l.numel // 4)[None, :]
        return normals_of_counters(tl.load(p_seed), o_counter, index, _STAGE)
    else:
        return normals_of_elements(tl.load(p_seed), o_c[:, None] * positions + o_l[None, :], index, _STAGE)


@triton.jit
def _noise_term(coefficient, noise, tile, NOISE: tl.constexpr):
    """Not drawn where the coefficient is 0."""
    b_z = tl.zeros(tile[3].shape, tl.float32)
    if coefficient != 0.0:
        b_z = coefficient * _draw(noise, tile, NOISE)
    return b_z


@triton.jit
def _guided(b_c, b_u, multiplier, slope, GUIDANCE: tl.constexpr):
    """Of the conditional and the unconditional output."""
    if GUIDANCE == PLAIN:
        return slope * (b_c - b_u) + b_u
    else:
        return slope * (b_c - b_u) + multiplier * b_c


@triton.jit
def predicted(
    row,
    sample,
    output,
    unconditional,
    noise,
    guidance,
    tile,
    GUIDANCE: tl.constexpr,
    NOISE: tl.constexpr,
    FOR_X0: tl.constexpr,
    FOR_NEXT: tl.constexpr,
):
    """x0 before the threshold, and what sample and output contribute to the next sample; or one of them, and zeros."""
    _, for_x0, for_next, _ = row
    x0_from_sample, x0_from_output, x0_from_noise = for_x0
    next_from_sample, next_from_output, _, _ = for_next
    multiplier, slope = guidance
    if not FOR_NEXT:
        next_from_sample, next_from_output = 0.0, 0.0
    if not FOR_X0:
        x0_from_sample, x0_from_output = 0.0, 0.0
    b_x = _read_for(tl.abs(x0_from_sample) + tl.abs(next_from_sample), sample, tile)
    weight = tl.abs(x0_from_output) + tl.abs(next_from_output)
    b_g = _read_for(weight, output, tile)
    if GUIDANCE != NO_GUIDANCE:
        b_g = _guided(b_g, _read_for(weight, unconditional, tile), multiplier, slope, GUIDANCE)
    b_x0 = tl.zeros_like(b_x)
    if FOR_X0:
        b_x0 = _term(x0_from_sample, b_x) + _term(x0_from_output, b_g)
        if NOISE != NO_NOISE:
            b_x0 += _noise_term(x0_from_noise, noise, tile, NOISE)
    b_next = tl.zeros_like(b_x)
    if FOR_NEXT:
        b_next = _term(next_from_sample, b_x) + _term(next_from_output, b_g)
    return b_x0, b_next


@triton.jit
def _clipped(b_x0, limit, THRESHOLD: tl.constexpr):
    """x0 / limit, clipped to [-1, 1]; NaN stays NaN."""
    if THRESHOLD != NO_THRESHOLD:
        if THRESHOLD != STATIC:
            b_x0 = b_x0 * tl.div_rn(1.0, limit)
        b_x0 = tl.where(b_x0 > 1.0, 1.0, b_x0)
        b_x0 = tl.where(b_x0 < -1.0, -1.0, b_x0)
    return b_x0


@triton.jit
def step(
    row,
    sample,
    output,
    unconditional,
    variance,
    previous_x0,
    noise,
    stored_x0,
    guidance,
    limit,
    following,
    x0,
    tile,
    GUIDANCE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    NOISE: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_PREVIOUS_X0: tl.constexpr,
    STORED: tl.constexpr,
    WRITE_X0: tl.constexpr,
):
    """All of the step for a tile, or, if x0 was predicted and STORED, the rest; returns x0 before the threshold."""
    _, _, for_next, for_noise = row
    _, _, next_from_x0, next_from_previous_x0 = for_next
    noise_scale, min_log_variance, max_log_variance = for_noise
    b_predicted, b_next = predicted(
        row, sample, output, unconditional, noise, guidance, tile, GUIDANCE, NOISE, FOR_X0=not STORED, FOR_NEXT=True
    )
    if STORED:
        b_predicted = read(stored_x0, tile)
    b_x0 = _clipped(b_predicted, limit, THRESHOLD)
    b_next += _term(next_from_x0, b_x0)
    if HAS_PREVIOUS_X0:
        b_next += _term(next_from_previous_x0, _read_for(next_from_previous_x0, previous_x0, tile))
    if NOISE != NO_NOISE:
        b_z = _noise_term(noise_scale, noise, tile, NOISE)
        if LEARNED:  # a log-variance between the two, where the output places it in [-1, 1]
            b_share = (_read_for(noise_scale, variance, tile) + 1.0) * 0.5
            b_half = b_share * (0.5 * max_log_variance) + (1.0 - b_share) * (0.5 * min_log_variance)
            b_z *= tl.exp(b_half)
        b_next += b_z
    write(following, tile, tl.where(limit == limit, b_next, float("nan")))  # a NaN spoils its sample
    if WRITE_X0:
        write(x0, tile, b_x0)
    return b_predicted


@triton.jit
def nans_in(b_x0, tile):
    """How many."""
    return tl.sum(tl.where(tile[3] & (b_x0 != b_x0), 1, 0))


@triton.jit
def limited(quantile, min_bits, max_bits):
    """The quantile between the two; NaN if it is NaN."""
    min_value, max_value = float64_of(min_bits).to(tl.float32), float64_of(max_bits).to(tl.float32)
    quantile = tl.where(quantile < min_value, min_value, quantile)
    return tl.where(quantile > max_value, max_value, quantile)


@triton.jit
def first_of(output, unconditional):
    """The first value of each, in float64."""
    p_c, _, _ = output
    p_u, _, _ = unconditional
    return tl.load(p_c).to(tl.float64), tl.load(p_u).to(tl.float64)


@triton.jit
def no_sums():
    """Of c, u, c c, c u and u u over no positions."""
    zero = tl.full([], 0.0, tl.float64)
    return zero, zero, zero, zero, zero


@triton.jit
def with_sums_of(sums, output, unconditional, firsts, tile):
    """Those of a tile added, in float64, of outputs less their first value: a large mean then costs no accuracy."""
    c, u, cc, cu, uu = sums
    c0, u0 = firsts
    b_c = tl.where(tile[3], read(output, tile).to(tl.float64) - c0, 0.0)
    b_u = tl.where(tile[3], read(unconditional, tile).to(tl.float64) - u0, 0.0)
    c, u = c + tl.sum(b_c), u + tl.sum(b_u)
    return c, u, cc + tl.sum(b_c * b_c), cu + tl.sum(b_c * b_u), uu + tl.sum(b_u * b_u)


@triton.jit
def guidance_by_sums(sums, firsts, size, guidance_bits, rescale_bits, PARALLEL: tl.constexpr, RESCALED: tl.constexpr):
    """multiplier and slope of the guided output, from sums over the sample; in float64, rounded at the end.

    Removal of the parallel component: guided = c + (guidance - 1) (d - k c), with d = c - u and k = <d, c> / <c, c>.
    Rescaling: guided times rescale std(c) / std(guided) + 1 - rescale. As guided is linear in c and u, its deviation
    follows from theirs.
    """
    c, u, cc, cu, uu = sums
    c0, u0 = firsts
    n = size.to(tl.float64)
    slope = float64_of(guidance_bits) - 1.0
    multiplier = tl.full([], 1.0, tl.float64)
    if PARALLEL:
        length = cc + 2.0 * c0 * c + n * c0 * c0
        overlap = cu + c0 * u + u0 * c + n * c0 * u0
        # As in the reference, a length of zero leaves the difference as it is.
        multiplier -= slope * ((length - overlap) / tl.where(length < 1e-24, 1e-24, length))
    if RESCALED:
        c_variance = (cc - c * c / n) / (n - 1.0)
        u_variance = (uu - u * u / n) / (n - 1.0)
        covariance = (cu - c * u / n) / (n - 1.0)
        from_c = multiplier + slope
        variance = from_c * from_c * c_variance + slope * slope * u_variance - 2.0 * from_c * slope * covariance
        rescale = float64_of(rescale_bits)
        factor = rescale * tl.sqrt(c_variance / variance) + (1.0 - rescale)
        multiplier *= factor
        slope *= factor
    return multiplier.to(tl.float32), slope.to(tl.float32)


@triton.jit
def joined(p_sums, splits, BLOCK_S: tl.constexpr):
    """The sums of all parts of a sample, (splits, SUMS), always in one order."""
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    return (
        tl.sum(tl.load(p_sums + o_s * SUMS, mask=m_s, other=0.0)),
        tl.sum(tl.load(p_sums + o_s * SUMS + 1, mask=m_s, other=0.0)),
        tl.sum(tl.load(p_sums + o_s * SUMS + 2, mask=m_s, other=0.0)),
        tl.sum(tl.load(p_sums + o_s * SUMS + 3, mask=m_s, other=0.0)),
        tl.sum(tl.load(p_sums + o_s * SUMS + 4, mask=m_s, other=0.0)),
    )
