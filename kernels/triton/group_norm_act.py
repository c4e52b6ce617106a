"""Triton kernels of `imagen_fast.ops.group_norm_act`: act(group_norm(x) * (1 + scale) + shift), and its gradients.

The positions of a group's channels in one sample are a slab. There are two ways, by the size of a slab:

    slab    One program per slab, which stays in its registers: x is read once.
    split   A slab's positions are split over several programs, so that one sample fills the chip. Forward: the
            statistics kernel takes each split's mean and sum of squared deviations, the apply kernel joins them.
            Backward: the sums kernel takes each split's sums, the join kernel joins them, the apply kernel gives dx.

Everything is deterministic, and a sample's result does not depend on the batch it is in: sums have one order, and how a
slab is split depends on its shape and the device alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from . import _group_norm_act_backward as _backward
from . import _group_norm_act_forward as _forward
from ._norm_parameters import modulation_arguments, parameter_gradients

CONFIGURATIONS = Configurations("group_norm_act")

# Memory moves in sectors of this many bytes: NHWC slabs with fewer bytes at a position are taken together.
_SECTOR = 32


class _Slabs(NamedTuple):
    """Sizes and strides (in elements) of x, as the kernels take them: arguments by name."""

    channels: int
    positions: int
    groups: int
    channels_per_group: int
    stride_c: int
    stride_l: int


def _slabs(x: Tensor, groups: int) -> _Slabs:
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    stride_c, stride_l = (positions, 1) if x.is_contiguous() else (1, channels)
    return _Slabs(channels, positions, groups, channels // groups, stride_c, stride_l)


def _groups_together(slabs: _Slabs, element_size: int) -> int:
    """How many groups a program takes."""
    if slabs.stride_c != 1:
        return 1
    groups = ceil_div(_SECTOR, slabs.channels_per_group * element_size)
    return groups if groups < slabs.groups else slabs.groups


class _Tile(NamedTuple):
    """One program's tile for the slab kernels, as they take it: arguments by name."""

    GROUPS: int
    BLOCK_K: int
    BLOCK_C: int
    BLOCK_L: int
    num_warps: int


def _slab_tile(kind: str, x: Tensor, slabs: _Slabs) -> _Tile | None:
    """The tile that holds a program's slabs, or None if they do not fit."""
    groups = _groups_together(slabs, x.element_size())
    block_c = power_of_two_at_least(groups * slabs.channels_per_group)
    block_l = power_of_two_at_least(slabs.positions)
    row = CONFIGURATIONS.find(kind, device_of(x), block_c * block_l)
    if row is None:
        return None
    return _Tile(groups, power_of_two_at_least(groups), block_c, block_l, row["num_warps"])


class _Split(NamedTuple):
    """How positions are split over programs: `splits` times `split_size`, taken in tiles."""

    splits: int
    split_size: int
    BLOCK_C: int
    BLOCK_L: int
    num_warps: int


