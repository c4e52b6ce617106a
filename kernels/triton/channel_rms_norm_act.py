"""Triton kernels of `imagen_fast.ops.channel_rms_norm_act`: act(normalize(x, 1) sqrt(C) weight (1 + scale) + shift).

Positions are independent of each other forward; backward, they meet in the sums for the parameters' gradients. There
are two ways, by the number of channels:

    tile    A tile has some positions with all their channels and stays in registers: x is read once, backward x and dy.
    loop    Channels are taken in blocks, twice: for the norm and to apply it; backward, the means kernel takes what a
            position's channels have in common, and the apply kernel the rest.

Tiles are made smaller where one sample would not fill the device otherwise, but have at least a sector of memory of
each NCHW channel. A program of the backward pass takes a split, several tiles in turn, and leaves its sums, which the
join kernel adds up.

Everything is deterministic, and a sample's result does not depend on the batch it is in: sums have one order, and how
positions are split depends on the shape of a sample and the device alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from . import _channel_rms_norm_act_backward as _backward
from . import _channel_rms_norm_act_forward as _forward
from ._norm_parameters import modulation_arguments, parameter_gradients

CONFIGURATIONS = Configurations("channel_rms_norm_act")

_SECTOR = 32  # bytes that memory moves at least


class _Sizes(NamedTuple):
    """Of x, and its strides in elements, as the kernels take them: arguments by name."""

    channels: int
    positions: int
    stride_c: int
    stride_l: int


def _sizes(x: Tensor) -> _Sizes:
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    stride_c, stride_l = (positions, 1) if x.is_contiguous() and positions > 1 else (1, channels)
    return _Sizes(channels, positions, stride_c, stride_l)


class _Tile(NamedTuple):
    """A program's tile as the kernels take it: arguments by name."""

    BLOCK_C: int
    BLOCK_L: int
    num_warps: int


