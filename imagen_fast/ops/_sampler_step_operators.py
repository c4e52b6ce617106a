"""The operators behind `ops.sampler_step`: one for every backend that has a kernel, all of the same signature.

    sampler_step_<backend>(sample, output, unconditional_output, previous_x0, noise, seed, rows, index,
                           learned_variance, guidance, rescale, remove_parallel, threshold, percentile, min_value,
                           max_value, write_x0) -> (next, x0)

    sample        (B, C, positions...) of rank 2 or more, dense NCHW or NHWC
    output        (B, C or more, positions...) of sample's dtype: the first C channels are the prediction and, with
                  learned_variance, the next C the variance; the others are ignored
    unconditional_output, previous_x0, noise
                  (B, C or more, positions...), or None
                  Their positions, and output's, lie at one distance from each other; strides of batch and channels are
                  any, 0 among them.
    seed          (B,) int64, contiguous, or None; not beside a noise
    rows          (steps, columns or more) float64, the stride of columns is 1: the table, in the order of
                  `diffusion.step_table.COLUMNS`
    index         0-d int64, on sample's device. Out of range it makes next and x0 NaN.
    guidance      where there is an unconditional_output: see `Guidance`
    threshold     0 none, 1 static, 2 dynamic; max_value inf for none
    next, x0      of sample's dtype, sizes and strides; x0 of size (0,) unless write_x0

A term whose coefficient is exactly 0 is left out, so that inf and NaN there do not matter. Everything is in float32
(float64 for float64) and rounded once, at the store; the quantile is of x0 before it is rounded. Sums over a sample are
in float64 or as accurate, in an order that depends on its shape alone. Noise from a seed: `reference/philox.py`, with
the index as row and stage 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton

SCHEMA = (
    "(Tensor sample, Tensor output, Tensor? unconditional_output, Tensor? previous_x0, Tensor? noise, Tensor? seed, "
    "Tensor rows, Tensor index, bool learned_variance, float guidance, float rescale, bool remove_parallel, "
    "int threshold, float percentile, float min_value, float max_value, bool write_x0) -> (Tensor next, Tensor x0)"
)
BACKENDS = ("cpu", "cuda")

_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake(sample: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    write_x0 = arguments[-1]
    following, x0 = (sample.new_empty_strided(sample.shape, sample.stride()) for _ in range(2))
    return following, x0 if write_x0 else sample.new_empty(0)


for _backend in BACKENDS:
    _LIBRARY.define(f"sampler_step_{_backend}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"imagen_fast::sampler_step_{_backend}", _fake, lib=_LIBRARY)


@_triton.once
def define_triton() -> None:
    _triton.define("sampler_step_triton", _triton.kernels("sampler_step").forward, fake=_fake)


# For tests: the words (counters, 4) int32 and the normals (counters, 4) float32 of a stream's counters; and who selects
# the quantile of a sample's x0, see csrc/sampler_step/cuda.cu
_STREAM = "int row, int stage, int first_counter, int counters) -> (Tensor words, Tensor normals)"
_LIBRARY.define(f"_philox_cpu(int seed, {_STREAM}")
_LIBRARY.define(f"_philox_cuda(Tensor seed, {_STREAM}")
_LIBRARY.define("_sampler_step_cuda_plan(Tensor sample) -> int[]")


def operator(backend: str) -> Any:
    return getattr(torch.ops.imagen_fast, f"sampler_step_{backend}").default
