"""Cases of `ops.sampler_step`: a step of DDPM as DeepFloyd IF takes it, with guidance, learned variance and threshold.

Peers: what a pipeline of diffusers runs ("eager", with `torch.quantile`), the same with a quantile by two calls of
`kthvalue` ("kthvalue": what a careful user would write), and `torch.compile` of the first ("compile"). All are given
the noise. The cases named "plain" have no dynamic threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...diffusion import DynamicThreshold, StepTable, squaredcos_cap_v2
from ...reference.sampler_step import sampler_step as reference
from ..peers import compiled
from ..registry import Case, Peer, dtype_name, elements, random_normal

OP = "sampler_step"
BF16, FP32 = torch.bfloat16, torch.float32
TABLE = StepTable.ddpm(squaredcos_cap_v2(1000), steps=100, variance="learned_range")
INDEX = 60
GUIDANCE = 7.0
THRESHOLD = DynamicThreshold(0.95, max_value=1.5)

_FLOPS_PER_ELEMENT = 40  # guidance, x0, threshold, update, and the exponential of the variance


def cases() -> Iterator[Case]:
    """All of them; the name is shape-form-dtype-layout."""
    headline = frozenset({"headline"})
    yield _case((2, 3, 64, 64), FP32, "nchw", tags=headline | {"overhead"})
    yield _case((2, 3, 256, 256), FP32, "nchw", tags=headline)
    yield _case((2, 3, 1024, 1024), FP32, "nchw", tags=headline)
    yield _case((1, 3, 1024, 1024), FP32, "nchw")
    yield _case((2, 3, 256, 256), BF16, "nchw")
    yield _case((2, 3, 256, 256), FP32, "nhwc")
    yield _case((2, 3, 64, 64), FP32, "nchw", threshold=None)
    yield _case((2, 3, 256, 256), FP32, "nchw", threshold=None)


def quantile(x: Tensor, q: float) -> Tensor:
    """(B,), as diffusers takes it."""
    return torch.quantile(x, q, dim=1)


def kthvalue_quantile(x: Tensor, q: float) -> Tensor:
    """(B,), by two selections instead of a sort."""
    place = q * (x.shape[1] - 1)
    rank = int(place)
    lower, upper = (x.kthvalue(k, dim=1).values for k in (rank + 1, min(rank + 2, x.shape[1])))
    return torch.lerp(lower, upper, place - rank)


def _case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: str,
    threshold: DynamicThreshold | None = THRESHOLD,
    tags: frozenset[str] = frozenset(),
) -> Case:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    batch, channels, *positions = shape

    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        def image(count: int, width: int) -> Tensor:
            x = random_normal(generator, (count, width, *positions), dtype)
            return x.to(device, memory_format=memory_format)

        # One batch of the model, as guidance has it: without the text, with the text
        unconditional, conditional = image(2 * batch, 2 * channels).chunk(2)
        sample, noise = image(batch, channels), image(batch, channels)
        return {"sample": sample, "output": conditional, "unconditional": unconditional, "noise": noise}

    def ours(sample: Tensor, output: Tensor, unconditional: Tensor, noise: Tensor) -> Tensor:
        return ops.sampler_step(
            sample,
            output,
            TABLE,
            INDEX,
            unconditional_output=unconditional,
            guidance=GUIDANCE,
            threshold=threshold,
            noise=noise,
        )[0]

    def truth(sample: Tensor, output: Tensor, unconditional: Tensor, noise: Tensor) -> Tensor:
        return reference(
            sample,
            output,
            TABLE,
            INDEX,
            unconditional_output=unconditional,
            guidance=GUIDANCE,
            threshold=threshold,
            noise=noise,
        )[0]

    size = "x".join(map(str, shape))
    form = "plain" if threshold is None else "dynamic"
    eager = _eager(threshold, quantile)
    peers = [Peer("eager", {"eager": lambda case: eager})]
    if threshold is not None:
        kthvalue = _eager(threshold, kthvalue_quantile)
        peers.append(Peer("kthvalue", {"kthvalue": lambda case: kthvalue}))
    peers.append(compiled(eager, modes=("default",)))
    total = elements(shape)
    return Case(
        op=OP,
        name=f"{size}-{form}-{dtype_name(dtype)}-{layout}",
        title=f"{size.replace('x', '×')}, {'dynamic threshold' if threshold else 'no threshold'}",
        shape=shape,
        dtype=dtype,
        layout=layout,
        direction="forward",
        inputs=inputs,
        ours=ours,
        eager=truth,
        truth=truth,
        peers=tuple(peers),
        # sample, prediction, variance, unconditional prediction and noise are read, the next sample is written
        bytes=6 * total * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT * total,
        tags=tags,
    )


def _eager(
    threshold: DynamicThreshold | None, take_quantile: Callable[[Tensor, float], Tensor]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What the pipeline and `DDPMScheduler.step` of diffusers do, operation by operation."""
    row = TABLE.row(INDEX)

    def step(sample: Tensor, output: Tensor, unconditional: Tensor, noise: Tensor) -> Tensor:
        channels = sample.shape[1]
        text, variance = output.split(channels, dim=1)
        without, _ = unconditional.split(channels, dim=1)
        prediction = without + GUIDANCE * (text - without)
        x0 = row["x0_from_sample"] * sample + row["x0_from_output"] * prediction
        if threshold is not None:
            wide = x0.float() if x0.dtype != torch.float64 else x0
            flat = wide.reshape(len(x0), -1)
            s = take_quantile(flat.abs(), threshold.percentile)
            s = s.clamp(threshold.min_value, threshold.max_value)[:, None]
            x0 = (torch.clamp(flat, -s, s) / s).reshape(x0.shape).to(x0.dtype)
        following = row["next_from_x0"] * x0 + row["next_from_sample"] * sample
        share = (variance + 1) / 2
        log_variance = share * row["max_log_variance"] + (1 - share) * row["min_log_variance"]
        return following + torch.exp(0.5 * log_variance) * noise

    return step
