"""Cases of `ops.gated_gelu`: the feed-forward parts of T5 encoders, packed and in two tensors.

Peers: what transformers' `T5DenseGatedActDense` runs between its projections ("eager"), and `torch.compile` of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...reference.gated_gelu import gated_gelu as reference
from ..peers import compiled
from ..registry import Case, Direction, Peer, dtype_name, elements, random_normal

OP = "gated_gelu"
BF16, FP32 = torch.bfloat16, torch.float32

# An element costs about this many flops.
_FLOPS_PER_ELEMENT = {"forward": 20, "backward": 50, "forward_backward": 70}
# Tensors of the result's size that must be read or written: gate, value, y; gate, value, dy, dgate, dvalue.
_TENSORS_MOVED = {"forward": 3, "backward": 5, "forward_backward": 8}


def cases() -> Iterator[Case]:
    """All of them; the name is shape-form-dtype-direction."""
    both: tuple[Direction, ...] = ("forward", "backward")
    yield from _grid((2, 128, 2048), both, tags={"headline"})
    yield from _grid((4, 256, 10240), both)
    yield from _grid((1, 8, 2048), both, tags={"overhead"})


def _grid(shape: tuple[int, ...], directions: Iterable[Direction], tags: Iterable[str] = ()) -> Iterator[Case]:
    for dtype, packed, direction in itertools.product((FP32, BF16), (False, True), tuple(directions)):
        yield _case(shape, dtype, packed, direction, frozenset(tags))


def _case(shape: tuple[int, ...], dtype: torch.dtype, packed: bool, direction: Direction, tags: frozenset[str]) -> Case:
    size, form = "x".join(map(str, shape)), "packed" if packed else "two"

    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        if packed:
            return {"gate": random_normal(generator, (*shape[:-1], 2 * shape[-1]), dtype).to(device)}
        return {name: random_normal(generator, shape, dtype).to(device) for name in ("gate", "value")}

    def eager(gate: Tensor, value: Tensor | None = None) -> Tensor:
        if value is None:
            gate, value = gate.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * value

    return Case(
        op=OP,
        name=f"{size}-{form}-{dtype_name(dtype)}-{direction}",
        title=f"{size.replace('x', '×')}, {form}",
        shape=shape,
        dtype=dtype,
        layout="rows",
        direction=direction,
        inputs=inputs,
        ours=ops.gated_gelu,
        eager=reference,
        truth=reference,
        peers=(Peer("eager", {"eager": lambda case: eager}), compiled(eager, modes=("default",))),
        bytes=_TENSORS_MOVED[direction] * elements(shape) * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT[direction] * elements(shape),
        differentiable=("gate",) if packed else ("gate", "value"),
        tags=tags,
    )
