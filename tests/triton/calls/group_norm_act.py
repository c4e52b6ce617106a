"""Calls of group_norm_act that are compiled for every architecture: each row of its launch configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from imagen_fast import ops

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield _call((2, 128, 64, 64), 32, "silu", BF16, "nchw")
    for layout in LAYOUTS:
        yield _call((1, 128, 256, 256), 32, "silu", BF16, layout)
    yield _call((2, 128, 64, 64), 32, "silu", FP32, "nchw")
    yield _call((1, 128, 256, 256), 32, "silu", FP32, "nhwc")
    yield _call((2, 704, 8, 8), 32, "gelu", FP32, "nhwc")  # DeepFloyd IF: 22 channels in a group
    yield _call((2, 1408, 32, 32), 32, "gelu", BF16, "nhwc")
    yield _call((4, 64, 8, 8), 32, "gelu", FP16, "nchw")
    yield _call((4, 64, 8, 8), 32, None, BF16, "nhwc", modulated=False)


def _call(
    shape: tuple[int, int, int, int],
    groups: int,
    activation: str | None,
    dtype: torch.dtype,
    layout: str,
    modulated: bool = True,
) -> tuple[str, Callable[[], Tensor]]:
    def call() -> Tensor:
        batch, channels = shape[:2]
        x = torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout], requires_grad=True)
        if not modulated:
            return ops.group_norm_act(x, groups, activation=activation)
        make = partial(torch.empty, dtype=dtype, requires_grad=True)
        scale, shift = make(batch, 2 * channels).chunk(2, dim=1)
        return ops.group_norm_act(
            x, groups, make(channels), make(channels), scale=scale, shift=shift, activation=activation
        )

    size = "x".join(map(str, shape))
    form = f"{activation or 'no activation'}{'' if modulated else ', no parameters'}"
    return f"{size} in {groups} groups, {form}, {str(dtype).removeprefix('torch.')}, {layout}", call
