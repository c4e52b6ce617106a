"""Calls of abs_quantile that are compiled for every architecture: each row of its launch configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imagen_fast import ops

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for size, dtype in ((2000, FP16), (4096, FP32), (12_288, FP32), (12_288, BF16), (196_608, FP32), (196_608, BF16)):
        x = torch.empty(2, size, dtype=dtype)
        yield f"2x{size}, {str(dtype).removeprefix('torch.')}", lambda x=x: ops.abs_quantile(x, 0.995)
