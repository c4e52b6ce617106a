"""Calls of attention that are compiled for every architecture: every kind of keys and bias, every row of its launch
configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imagen_fast import RelativePositionBias, ops

BF16, FP32 = torch.bfloat16, torch.float32


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield _call(BF16, 64, queries=1024, context=77)
    yield _call(BF16, 64, queries=77, bias="table", mask=True)
    yield _call(BF16, 64, queries=64, kv_heads=1, context=2, bias="tensor", mask=True, normalised=True)
    yield _call(BF16, 128, queries=256, context=77)
    yield _call(FP32, 64, queries=77, bias="table", mask=True)
    yield _call(BF16, 256, queries=64, normalised=True, backward=False)
    for dtype in (BF16, FP32):
        yield _call(dtype, 256, queries=128, bias="table", backward=False)


def _call(
    dtype: torch.dtype,
    width: int,
    *,
    queries: int,
    heads: int = 4,
    kv_heads: int = 4,
    context: int = 0,
    bias: str | None = None,
    mask: bool = False,
    normalised: bool = False,
    backward: bool = True,
) -> tuple[str, Callable[[], Tensor]]:
    make = partial(torch.empty, dtype=dtype, requires_grad=backward)

    def packed(length: int, *heads: int) -> tuple[Tensor, ...]:
        """(2, heads, L, width) each, parts of one projection."""
        return tuple(part.transpose(1, 2) for part in make(2, length, sum(heads), width).split(heads, dim=2))

    def call() -> Tensor:
        q, k, v = packed(queries, heads, kv_heads, kv_heads)
        arguments: dict[str, Any] = {}
        if context:
            arguments["context_k"], arguments["context_v"] = packed(context, kv_heads, kv_heads)
        if bias == "table":
            arguments["bias"] = RelativePositionBias(make(32, heads))
        elif bias == "tensor":
            arguments["bias"] = make(1, heads, queries, context + queries)
        if mask:
            arguments["key_mask"] = torch.empty(2, context + queries, dtype=torch.bool)
        if normalised:
            arguments |= {"q_scale": make(width), "k_scale": make(width), "scale": 8.0}
        return ops.attention(q, k, v, **arguments)

    parts = [f"{heads} heads of {width}", f"{queries} queries", f"{kv_heads} key heads" if kv_heads != heads else ""]
    parts += [f"context {context}" if context else "", f"bias {bias}" if bias else "", "mask" if mask else ""]
    parts += ["normalised" if normalised else "", str(dtype).removeprefix("torch.")]
    return ", ".join(filter(None, parts)), call
