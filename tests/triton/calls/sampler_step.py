"""Calls of sampler_step that are compiled for every architecture: each way of launching it, each source of noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from imagen_fast import ops
from imagen_fast.diffusion import DynamicThreshold, Guidance, StepTable, squaredcos_cap_v2

ALPHAS = squaredcos_cap_v2(1000)
LEARNED = StepTable.ddpm(ALPHAS, steps=10, variance="learned_range")
MULTISTEP = StepTable.dpm_solver_pp(ALPHAS, steps=10, sde=True)
BF16, FP32 = torch.bfloat16, torch.float32
PAPER, CAPPED = DynamicThreshold(0.995), DynamicThreshold(0.95, max_value=1.0)
BOTH = Guidance(5.0, 0.7, remove_parallel=True)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield _call((8, 3, 64, 64), LEARNED, FP32, "seed", 7.0, None)
    yield _call((8, 3, 64, 64), LEARNED, BF16, "noise", 7.0, "static", layout="nhwc")
    yield _call((8, 3, 64, 64), LEARNED, FP32, "seed", 7.0, PAPER)
    yield _call((8, 3, 64, 64), LEARNED, BF16, "seed", 7.0, PAPER, layout="nhwc")
    yield _call((8, 3, 64, 64), MULTISTEP, BF16, "noise", BOTH, CAPPED)
    yield _call((8, 3, 32, 32), MULTISTEP, FP32, "seed", 1.0, PAPER)
    yield _call((8, 3, 25, 25), LEARNED, FP32, "seed", 7.0, PAPER, layout="nhwc")
    yield _call((1, 3, 256, 256), LEARNED, FP32, "seed", BOTH, PAPER)
    yield _call((1, 3, 256, 256), LEARNED, BF16, "noise", 7.0, CAPPED)


def _call(
    shape: tuple[int, int, int, int],
    table: StepTable,
    dtype: torch.dtype,
    source: str,
    guidance: float | Guidance,
    threshold: str | DynamicThreshold | None,
    layout: str = "nchw",
) -> tuple[str, Callable[[], Any]]:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    batch, channels, *positions = shape

    def call() -> Any:
        def make(batch: int, channels: int) -> torch.Tensor:
            return torch.empty(batch, channels, *positions, dtype=dtype).to(memory_format=memory_format)

        unconditional, output = make(2 * batch, 2 * channels).chunk(2)
        given = {"seed": torch.arange(batch)} if source == "seed" else {"noise": make(batch, channels)}
        if table.uses("next_from_previous_x0"):
            given["previous_x0"] = make(batch, channels)
        return ops.sampler_step(
            make(batch, channels),
            output,
            table,
            3,
            unconditional_output=unconditional,
            guidance=guidance,
            threshold=threshold,
            **given,
        )

    solver = "learned variance" if table is LEARNED else "multistep"
    dtype_name = str(dtype).removeprefix("torch.")
    limit = f"{threshold.percentile}" if isinstance(threshold, DynamicThreshold) else threshold or "no threshold"
    return f"{'x'.join(map(str, shape))}, {solver}, {dtype_name}, {source}, {limit}, {layout}", call
