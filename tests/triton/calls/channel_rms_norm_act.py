"""Calls of channel_rms_norm_act that are compiled for every architecture: channels that fit a tile, and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from imagen_fast import ops

BF16, FP32 = torch.bfloat16, torch.float32
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield _call((4, 64, 8, 8), BF16, "nchw")
    yield _call((2, 128, 64, 64), FP32, "nhwc")
    yield _call((2, 512, 32, 32), BF16, "nhwc")
    yield _call((2, 1024, 16, 16), FP32, "nchw")
    yield _call((1, 2304, 8, 8), BF16, "nchw")
    yield _call((1, 4608, 8, 8), FP32, "nchw")


def _call(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> tuple[str, Callable[[], Tensor]]:
    def call() -> Tensor:
        batch, channels = shape[:2]
        make = partial(torch.empty, dtype=dtype, requires_grad=True)
        scale, shift = make(batch, 2 * channels).chunk(2, dim=1)
        x = make(shape, memory_format=LAYOUTS[layout])
        return ops.channel_rms_norm_act(x, make(channels), scale=scale, shift=shift)

    return f"{'x'.join(map(str, shape))}, silu, {str(dtype).removeprefix('torch.')}, {layout}", call