def _whole_tile(kind: str, x: Tensor, sizes: _Sizes) -> _Tile | None:
    """The tile that has all channels, or None if that is too large even with the fewest positions."""
    device = device_of(x)
    block_c = power_of_two_at_least(sizes.channels)
    least = 1 if sizes.stride_c == 1 else _SECTOR // x.element_size()
    wanted = CONFIGURATIONS["tile", device]
    block_l = min(max(least, wanted["elements"] // block_c), power_of_two_at_least(sizes.positions))
    least = max(least, wanted["least_elements"] // block_c)
    while block_l > least and ceil_div(sizes.positions, block_l) < device.multiprocessors:
        block_l //= 2
    row = CONFIGURATIONS.find(kind, device, block_c * block_l)
    return None if row is None else _Tile(block_c, block_l, row["num_warps"])


def _part_of_channels(x: Tensor, sizes: _Sizes) -> _Tile:
    """The tile of the loops over channels."""
    row = CONFIGURATIONS["loop", device_of(x)]
    block_l = row["positions"] if sizes.stride_c == 1 else _SECTOR // x.element_size()
    return _Tile(min(row["elements"] // block_l, power_of_two_at_least(sizes.channels)), block_l, row["num_warps"])


class _Split(NamedTuple):
    """How a sample's positions are split over programs."""

    splits: int
    split_size: int


def _split(x: Tensor, sizes: _Sizes, tile: _Tile) -> _Split:
    """Enough programs to fill the device with one sample."""
    device = device_of(x)
    row = CONFIGURATIONS["split", device]
    tiles = ceil_div(sizes.positions, tile.BLOCK_L)
    wanted = ceil_div(
        device.multiprocessors * row["programs_per_multiprocessor"], ceil_div(sizes.channels, tile.BLOCK_C)
    )
    split_size = ceil_div(tiles, min(wanted, tiles, row["most_splits"])) * tile.BLOCK_L
    return _Split(ceil_div(sizes.positions, split_size), split_size)


def _affine(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
    arguments = modulation_arguments(x, weight=weight, scale=scale, shift=shift)
    del arguments["HAS_WEIGHT"]  # always
    return arguments


def forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    """y like x; and sqrt(C) / max(|x|, 1e-12), (B, positions) in float32.

    x is dense NCHW or NHWC; scale and shift are (B, C); activation is a code of `_math`.
    """
    y = x.new_empty_strided(x.shape, x.stride())
    positions = x[0, 0].numel() if x.numel() else 0
    rstd = x.new_empty((x.shape[0], positions), dtype=torch.float32)
    if x.numel() == 0:
        return y, rstd
    sizes = _sizes(x)
    tile = _whole_tile("forward", x, sizes)
    kernel = _forward.channel_rms_norm_act_tile_kernel
    if tile is None:
        tile = _part_of_channels(x, sizes)
        kernel = _forward.channel_rms_norm_act_loop_kernel
    wrap_triton(kernel)[(x.shape[0] * ceil_div(sizes.positions, tile.BLOCK_L),)](
        p_x=x,
        p_y=y,
        p_rstd=rstd,
        **_affine(x, weight, scale, shift),
        **sizes._asdict(),
        **tile._asdict(),
        ACTIVATION=activation,
    )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, scale and shift; bit i of `needs` says whether the i-th is asked for.

    What is not asked for comes back empty. dy is dense like x; rstd is `forward`'s.
    """
    dx = x.new_empty_strided(x.shape, x.stride()) if needs & 1 else x.new_empty(0)
    if x.numel() == 0:
        sum_dt, sum_dt_xhat = (x.new_zeros(x.shape[:2], dtype=torch.float32) for _ in range(2))
    else:
        inputs = {"p_dy": dy, "p_x": x, "p_rstd": rstd, "ACTIVATION": activation}
        inputs |= _affine(x, weight, scale, shift)
        sum_dt, sum_dt_xhat = _dx_and_sums(x, inputs, dx, needs)
    row = CONFIGURATIONS["parameters", device_of(x)]
    wanted = (needs >> 1 & 1) | (needs >> 2) << 2  # there is no bias
    dweight, _, dscale, dshift = parameter_gradients(row, sum_dt, sum_dt_xhat, weight, None, scale, shift, wanted)
    return dx, dweight, dscale, dshift


def _dx_and_sums(x: Tensor, inputs: dict[str, Any], dx: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    """Writes dx, if bit 0 of `needs` says so; S and T, (B, C), which are only written if another bit does."""
    sizes = _sizes(x)
    tile = _whole_tile("backward", x, sizes)
    kernel: Any = _backward.channel_rms_norm_act_backward_tile_kernel
    inputs = dict(inputs, **sizes._asdict())
    if tile is None:
        tile = _part_of_channels(x, sizes)
        kernel = _backward.channel_rms_norm_act_backward_apply_kernel
        inputs["p_mean"] = torch.empty_like(inputs["p_rstd"])
        if needs & 1:
            grid = (x.shape[0] * ceil_div(sizes.positions, tile.BLOCK_L),)
            wrap_triton(_backward.channel_rms_norm_act_backward_means_kernel)[grid](**inputs, **tile._asdict())
    split = _split(x, sizes, tile)
    split_dt, split_dt_xhat = (
        x.new_empty((x.shape[0], split.splits, sizes.channels), dtype=torch.float32) for _ in range(2)
    )
    wrap_triton(kernel)[(x.shape[0] * ceil_div(sizes.channels, tile.BLOCK_C) * split.splits,)](
        **inputs,
        **tile._asdict(),
        **split._asdict(),
        p_dx=dx,
        p_split_dt=split_dt,
        p_split_dt_xhat=split_dt_xhat,
        NEEDS_X=bool(needs & 1),
        NEEDS_SUMS=needs > 1,
    )
    return _join(split_dt, split_dt_xhat) if needs > 1 else (split_dt[:, 0], split_dt_xhat[:, 0])


def _join(split_dt: Tensor, split_dt_xhat: Tensor) -> tuple[Tensor, Tensor]:
    """(B, splits, C) to (B, C)"""
    batch, splits, channels = split_dt.shape
    if splits == 1:
        return split_dt.view(batch, channels), split_dt_xhat.view(batch, channels)
    row = CONFIGURATIONS["join", device_of(split_dt)]
    sum_dt, sum_dt_xhat = (split_dt.new_empty((batch, channels)) for _ in range(2))
    wrap_triton(_backward.channel_rms_norm_act_backward_join_kernel)[(batch * ceil_div(channels, row["channels"]),)](
        p_split_dt=split_dt,
        p_split_dt_xhat=split_dt_xhat,
        p_sum_dt=sum_dt,
        p_sum_dt_xhat=sum_dt_xhat,
        channels=channels,
        splits=splits,
        BLOCK_S=min(power_of_two_at_least(splits), row["splits"]),
        BLOCK_C=row["channels"],
        num_warps=row["num_warps"],
    )
    return sum_dt, sum_dt_xhat
