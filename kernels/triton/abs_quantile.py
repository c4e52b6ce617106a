"""Triton kernels of `imagen_fast.ops.abs_quantile`; `_quantile.py` has how the quantile is found.

There are two ways, by the size of a sample:

    whole   One program has it in its registers: one launch, which reads it once.
    split   Several programs share it: a launch for each of the key's three digits, and one that interpolates.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

import triton
import triton.language as tl

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from ._quantile import (
    COUNTS,
    add_above,
    add_counts,
    count,
    counted_quantile,
    first_digit,
    keys_of,
    no_counts,
    quantile,
    second_digit,
)

CONFIGURATIONS = Configurations("abs_quantile")


@triton.jit
def abs_quantile_whole_kernel(
    p_x,  # (B, size)
    p_result,  # (B,)
    size,
    stride_b,
    q_bits,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_b * stride_b + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    tl.store(p_result + i_b, quantile(keys_of(b_x, o_x < size), size, q_bits))


@triton.jit
def abs_quantile_count_kernel(
    p_x,  # (B, size)
    p_counts,  # (B, COUNTS)
    size,
    stride_b,
    splits,
    q_bits,
    DIGIT: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count one digit of the keys in every splits-th tile of a sample."""
    i_program = tl.program_id(0).to(tl.int64)
    i_b, i_split = i_program // splits, i_program % splits
    p_x += i_b * stride_b
    p_counts += i_b * COUNTS
    found = 0
    if DIGIT == 2:
        found = first_digit(p_counts, size, q_bits, i_split == 0)
    if DIGIT == 3:
        found = second_digit(p_counts, i_split == 0)
    b_count = no_counts(DIGIT)
    least = tl.full([], 0x7FFFFFFF, tl.int32)
    for i in range(i_split * BLOCK, size, splits * BLOCK):
        o_x = i + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o_x, mask=o_x < size, other=0.0).to(tl.float32)
        b_key = keys_of(b_x, o_x < size)
        b_count += count(b_key, found, DIGIT)
        if DIGIT == 3:
            least = tl.minimum(least, tl.min(tl.where(b_key > (found | 1023), b_key, 0x7FFFFFFF), axis=0))
    add_counts(p_counts, b_count, DIGIT)
    if DIGIT == 3:
        add_above(p_counts, least)


@triton.jit
def abs_quantile_finish_kernel(
    p_counts,  # (B, COUNTS)
    p_result,  # (B,)
    size,
    q_bits,
    COUNTS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    tl.store(p_result + i_b, counted_quantile(p_counts + i_b * COUNTS, size, q_bits))


def float64_bits(value: float) -> int:
    """How kernels are given a float64."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def new_counts(x: Tensor) -> Tensor:
    """A workspace for the samples of x."""
    return x.new_zeros((x.shape[0], COUNTS.value), dtype=torch.int64)


def count_digit(digit: int, x: Tensor, stride_b: int, size: int, q_bits: int, counts: Tensor) -> None:
    """Launch the count of the first, second or third digit; x is samples of `size` values at a distance of stride_b."""
    device = device_of(x)
    row = CONFIGURATIONS["split", device]
    splits = min(ceil_div(size, row["tile"]), device.multiprocessors * row["programs_per_multiprocessor"])
    wrap_triton(abs_quantile_count_kernel)[(x.shape[0] * splits,)](
        p_x=x,
        p_counts=counts,
        size=size,
        stride_b=stride_b,
        splits=splits,
        q_bits=q_bits,
        DIGIT=digit,
        COUNTS=COUNTS.value,
        BLOCK=row["tile"],
        num_warps=row["num_warps"],
    )


def forward(x: Tensor, q: float) -> Tensor:
    """(B,) in float32. The samples of x are dense, in any order of their elements, at any distance of each other."""
    result = x.new_empty(x.shape[:1], dtype=torch.float32)
    if x.numel() == 0:
        return result
    batch = x.shape[0]
    size, stride_b, q_bits = x.numel() // batch, x.stride(0), float64_bits(q)
    row = CONFIGURATIONS.find("whole", device_of(x), size)
    if row is not None:
        wrap_triton(abs_quantile_whole_kernel)[(batch,)](
            p_x=x,
            p_result=result,
            size=size,
            stride_b=stride_b,
            q_bits=q_bits,
            BLOCK=max(row["least_block"], power_of_two_at_least(size)),
            num_warps=row["num_warps"],
        )
        return result
    counts = new_counts(x)
    for digit in (1, 2, 3):
        count_digit(digit, x, stride_b, size, q_bits, counts)
    wrap_triton(abs_quantile_finish_kernel)[(batch,)](
        p_counts=counts, p_result=result, size=size, q_bits=q_bits, COUNTS=COUNTS.value, num_warps=4
    )
    return result
