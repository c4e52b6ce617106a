"""Calls of attention whose kernels are compiled for every architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from imagen_fast import _triton

EVERYTHING = 0b111111111


def call(
    queries: int,
    keys: int,
    *,
    context: int = 0,
    width: int = 64,
    heads: int = 8,
    kv_heads: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    bias: tuple[int, int, int, int] | None = None,
    table: bool = False,
    masked: bool = False,
    normalised: bool = False,
) -> Callable[[], None]:
    def run() -> None:
        kernels = _triton.kernels("attention")
        q = torch.empty(2, queries, heads, width, dtype=dtype, device="meta").transpose(1, 2)
        k, v = (q.new_empty(2, kv_heads, keys, width) for _ in range(2))
        segment = tuple(q.new_empty(2, kv_heads, context, width) for _ in range(2)) if context else (None, None)
        arguments = (
            q,
            k,
            v,
            *segment,
            None if bias is None else q.new_empty(bias),
            q.new_empty(32, heads) if table else None,
            q.new_empty(queries + keys - 1, dtype=torch.int32) if table else None,
            q.new_empty(2, context + keys, dtype=torch.bool) if masked else None,
            *((q.new_empty(width),) * 2 if normalised else (None, None)),
            width**-0.5,
        )
        out, lse = kernels.forward(*arguments)
        kernels.backward(out, out, lse, *arguments, EVERYTHING)

    return run


CALLS = {
    "if-pixels-and-text": call(1024, 1024, context=77),
    "if-pixels-and-text-8x8": call(64, 64, context=77),
    "imagen-pytorch": call(256, 256, context=78, kv_heads=1, normalised=True, masked=True),
    "t5": call(256, 256, heads=64, kv_heads=64, table=True, masked=True),
    "bias": call(128, 128, bias=(2, 8, 128, 128)),
    "bias-of-keys": call(128, 128, bias=(2, 1, 1, 128)),
    "bias-of-queries": call(128, 128, bias=(1, 8, 128, 1)),
    "width-128": call(333, 333, width=128, context=77),
    "width-256": call(200, 200, width=256),
    "width-40": call(200, 200, width=40, dtype=torch.float16),
    "fp32": call(200, 200, context=77, dtype=torch.float32),
    "fp32-width-256": call(200, 200, width=256, dtype=torch.float32),
}
