"""Kernels of sampler_step; `sampler_step.py` says when each is launched, `_sampler_step.py` has what they do to a tile.

Several programs may share a sample: program i of `splits` takes the tiles i, i + splits, and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._quantile import add_counts, count, counted_quantile, float64_of, keys_of, no_counts, quantile
from ._sampler_step import (
    BY_SUMS,
    KNOWN,
    QUANTILE,
    SUMS,
    first_of,
    guidance_by_sums,
    joined,
    limited,
    nans_in,
    no_sums,
    predicted,
    row_of,
    step,
    tile_of,
    with_sums_of,
    write,
)


@triton.jit(do_not_specialize_on_alignment=["p_index"])
def sampler_step_whole_kernel(
    p_sample,  # (B, C, L)
    p_output,
    p_unconditional,
    p_variance,
    p_previous_x0,
    p_noise,
    p_seed,  # (B,)
    p_rows,  # (steps, columns) float64
    p_index,  # ()
    p_predicted,  # (B, C L) float32: x0 before the threshold
    p_next,  # strides of the sample
    p_x0,
    channels,
    positions,
    steps,
    stride_row,
    stride_sample_b,
    stride_sample_c,
    stride_sample_l,
    stride_output_b,
    stride_output_c,
    stride_output_l,
    stride_unconditional_b,
    stride_unconditional_c,
    stride_unconditional_l,
    stride_previous_x0_b,
    stride_previous_x0_c,
    stride_previous_x0_l,
    stride_noise_b,
    stride_noise_c,
    stride_noise_l,
    guidance_bits,
    rescale_bits,
    percentile_bits,
    min_bits,
    max_bits,
    GUIDANCE: tl.constexpr,
    PARALLEL: tl.constexpr,
    RESCALED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    NOISE: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_PREVIOUS_X0: tl.constexpr,
    WRITE_X0: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """All of a step for one sample, whose values fit a BLOCK."""
    i_b = tl.program_id(0).to(tl.int64)
    sample = (p_sample + i_b * stride_sample_b, stride_sample_c, stride_sample_l)
    output = (p_output + i_b * stride_output_b, stride_output_c, stride_output_l)
    unconditional = (p_unconditional + i_b * stride_unconditional_b, stride_unconditional_c, stride_unconditional_l)
    variance = (p_variance + i_b * stride_output_b, stride_output_c, stride_output_l)
    previous_x0 = (p_previous_x0 + i_b * stride_previous_x0_b, stride_previous_x0_c, stride_previous_x0_l)
    row = row_of(p_rows, p_index, steps, stride_row)
    noise = ((p_noise + i_b * stride_noise_b, stride_noise_c, stride_noise_l), p_seed + i_b, row[0])

    following = (p_next + i_b * stride_sample_b, stride_sample_c, stride_sample_l)
    x0 = (p_x0 + i_b * stride_sample_b, stride_sample_c, stride_sample_l)

    size = tl.cast(channels, tl.int64) * positions
    stored_x0 = (p_predicted + i_b * size, positions, 1)
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(positions, BLOCK_L)
    guidance = (1.0, float64_of(guidance_bits).to(tl.float32))
    if GUIDANCE == BY_SUMS:
        firsts = first_of(output, unconditional)
        sums = no_sums()
        for i_tile in range(0, tiles):
            tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
            sums = with_sums_of(sums, output, unconditional, firsts, tile)
        guidance = guidance_by_sums(sums, firsts, size, guidance_bits, rescale_bits, PARALLEL, RESCALED)

    limit = tl.full([], 1.0, tl.float32)
    if THRESHOLD >= KNOWN:
        nans = tl.full([], 0, tl.int32)
        for i_tile in range(0, tiles):
            tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
            b_x0, _ = predicted(
                row, sample, output, unconditional, noise, guidance, tile, GUIDANCE, NOISE, FOR_X0=True, FOR_NEXT=False
            )
            nans += nans_in(b_x0, tile)
            write(stored_x0, tile, b_x0)
        tl.debug_barrier()  # other threads will read it
        if THRESHOLD == QUANTILE:
            o_x0 = tl.arange(0, BLOCK)
            b_x0 = tl.load(p_predicted + i_b * size + o_x0, mask=o_x0 < size, other=0.0)
            limit = limited(quantile(keys_of(b_x0, o_x0 < size), size, percentile_bits), min_bits, max_bits)
        else:
            limit = tl.where(nans > 0, float("nan"), float64_of(max_bits).to(tl.float32))

    for i_tile in range(0, tiles):
        tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
        step(
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
            GUIDANCE,
            THRESHOLD,
            NOISE,
            LEARNED,
            HAS_PREVIOUS_X0,
            STORED=THRESHOLD >= KNOWN,
            WRITE_X0=WRITE_X0,
        )


@triton.jit(do_not_specialize_on_alignment=["p_index"])
def sampler_step_tiles_kernel(
    p_sample,  # (B, C, L)
    p_output,
    p_unconditional,
    p_variance,
    p_previous_x0,
    p_noise,
    p_seed,  # (B,)
    p_rows,  # (steps, columns) float64
    p_index,  # ()
    p_sums,  # (B, sum_splits, SUMS) float64
    p_predicted,  # (B, C L) float32: x0 before the threshold, where that is a quantile
    p_counts,  # (B, COUNTS)
    p_spoiled,  # (B, splits): whether there was a NaN, where the threshold is known
    p_next,  # strides of the sample
    p_x0,
    channels,
    positions,
    splits,
    sum_splits,
    steps,
    stride_row,
    stride_sample_b,
    stride_sample_c,
    stride_sample_l,
    stride_output_b,
    stride_output_c,
    stride_output_l,
    stride_unconditional_b,
    stride_unconditional_c,
    stride_unconditional_l,
    stride_previous_x0_b,
    stride_previous_x0_c,
    stride_previous_x0_l,
    stride_noise_b,
    stride_noise_c,
    stride_noise_l,
    guidance_bits,
    rescale_bits,
    percentile_bits,
    min_bits,
    max_bits,
    GUIDANCE: tl.constexpr,
    PARALLEL: tl.constexpr,
    RESCALED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    NOISE: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_PREVIOUS_X0: tl.constexpr,
    WRITE_X0: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The step for a part of a sample; where the threshold is a quantile, what is left of it once that is counted."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_split = i_program // splits, i_program % splits
    sample = (p_sample + i_b * stride_sample_b, stride_sample_c, stride_sample_l)
    output = (p_output + i_b * stride_output_b, stride_output_c, stride_output_l)
    unconditional = (p_unconditional + i_b * stride_unconditional_b, stride_unconditional_c, stride_unconditional_l)
    variance = (p_variance + i_b * stride_output_b, stride_output_c, stride_output_l)
    previous_x0 = (p_previous_x0 + i_b * stride_previous_x0_b, stride_previous_x0_c, stride_previous_x0_l)
    row = row_of(p_rows, p_index, steps, stride_row)
    noise = ((p_noise + i_b * stride_noise_b, stride_noise_c, stride_noise_l), p_seed + i_b, row[0])

    following = (p_next + i_b * stride_sample_b, stride_sample_c, stride_sample_l)
    x0 = (p_x0 + i_b * stride_sample_b, stride_sample_c, stride_sample_l)

    size = tl.cast(channels, tl.int64) * positions
    stored_x0 = (p_predicted + i_b * size, positions, 1)
    guidance = (1.0, float64_of(guidance_bits).to(tl.float32))
    if GUIDANCE == BY_SUMS:
        sums = joined(p_sums + i_b * sum_splits * SUMS, sum_splits, BLOCK_S)
        firsts = first_of(output, unconditional)
        guidance = guidance_by_sums(sums, firsts, size, guidance_bits, rescale_bits, PARALLEL, RESCALED)
    limit = tl.full([], 1.0, tl.float32)
    if THRESHOLD == QUANTILE:
        limit = limited(counted_quantile(p_counts + i_b * COUNTS, size, percentile_bits), min_bits, max_bits)
    if THRESHOLD == KNOWN:
        limit = float64_of(max_bits).to(tl.float32)

    nans = tl.full([], 0, tl.int32)
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(positions, BLOCK_L)
    for i_tile in range(i_split, tiles, splits):
        tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
        b_x0 = step(
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
            GUIDANCE,
            THRESHOLD,
            NOISE,
            LEARNED,
            HAS_PREVIOUS_X0,
            STORED=THRESHOLD == QUANTILE,
            WRITE_X0=WRITE_X0,
        )
        if THRESHOLD == KNOWN:
            nans += nans_in(b_x0, tile)
    if THRESHOLD == KNOWN:
        tl.store(p_spoiled + i_program, nans)


@triton.jit
def sampler_step_spoil_kernel(
    p_spoiled,  # (B, splits)
    p_next,  # (B, C, L)
    p_x0,
    channels,
    positions,
    splits,
    stride_sample_b,
    stride_sample_c,
    stride_sample_l,
    WRITE_X0: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """All of a sample becomes NaN if a NaN was in any part of it."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_split = i_program // splits, i_program % splits
    o_s = tl.arange(0, BLOCK_S)
    spoiled = tl.max(tl.load(p_spoiled + i_b * splits + o_s, mask=o_s < splits, other=0)) > 0
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(positions, BLOCK_L)
    if spoiled:
        b_nan = tl.full([BLOCK_C, BLOCK_L], float("nan"), tl.float32)
        for i_tile in range(i_split, tiles, splits):
            tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
            write((p_next + i_b * stride_sample_b, stride_sample_c, stride_sample_l), tile, b_nan)
            if WRITE_X0:
                write((p_x0 + i_b * stride_sample_b, stride_sample_c, stride_sample_l), tile, b_nan)


