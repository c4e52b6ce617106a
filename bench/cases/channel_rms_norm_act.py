"""Cases of `ops.channel_rms_norm_act`: the sizes of imagen-pytorch's U-Nets, and the cost of a small call.

Peers: what `Block` of imagen-pytorch 2 runs ("eager"), and `torch.compile` of it ("compile").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...reference.channel_rms_norm_act import channel_rms_norm_act as reference
from ..peers import compiled
from ..registry import Case, Direction, Peer, dtype_name, elements, random_normal

OP = "channel_rms_norm_act"
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FORWARD: tuple[Direction, ...] = ("forward",)
BOTH: tuple[Direction, ...] = ("forward", "backward")

# A (sample, channel, position) costs about this many flops: square, sum, normalise, scale-shift, activation.
_FLOPS_PER_ELEMENT = {"forward": 16, "backward": 36, "forward_backward": 52}
# Tensors of x's size that must be read or written: x, y; x, dy, dx; and both after each other.
_TENSORS_MOVED = {"forward": 2, "backward": 3, "forward_backward": 5}


def cases() -> Iterator[Case]:
    """All of them; the name is shape-form-dtype-layout-direction."""
    every, common = (FP32, BF16, FP16), (FP32, BF16)
    yield from _grid((2, 128, 64, 64), every, BOTH, tags={"headline"})
    yield from _grid((2, 128, 64, 64), common, ("forward_backward",))
    yield from _grid((2, 128, 64, 64), common, FORWARD, scale_shift=False)
    yield from _grid((4, 64, 8, 8), common, BOTH, tags={"overhead"})
    yield from _grid((2, 512, 64, 64), common, BOTH)
    yield from _grid((1, 128, 256, 256), common, BOTH)
    yield from _grid((2, 1024, 16, 16), (BF16,), FORWARD)


def _grid(
    shape: tuple[int, int, int, int],
    dtypes: Iterable[torch.dtype],
    directions: Iterable[Direction],
    scale_shift: bool = True,
    tags: Iterable[str] = (),
) -> Iterator[Case]:
    for dtype, layout, direction in itertools.product(dtypes, ("nchw", "nhwc"), directions):
        yield _case(shape, dtype, layout, direction, scale_shift, frozenset(tags))


def _case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: str,
    direction: Direction,
    scale_shift: bool,
    tags: frozenset[str],
) -> Case:
    size = "x".join(map(str, shape))
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    batch, channels = shape[:2]

    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        values = {
            "x": random_normal(generator, shape, dtype, mean=0.5, std=2.0).to(memory_format=memory_format),
            "weight": random_normal(generator, (channels,), dtype, mean=1.0, std=0.1),
        }
        if scale_shift:
            # Two halves of one projection, as they come out of a time embedding.
            projection = random_normal(generator, (batch, 2 * channels), dtype, std=0.3)
            values["scale"], values["shift"] = projection.chunk(2, dim=1)
        return {name: value.to(device) for name, value in values.items()}

    def eager(x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = F.normalize(x, dim=1) * channels**0.5 * weight[:, None, None]
        if scale is not None and shift is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(h)

    moved = _TENSORS_MOVED[direction] * elements(shape) + channels + (2 * batch * channels if scale_shift else 0)
    return Case(
        op=OP,
        name=f"{size}-{'scale_shift-silu' if scale_shift else 'silu'}-{dtype_name(dtype)}-{layout}-{direction}",
        title=f"{size.replace('x', '×')}, {'scale-shift, ' if scale_shift else ''}silu",
        shape=shape,
        dtype=dtype,
        layout=layout,
        direction=direction,
        inputs=inputs,
        ours=ops.channel_rms_norm_act,
        eager=reference,  # the same function in the case's dtype
        truth=reference,
        peers=(Peer("eager", {"eager": lambda case: eager}), compiled(eager)),
        bytes=moved * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT[direction] * elements(shape),
        differentiable=("x", "weight", *(("scale", "shift") if scale_shift else ())),
        tags=tags,
    )
