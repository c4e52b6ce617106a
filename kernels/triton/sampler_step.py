"""Triton kernels of `imagen_fast.ops.sampler_step`: the launcher, which chooses between three ways.

    tiles   Nothing is needed of a sample as a whole: one launch, in small tiles.
    whole   One program has a sample: one launch, with the sums that guidance needs, and the quantile or the search for
            NaN of a dynamic threshold, in it.
    split   Several programs share a sample: after a launch for the sums, if any, one predicts x0 and counts the first
            digit of the magnitudes' keys, two count the others (`_quantile.py`), and one finds the quantile and does
            the rest. If the quantile is of no consequence, because the threshold has no range, the tiles do all, and a
            second launch spoils the samples in which there was a NaN.

Everything is deterministic, and a sample's result does not depend on its batch: how it is cut depends on its shape and
the device alone, sums have one order, and counts are integers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from . import _sampler_step_kernels as _kernels
from ._quantile import COUNTS
from ._sampler_step import (
    BY_SUMS,
    KNOWN,
    NO_GUIDANCE,
    NO_NOISE,
    NO_THRESHOLD,
    PLAIN,
    QUANTILE,
    SEED,
    SEED_BY_FOURS,
    STATIC,
    SUMS,
    TENSOR,
)
from .abs_quantile import count_digit, float64_bits, new_counts

CONFIGURATIONS = Configurations("sampler_step")

_DYNAMIC = 2  # the operator's code


class _Size(NamedTuple):
    """Of a sample; where every tensor has it in one row, all of it is one channel."""

    channels: int
    positions: int
    is_row: bool


def _size(sample: Tensor, *others: Tensor | None) -> _Size:
    channels, positions = sample.shape[1], math.prod(sample.shape[2:])
    if all(x is None or _is_row(x, channels, positions) for x in (sample, *others)):
        return _Size(1, channels * positions, is_row=True)
    return _Size(channels, positions, is_row=False)


def _is_row(x: Tensor, channels: int, positions: int) -> bool:
    stride_c, stride_l = x.stride(1), _position_stride(x)
    return (channels == 1 or stride_c == positions) and (positions == 1 or stride_l == 1)


def _position_stride(x: Tensor) -> int:
    """The distance of positions; there is one."""
    return next((stride for size, stride in zip(x.shape[:1:-1], x.stride()[:1:-1], strict=True) if size != 1), 1)


def _tensor(name: str, x: Tensor | None, size: _Size, absent: Tensor) -> dict[str, Any]:
    """The arguments that stand for a tensor, or for none."""
    if x is None:
        return {f"p_{name}": absent} | {f"stride_{name}_{dimension}": 0 for dimension in "bcl"}
    stride_c, stride_l = (0, 1) if size.is_row else (x.stride(1), _position_stride(x))
    return {
        f"p_{name}": x,
        f"stride_{name}_b": x.stride(0),
        f"stride_{name}_c": stride_c,
        f"stride_{name}_l": stride_l,
    }


def _launch(kernel: Any, programs: int, *arguments: dict[str, Any], num_warps: int) -> None:
    """With those of the arguments that the kernel takes."""
    everything: dict[str, Any] = {}
    for some in arguments:
        everything |= some
    taken = {name: everything[name] for name in kernel.arg_names}
    wrap_triton(kernel)[(programs,)](**taken, num_warps=num_warps)


def _tile(size: _Size, most: int, most_channels: int) -> dict[str, Any]:
    """A tile of at most `most` elements and, with several channels, at most `most_channels` of them."""
    block_c = min(power_of_two_at_least(size.channels), most_channels)
    return {"BLOCK_C": block_c, "BLOCK_L": min(max(power_of_two_at_least(size.positions), 32), most // block_c)}


class _Split(NamedTuple):
    """How the programs of a sample share it."""

    splits: int
    BLOCK_C: int
    BLOCK_L: int


def _split(sample: Tensor, size: _Size) -> _Split:
    """Enough programs to fill the device with one sample, so that a result does not depend on the batch."""
    device = device_of(sample)
    row = CONFIGURATIONS["split", device]
    tile = _tile(size, row["tile"], row["channels"])
    tiles = ceil_div(size.channels, tile["BLOCK_C"]) * ceil_div(size.positions, tile["BLOCK_L"])
    splits = min(tiles, device.multiprocessors * row["programs_per_multiprocessor"], row["most_splits"])
    return _Split(splits, **tile)


def forward(
    sample: Tensor,
    output: Tensor,
    unconditional_output: Tensor | None,
    previous_x0: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: Tensor,
    index: Tensor,
    learned_variance: bool,
    guidance: float,
    rescale: float,
    remove_parallel: bool,
    threshold: int,
    percentile: float,
    min_value: float,
    max_value: float,
    write_x0: bool,
) -> tuple[Tensor, Tensor]:
    """The next sample, and x0 or nothing; arguments as `imagen_fast/ops/_sampler_step_operators.py` has them."""
    following = sample.new_empty_strided(sample.shape, sample.stride())
    x0 = sample.new_empty_strided(sample.shape, sample.stride()) if write_x0 else sample.new_empty(0)
    if sample.numel() == 0:
        return following, x0
    size = _size(sample, output, unconditional_output, previous_x0, noise)
    by_sums = unconditional_output is not None and (rescale != 0 or remove_parallel)
    step = dict(
        size._asdict(),
        **_tensor("sample", sample, size, sample),
        **_tensor("output", output, size, sample),
        **_tensor("unconditional", unconditional_output, size, sample),
        **_tensor("previous_x0", previous_x0, size, sample),
        **_tensor("noise", noise, size, sample),
        p_variance=output[:, sample.shape[1] :] if learned_variance else output,
        p_seed=sample if seed is None else seed,
        p_rows=rows,
        p_index=index,
        p_next=following,
        p_x0=x0 if write_x0 else following,
        steps=rows.shape[0],
        stride_row=rows.stride(0),
        guidance_bits=float64_bits(guidance),
        rescale_bits=float64_bits(rescale),
        percentile_bits=float64_bits(percentile),
        min_bits=float64_bits(min_value),
        max_bits=float64_bits(max_value),
        GUIDANCE=_code(NO_GUIDANCE if unconditional_output is None else BY_SUMS if by_sums else PLAIN),
        PARALLEL=remove_parallel,
        RESCALED=rescale != 0,
        THRESHOLD=_threshold(threshold, min_value < max_value),
        NOISE=_noise(noise, seed, size),
        LEARNED=learned_variance,
        HAS_PREVIOUS_X0=previous_x0 is not None,
        WRITE_X0=write_x0,
        COUNTS=COUNTS.value,
    )
    if (by_sums or threshold == _DYNAMIC) and not _launch_whole(sample, size, step):
        _launch_split(sample, size, step)
    elif not by_sums and threshold != _DYNAMIC:
        _launch_tiles(sample, size, step)
    return following, x0


def _code(constant: Any) -> int:
    return int(constant.value)


def _threshold(threshold: int, has_range: bool) -> int:
    if threshold == _DYNAMIC:
        return _code(QUANTILE if has_range else KNOWN)
    return _code(STATIC if threshold else NO_THRESHOLD)


def _noise(noise: Tensor | None, seed: Tensor | None, size: _Size) -> int:
    if noise is not None:
        return _code(TENSOR)
    if seed is None:
        return _code(NO_NOISE)
    return _code(SEED_BY_FOURS if size.channels == 1 or size.positions % 4 == 0 else SEED)


def _launch_whole(sample: Tensor, size: _Size, step: dict[str, Any]) -> bool:
    """If a sample fits one program."""
    elements = size.channels * size.positions
    row = CONFIGURATIONS.find("whole", device_of(sample), elements)
    if row is None:
        return False
    stored = step["THRESHOLD"] >= KNOWN.value
    own = _tile(size, row["tile"], row["channels"])
    own["BLOCK"] = max(row["tile"], power_of_two_at_least(elements))
    predicted = sample.new_empty((sample.shape[0], elements), dtype=torch.float32) if stored else sample
    own["p_predicted"] = predicted
    _launch(_kernels.sampler_step_whole_kernel, sample.shape[0], step, own, num_warps=row["num_warps"])
    return True


# What a kernel is given in place of a workspace that it does not use
def _no_workspaces(sample: Tensor) -> dict[str, Any]:
    names = ("p_sums", "p_predicted", "p_counts", "p_spoiled")
    return dict.fromkeys(names, sample) | {"sum_splits": 1, "BLOCK_S": 1}


def _launch_tiles(sample: Tensor, size: _Size, step: dict[str, Any]) -> None:
    row = CONFIGURATIONS["tiles", device_of(sample)]
    tile = _tile(size, row["tile"], row["channels"])
    splits = ceil_div(size.channels, tile["BLOCK_C"]) * ceil_div(size.positions, tile["BLOCK_L"])
    _launch(
        _kernels.sampler_step_tiles_kernel,
        sample.shape[0] * splits,
        step,
        tile,
        _no_workspaces(sample),
        {"splits": splits},
        num_warps=row["num_warps"],
    )


def _launch_split(sample: Tensor, size: _Size, step: dict[str, Any]) -> None:
    batch, elements = sample.shape[0], size.channels * size.positions
    split = _split(sample, size)
    num_warps = CONFIGURATIONS["split", device_of(sample)]["num_warps"]
    step = step | _no_workspaces(sample) | split._asdict()
    step |= {"sum_splits": split.splits, "BLOCK_S": power_of_two_at_least(split.splits)}
    programs = batch * split.splits
    if step["GUIDANCE"] == BY_SUMS.value:
        step["p_sums"] = sample.new_empty((batch, split.splits, SUMS.value), dtype=torch.float64)
        _launch(_kernels.sampler_step_sums_kernel, programs, step, num_warps=num_warps)
    if step["THRESHOLD"] == QUANTILE.value:
        step["p_predicted"] = predicted = sample.new_empty((batch, elements), dtype=torch.float32)
        step["p_counts"] = counts = new_counts(sample)
        _launch(_kernels.sampler_step_predict_kernel, programs, step, num_warps=num_warps)
        for digit in (2, 3):
            count_digit(digit, predicted, elements, elements, step["percentile_bits"], counts)
    if step["THRESHOLD"] == KNOWN.value:
        step["p_spoiled"] = sample.new_empty((batch, split.splits), dtype=torch.int32)
    _launch(_kernels.sampler_step_tiles_kernel, programs, step, num_warps=num_warps)
    if step["THRESHOLD"] == KNOWN.value:
        _launch(_kernels.sampler_step_spoil_kernel, programs, step, num_warps=num_warps)