def _split(kind: str, x: Tensor, slabs: _Slabs, channels_together: int) -> _Split:
    """Enough programs to fill the device with one sample, so that a result does not depend on the batch."""
    device = device_of(x)
    row = CONFIGURATIONS[kind, device]
    block_c = power_of_two_at_least(channels_together)
    if slabs.stride_c == 1:
        block_c = min(block_c, row["tile"])
        block_l = min(power_of_two_at_least(slabs.positions), row["tile"] // block_c)
    else:
        block_c = min(block_c, row["channels"])  # few: padding to a power of two then costs little
        block_l = min(power_of_two_at_least(slabs.positions), row["tile"] // block_c)
    tiles_of_channels = ceil_div(slabs.channels, channels_together)
    wanted = ceil_div(device.multiprocessors * row["programs_per_multiprocessor"], tiles_of_channels)
    tiles = ceil_div(slabs.positions, block_l)
    splits = min(wanted, tiles, row["most_splits"])
    split_size = ceil_div(tiles, splits) * block_l
    return _Split(ceil_div(slabs.positions, split_size), split_size, block_c, block_l, row["num_warps"])


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x; mean, what its rounding lost, and 1 / sqrt(var + eps), all (B, num_groups) in float32.

    x is dense NCHW or NHWC; scale and shift are (B, C); activation is a code of `_math`.
    """
    y = x.new_empty_strided(x.shape, x.stride())
    mean, mean_error, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(3))
    if x.numel() == 0:
        return y, mean.zero_(), mean_error.zero_(), rstd.zero_()
    slabs = _slabs(x, num_groups)
    common = dict(
        slabs._asdict(),
        **modulation_arguments(x, weight=weight, bias=bias, scale=scale, shift=shift),
        p_x=x,
        p_y=y,
        p_mean=mean,
        p_mean_error=mean_error,
        p_rstd=rstd,
        eps=eps,
        ACTIVATION=activation,
    )
    tile = _slab_tile("forward_slab", x, slabs)
    if tile is not None:
        grid = (x.shape[0] * ceil_div(num_groups, tile.GROUPS),)
        wrap_triton(_forward.group_norm_act_slab_kernel)[grid](**common, **tile._asdict())
        return y, mean, mean_error, rstd

    groups = _groups_together(slabs, x.element_size())
    split = _split("forward_split", x, slabs, groups * slabs.channels_per_group)
    together = {"GROUPS": groups, "BLOCK_K": power_of_two_at_least(groups)}
    split_mean, split_m2 = (x.new_empty((*mean.shape, split.splits), dtype=torch.float32) for _ in range(2))
    grid = (x.shape[0] * ceil_div(num_groups, groups) * split.splits,)
    wrap_triton(_forward.group_norm_act_statistics_kernel)[grid](
        p_x=x, p_split_mean=split_mean, p_split_m2=split_m2, **slabs._asdict(), **split._asdict(), **together
    )
    wrap_triton(_forward.group_norm_act_apply_kernel)[grid](
        p_split_mean=split_mean,
        p_split_m2=split_m2,
        **common,
        **split._asdict(),
        **together,
        BLOCK_S=power_of_two_at_least(split.splits),
    )
    return y, mean, mean_error, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    mean_error: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias, scale and shift; bit i of `needs` says whether the i-th is asked for.

    What is not asked for comes back empty. dy is dense like x; mean, mean_error and rstd are `forward`'s.
    """
    dx = x.new_empty_strided(x.shape, x.stride()) if needs & 1 else x.new_empty(0)
    sum_dt, sum_dt_xhat = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        sum_dt.zero_()
        sum_dt_xhat.zero_()
    else:
        slabs = _slabs(x, num_groups)
        inputs = dict(
            slabs._asdict(),
            **modulation_arguments(x, weight=weight, bias=bias, scale=scale, shift=shift),
            p_dy=dy,
            p_x=x,
            p_mean=mean,
            p_mean_error=mean_error,
            p_rstd=rstd,
            ACTIVATION=activation,
        )
        tile = _slab_tile("backward_slab", x, slabs)
        if tile is not None:
            grid = (x.shape[0] * ceil_div(num_groups, tile.GROUPS),)
            wrap_triton(_backward.group_norm_act_backward_slab_kernel)[grid](
                **inputs,
                p_dx=dx,
                p_sum_dt=sum_dt,
                p_sum_dt_xhat=sum_dt_xhat,
                NEEDS_X=bool(needs & 1),
                **tile._asdict(),
            )
        else:
            _split_backward(slabs, inputs, dx if needs & 1 else None, sum_dt, sum_dt_xhat)
    row = CONFIGURATIONS["parameters", device_of(x)]
    return dx, *parameter_gradients(row, sum_dt, sum_dt_xhat, weight, bias, scale, shift, needs >> 1)


def _split_backward(
    slabs: _Slabs, inputs: dict[str, Any], dx: Tensor | None, sum_dt: Tensor, sum_dt_xhat: Tensor
) -> None:
    """Writes dx (unless None), and the sums over positions."""
    x, mean = inputs["p_x"], inputs["p_mean"]
    batch = x.shape[0]
    # Blocks of channels may have parts of several groups.
    together = min(slabs.channels, CONFIGURATIONS["backward_split", device_of(x)]["channels"])
    split = _split("backward_split", x, slabs, together)
    split_dt, split_dt_xhat = (
        x.new_empty((batch, split.splits, slabs.channels), dtype=torch.float32) for _ in range(2)
    )
    grid = (batch * ceil_div(slabs.channels, split.BLOCK_C) * split.splits,)
    wrap_triton(_backward.group_norm_act_backward_sums_kernel)[grid](
        **inputs, p_split_dt=split_dt, p_split_dt_xhat=split_dt_xhat, **split._asdict()
    )

    group_dt, group_dt_xhat = (torch.empty_like(mean) for _ in range(2))
    row = CONFIGURATIONS["backward_join", device_of(x)]
    names = ("channels", "positions", "groups", "channels_per_group", "p_weight", "stride_weight", "HAS_WEIGHT")
    names += ("p_scale", "stride_scale_b", "stride_scale_c", "HAS_SCALE")
    wrap_triton(_backward.group_norm_act_backward_join_kernel)[(batch * slabs.groups,)](
        **{name: inputs[name] for name in names},
        p_split_dt=split_dt,
        p_split_dt_xhat=split_dt_xhat,
        p_sum_dt=sum_dt,
        p_sum_dt_xhat=sum_dt_xhat,
        p_group_dt=group_dt,
        p_group_dt_xhat=group_dt_xhat,
        splits=split.splits,
        BLOCK_S=min(power_of_two_at_least(split.splits), row["splits"]),
        BLOCK_C=min(power_of_two_at_least(slabs.channels_per_group), row["channels"]),
        num_warps=row["num_warps"],
    )
    if dx is not None:
        wrap_triton(_backward.group_norm_act_backward_apply_kernel)[grid](
            **inputs, p_group_dt=group_dt, p_group_dt_xhat=group_dt_xhat, p_dx=dx, **split._asdict()
        )