@triton.jit
def sampler_step_sums_kernel(
    p_output,  # (B, C, L)
    p_unconditional,
    p_sums,  # (B, splits, SUMS) float64
    channels,
    positions,
    splits,
    stride_output_b,
    stride_output_c,
    stride_output_l,
    stride_unconditional_b,
    stride_unconditional_c,
    stride_unconditional_l,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The sums that guidance needs, over a part of a sample."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_split = i_program // splits, i_program % splits
    output = (p_output + i_b * stride_output_b, stride_output_c, stride_output_l)
    unconditional = (p_unconditional + i_b * stride_unconditional_b, stride_unconditional_c, stride_unconditional_l)
    firsts = first_of(output, unconditional)
    sums = no_sums()
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(positions, BLOCK_L)
    for i_tile in range(i_split, tiles, splits):
        tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
        sums = with_sums_of(sums, output, unconditional, firsts, tile)
    p_sums += i_program * SUMS
    tl.store(p_sums, sums[0])
    tl.store(p_sums + 1, sums[1])
    tl.store(p_sums + 2, sums[2])
    tl.store(p_sums + 3, sums[3])
    tl.store(p_sums + 4, sums[4])


@triton.jit(do_not_specialize_on_alignment=["p_index"])
def sampler_step_predict_kernel(
    p_sample,  # (B, C, L)
    p_output,
    p_unconditional,
    p_noise,
    p_seed,  # (B,)
    p_rows,  # (steps, columns) float64
    p_index,  # ()
    p_sums,  # (B, sum_splits, SUMS) float64
    p_predicted,  # (B, C L) float32
    p_counts,  # (B, COUNTS)
    channels,
    positions,
    splits,
    sum_splits,
    steps,
    stride_row,
    stride_sample_b,
    stride_sample_c,
    stride_sample_l,
    stride_output_b,
    stride_output_c,
    stride_output_l,
    stride_unconditional_b,
    stride_unconditional_c,
    stride_unconditional_l,
    stride_noise_b,
    stride_noise_c,
    stride_noise_l,
    guidance_bits,
    rescale_bits,
    GUIDANCE: tl.constexpr,
    PARALLEL: tl.constexpr,
    RESCALED: tl.constexpr,
    NOISE: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """x0 before the threshold, over a part of a sample, and the count of its magnitudes' first digits."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_split = i_program // splits, i_program % splits
    sample = (p_sample + i_b * stride_sample_b, stride_sample_c, stride_sample_l)
    output = (p_output + i_b * stride_output_b, stride_output_c, stride_output_l)
    unconditional = (p_unconditional + i_b * stride_unconditional_b, stride_unconditional_c, stride_unconditional_l)
    row = row_of(p_rows, p_index, steps, stride_row)
    noise = ((p_noise + i_b * stride_noise_b, stride_noise_c, stride_noise_l), p_seed + i_b, row[0])
    size = tl.cast(channels, tl.int64) * positions
    guidance = (1.0, float64_of(guidance_bits).to(tl.float32))
    if GUIDANCE == BY_SUMS:
        sums = joined(p_sums + i_b * sum_splits * SUMS, sum_splits, BLOCK_S)
        firsts = first_of(output, unconditional)
        guidance = guidance_by_sums(sums, firsts, size, guidance_bits, rescale_bits, PARALLEL, RESCALED)

    b_count = no_counts(1)
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(positions, BLOCK_L)
    for i_tile in range(i_split, tiles, splits):
        tile = tile_of(i_tile, channels, positions, BLOCK_C, BLOCK_L)
        b_x0, _ = predicted(
            row, sample, output, unconditional, noise, guidance, tile, GUIDANCE, NOISE, FOR_X0=True, FOR_NEXT=False
        )
        write((p_predicted + i_b * size, positions, 1), tile, b_x0)
        b_count += count(keys_of(b_x0, tile[3]), 0, 1)
    add_counts(p_counts + i_b * COUNTS, b_count, 1)
