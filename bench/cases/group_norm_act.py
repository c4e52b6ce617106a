"""Cases of `ops.group_norm_act`: the sizes of Imagen's and DeepFloyd IF's U-Nets, and the cost of a small call.

Peers: what a model written in PyTorch runs ("eager"), the same with its multiply-add in one kernel and its SiLU in
place ("addcmul": as far as one gets without writing a kernel), and `torch.compile` of the first ("compile").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...reference.group_norm_act import ACTIVATIONS
from ...reference.group_norm_act import group_norm_act as reference
from ..peers import compiled
from ..registry import Case, Direction, Peer, dtype_name, elements, random_normal

OP = "group_norm_act"
GROUPS = 32
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FORWARD: tuple[Direction, ...] = ("forward",)
BOTH: tuple[Direction, ...] = ("forward", "backward")

# A (sample, channel, position) costs about this many flops: mean, variance, normalise, scale-shift, activation.
_FLOPS_PER_ELEMENT = {"forward": 20, "backward": 40, "forward_backward": 60}
# Tensors of x's size that must be read or written: x, y; x, dy, dx; and both after each other.
_TENSORS_MOVED = {"forward": 2, "backward": 3, "forward_backward": 5}


def cases() -> Iterator[Case]:
    """All of them; the name is shape-form-dtype-layout-direction."""
    every, common = (FP32, BF16, FP16), (FP32, BF16)
    headline = {"headline"}
    yield from _grid((2, 128, 64, 64), "silu", every, BOTH, tags=headline)
    yield from _grid((2, 128, 64, 64), "silu", common, ("forward_backward",))
    yield from _grid((2, 128, 64, 64), "silu", common, FORWARD, scale_shift=False)
    yield from _grid((2, 128, 64, 64), "gelu", common, BOTH)
    yield from _grid((4, 64, 8, 8), "silu", common, BOTH, tags={"overhead"})
    yield from _grid((2, 512, 64, 64), "silu", common, BOTH)
    yield from _grid((1, 128, 256, 256), "silu", common, BOTH)
    # DeepFloyd IF: widths whose channels per group are no power of two, and gelu.
    yield from _grid((2, 704, 64, 64), "gelu", common, BOTH)
    for shape in ((2, 1408, 32, 32), (2, 2112, 16, 16), (2, 2816, 8, 8)):
        yield from _grid(shape, "gelu", (BF16,), FORWARD)


def _grid(
    shape: tuple[int, int, int, int],
    activation: str,
    dtypes: Iterable[torch.dtype],
    directions: Iterable[Direction],
    scale_shift: bool = True,
    tags: Iterable[str] = (),
) -> Iterator[Case]:
    for dtype, layout, direction in itertools.product(dtypes, ("nchw", "nhwc"), directions):
        yield _case(shape, activation, dtype, layout, direction, scale_shift, frozenset(tags))


def _case(
    shape: tuple[int, int, int, int],
    activation: str,
    dtype: torch.dtype,
    layout: str,
    direction: Direction,
    scale_shift: bool,
    tags: frozenset[str],
) -> Case:
    size = "x".join(map(str, shape))
    form = f"scale_shift-{activation}" if scale_shift else activation
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    parameters = ("weight", "bias", "scale", "shift") if scale_shift else ("weight", "bias")

    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        batch, channels = shape[:2]
        values = {
            "x": random_normal(generator, shape, dtype, mean=0.5, std=2.0).to(memory_format=memory_format),
            "weight": random_normal(generator, (channels,), dtype, mean=1.0, std=0.1),
            "bias": random_normal(generator, (channels,), dtype, std=0.1),
        }
        if scale_shift:
            # Two halves of one projection, as they come out of a time embedding.
            projection = random_normal(generator, (batch, 2 * channels), dtype, std=0.3)
            values["scale"], values["shift"] = projection.chunk(2, dim=1)
        return {name: value.to(device) for name, value in values.items()}

    def ours(
        x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_act(x, GROUPS, weight, bias, scale=scale, shift=shift, activation=activation)

    def truth(
        x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return reference(x, GROUPS, weight, bias, scale=scale, shift=shift, activation=activation)

    act = ACTIVATIONS[activation]

    def eager(
        x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        h = F.group_norm(x, GROUPS, weight, bias)
        if scale is not None and shift is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return act(h)

    def addcmul(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = F.group_norm(x, GROUPS, weight, bias)
        h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
        if activation == "silu" and not torch.is_grad_enabled():
            return F.silu(h, inplace=True)
        return act(h)

    peers = [Peer("eager", {"eager": lambda case: eager}), compiled(eager)]
    if scale_shift:
        peers.insert(1, Peer("addcmul", {"addcmul": lambda case: addcmul}))
    total, channels = elements(shape), elements(shape[:2])
    moved = _TENSORS_MOVED[direction] * total + (2 * shape[1] + (2 * channels if scale_shift else 0))
    return Case(
        op=OP,
        name=f"{size}-{form}-{dtype_name(dtype)}-{layout}-{direction}",
        title=f"{size.replace('x', '×')}, {'scale-shift, ' if scale_shift else ''}{activation}",
        shape=shape,
        dtype=dtype,
        layout=layout,
        direction=direction,
        inputs=inputs,
        ours=ours,
        eager=truth,  # the same function in the case's dtype: accurate in both layouts, so the stricter yardstick
        truth=truth,
        peers=tuple(peers),
        bytes=moved * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT[direction] * total,
        differentiable=("x", *parameters),
        tags=tags,
    )
