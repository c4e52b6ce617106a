"""A call of every op: what a test does to all of them alike. A new op adds its line to `CALLS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagen_fast import ops
from imagen_fast.diffusion import DynamicThreshold, StepTable, squaredcos_cap_v2


class Call(NamedTuple):
    """Arguments of an op, of which the first is a tensor, and whether its kernels have a backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differentiable: bool = True


def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").mul_(std).add_(mean).to(dtype)


def group_norm_act(dtype: torch.dtype, layout: str) -> Call:
    x = in_layout(normal(2, 64, 24, 24, dtype=dtype, mean=0.5), layout)
    parameters = {name: normal(2, 64, dtype=dtype, std=0.3) for name in ("scale", "shift")}
    return Call((x, 32, normal(64, dtype=dtype, mean=1.0), normal(64, dtype=dtype)), parameters)


def in_layout(x: Tensor, layout: str) -> Tensor:
    return x.to(memory_format=torch.channels_last) if layout == "nhwc" else x


def channel_rms_norm_act(dtype: torch.dtype, layout: str) -> Call:
    (x, *_), parameters, _ = group_norm_act(dtype, layout)
    return Call((x, normal(64, dtype=dtype, mean=1.0)), parameters)


def rms_norm(dtype: torch.dtype, layout: str) -> Call:
    x, residual = (normal(3, n, 96, dtype=dtype)[:, -17:] for n in (17, 19))
    return Call((x, normal(96, dtype=dtype, mean=1.0)), {"residual": residual})


def gated_gelu(dtype: torch.dtype, layout: str) -> Call:
    return Call((normal(3, 17, 96, dtype=dtype), normal(3, 17, 96, dtype=dtype, mean=0.5)), {})


def attention(dtype: torch.dtype, layout: str) -> Call:
    q, k, v = normal(2, 77, 3, 4, 64, dtype=dtype).permute(2, 0, 3, 1, 4)  # as a packed projection gives them
    context_k, context_v = normal(2, 2, 4, 13, 64, dtype=dtype)
    key_mask = torch.arange(90, device="cuda") < torch.tensor([[90], [60]], device="cuda")
    return Call((q, k, v), {"context_k": context_k, "context_v": context_v, "key_mask": key_mask})


def sampler_step(dtype: torch.dtype, layout: str) -> Call:
    table = StepTable.ddpm(squaredcos_cap_v2(100), steps=10, variance="learned_range")
    sample, noise = (in_layout(normal(2, 3, 64, 64, dtype=dtype), layout) for _ in range(2))
    output, unconditional = (in_layout(normal(2, 6, 64, 64, dtype=dtype, std=s), layout) for s in (1.0, 0.9))
    guided = {
        "unconditional_output": unconditional,
        "guidance": 5.0,
        "threshold": DynamicThreshold(0.95, max_value=1.5),
    }
    return Call((sample, output, table, 4), {**guided, "noise": noise}, differentiable=False)


def abs_quantile(dtype: torch.dtype, layout: str) -> Call:
    return Call((normal(4, 10007, dtype=dtype), 0.95), {}, differentiable=False)


def add_noise(dtype: torch.dtype, layout: str) -> Call:
    x0, noise = (in_layout(normal(2, 3, 64, 64, dtype=dtype), layout) for _ in range(2))
    timesteps = torch.tensor([3, 70], device="cuda")
    return Call((x0, noise, squaredcos_cap_v2(100).cuda(), timesteps), {}, differentiable=False)


CALLS: dict[str, Callable[[torch.dtype, str], Call]] = {
    call.__name__: call
    for call in (
        abs_quantile,
        add_noise,
        attention,
        channel_rms_norm_act,
        gated_gelu,
        group_norm_act,
        rms_norm,
        sampler_step,
    )
}


def op(name: str) -> Callable[..., Any]:
    return getattr(ops, name)
