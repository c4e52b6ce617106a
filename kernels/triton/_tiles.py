"""What the kernels of the sampler share: samples (C, L) in tiles of [BLOCK_C channels, BLOCK_L positions]."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl


@triton.jit
def tile_origin(channels, positions, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """The sample, first channel and first position (int64) of the program's tile; a sample's tiles are consecutive."""
    i_program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(channels, BLOCK_C) * tl.cdiv(positions, BLOCK_L)
    i_c, i_l = tile_at(i_program % tiles, positions, BLOCK_C, BLOCK_L)
    return i_program // tiles, i_c, i_l


@triton.jit
def tile_at(i_tile, positions, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """The first channel and the first position of a sample's i-th tile."""
    tiles_l = tl.cdiv(positions, BLOCK_L)
    return (i_tile // tiles_l) * BLOCK_C, (i_tile % tiles_l) * BLOCK_L


def dense_strides(x: Tensor, channels: int, positions: int) -> tuple[int, int]:
    """Of channels and positions, in a dense NCHW or NHWC tensor."""
    return (positions, 1) if x.is_contiguous() else (1, channels)
