"""Cases of `ops.add_noise`: a training batch, and the low-resolution pictures that a cascade conditions on.

Peers: what diffusers' schedulers do ("eager"), and `torch.compile` of it ("compile").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...diffusion import squaredcos_cap_v2
from ...reference.add_noise import add_noise as reference
from ..peers import compiled
from ..registry import Case, Peer, dtype_name, elements, random_normal

OP = "add_noise"
STEPS = 1000

_FLOPS_PER_ELEMENT = 3


def cases() -> Iterator[Case]:
    """All of them; the name is shape-dtype-layout."""
    yield _case((2, 3, 64, 64), torch.float32, "nchw", frozenset({"overhead"}))
    yield _case((32, 3, 64, 64), torch.float32, "nchw", frozenset({"headline"}))
    yield _case((32, 3, 64, 64), torch.bfloat16, "nchw")
    yield _case((8, 3, 256, 256), torch.float32, "nchw", frozenset({"headline"}))
    yield _case((8, 3, 256, 256), torch.float32, "nhwc")


def eager(x0: Tensor, noise: Tensor, alphas: Tensor, timesteps: Tensor) -> Tensor:
    alphas = alphas.to(x0.dtype)
    signal = alphas[timesteps].sqrt().flatten()[:, None, None, None]
    deviation = (1 - alphas[timesteps]).sqrt().flatten()[:, None, None, None]
    return signal * x0 + deviation * noise


def _case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, tags: frozenset[str] = frozenset()
) -> Case:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        x0, noise = (random_normal(generator, shape, dtype).to(device, memory_format=memory_format) for _ in range(2))
        timesteps = torch.randint(STEPS, shape[:1], generator=generator).to(device)
        return {"x0": x0, "noise": noise, "alphas": squaredcos_cap_v2(STEPS).to(device), "timesteps": timesteps}

    def ours(x0: Tensor, noise: Tensor, alphas: Tensor, timesteps: Tensor) -> Tensor:
        return ops.add_noise(x0, noise, alphas, timesteps)

    def truth(x0: Tensor, noise: Tensor, alphas: Tensor, timesteps: Tensor) -> Tensor:
        return reference(x0, noise, alphas, timesteps)

    size = "x".join(map(str, shape))
    return Case(
        op=OP,
        name=f"{size}-{dtype_name(dtype)}-{layout}",
        title=size.replace("x", "×"),
        shape=shape,
        dtype=dtype,
        layout=layout,
        direction="forward",
        inputs=inputs,
        ours=ours,
        eager=truth,
        truth=truth,
        peers=(Peer("eager", {"eager": lambda case: eager}), compiled(eager, modes=("default",))),
        bytes=3 * elements(shape) * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT * elements(shape),
        tags=tags,
    )
