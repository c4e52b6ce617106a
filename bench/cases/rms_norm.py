"""Cases of `ops.rms_norm`: the norms of T5 encoders, with and without the residual, and the cost of a small call.

Peers: transformers' `T5LayerNorm` as it is written ("eager"), `F.rms_norm` ("torch"), and `torch.compile` of the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...reference.rms_norm import rms_norm as reference
from ..peers import compiled
from ..registry import Case, Direction, Peer, dtype_name, elements, random_normal

OP = "rms_norm"
BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6

# An element costs about this many flops: add, square, sum, two products.
_FLOPS_PER_ELEMENT = {"forward": 5, "backward": 12, "forward_backward": 17}


def cases() -> Iterator[Case]:
    """All of them; the name is shape-form-dtype-direction."""
    both: tuple[Direction, ...] = ("forward", "backward")
    yield from _grid((2, 128, 768), both, tags={"headline"})
    yield from _grid((4, 256, 4096), both)
    yield from _grid((1, 8, 768), both, tags={"overhead"})


def _grid(shape: tuple[int, ...], directions: Iterable[Direction], tags: Iterable[str] = ()) -> Iterator[Case]:
    for dtype, has_residual, direction in itertools.product((FP32, BF16), (True, False), tuple(directions)):
        yield _case(shape, dtype, has_residual, direction, frozenset(tags))


def _case(
    shape: tuple[int, ...], dtype: torch.dtype, has_residual: bool, direction: Direction, tags: frozenset[str]
) -> Case:
    size, form = "x".join(map(str, shape)), "residual" if has_residual else "plain"

    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        values = {
            "x": random_normal(generator, shape, dtype, mean=0.5, std=2.0),
            "weight": random_normal(generator, shape[-1:], dtype, mean=1.0, std=0.1),
        }
        if has_residual:
            values["residual"] = random_normal(generator, shape, dtype)
        return {name: value.to(device) for name, value in values.items()}

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return ops.rms_norm(x, weight, eps=EPS) if residual is None else ops.rms_norm(x, weight, residual=residual)

    def truth(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return reference(x, weight, residual=residual, eps=EPS)

    def eager(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        variance = total.to(torch.promote_types(total.dtype, torch.float32)).pow(2).mean(-1, keepdim=True)
        y = weight * (total * torch.rsqrt(variance + EPS)).to(weight.dtype)
        return y if residual is None else (y, total)

    def fused_by_torch(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        y = F.rms_norm(total, total.shape[-1:], weight, EPS)
        return y if residual is None else (y, total)

    # x, y, and the residual and the sum; x, dy, dx, and the gradient of the sum.
    moved = {"forward": 4 if has_residual else 2, "backward": 4 if has_residual else 3}
    tensors = sum(moved.values()) if direction == "forward_backward" else moved[direction]
    return Case(
        op=OP,
        name=f"{size}-{form}-{dtype_name(dtype)}-{direction}",
        title=f"{size.replace('x', '×')}, {form}",
        shape=shape,
        dtype=dtype,
        layout="rows",
        direction=direction,
        inputs=inputs,
        ours=ours,
        eager=truth,
        truth=truth,
        peers=(
            Peer("eager", {"eager": lambda case: eager}),
            Peer("torch", {"torch": lambda case: fused_by_torch}),
            compiled(eager, modes=("default",)),
        ),
        bytes=(tensors * elements(shape) + shape[-1]) * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT[direction] * elements(shape),
        differentiable=("x", "weight", *(("residual",) if has_residual else ())),
        tags=tags,
    )
