"""Calls of add_noise that are compiled for every architecture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from imagen_fast import ops

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for dtype, noise_layout in itertools.product((torch.float16, torch.bfloat16, torch.float32), LAYOUTS):
        yield (
            f"8x3x64x64, {str(dtype).removeprefix('torch.')}, noise {noise_layout}",
            partial(_call, dtype, noise_layout),
        )


def _call(dtype: torch.dtype, noise_layout: str) -> Tensor:
    make = partial(torch.empty, (8, 3, 64, 64), dtype=dtype)
    noise = make(memory_format=LAYOUTS[noise_layout])
    return ops.add_noise(make(), noise, torch.empty(1000, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
