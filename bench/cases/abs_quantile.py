"""Cases of `ops.abs_quantile`: pictures of Imagen's three sizes, two samples at a time.

Peers: `torch.quantile` ("eager"), two calls of `kthvalue` ("kthvalue"), `numpy.sort` alone, without even the
interpolation ("numpy-sort"), and `torch.compile` of the first ("compile").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...reference.abs_quantile import abs_quantile as reference
from ..peers import compiled
from ..registry import Case, Peer, dtype_name, elements, random_normal
from .sampler_step import kthvalue_quantile, quantile

OP = "abs_quantile"
PERCENTILE = 0.95

_FLOPS_PER_ELEMENT = 4


def cases() -> Iterator[Case]:
    """All of them; the name is shape-dtype."""
    headline = frozenset({"headline"})
    yield _case((2, 3, 64, 64), torch.float32, headline | {"overhead"})
    yield _case((2, 3, 256, 256), torch.float32, headline)
    yield _case((2, 3, 1024, 1024), torch.float32, headline)
    yield _case((2, 3, 256, 256), torch.bfloat16)


def eager(x: Tensor) -> Tensor:
    return quantile(_flat(x), PERCENTILE)


def kthvalue(x: Tensor) -> Tensor:
    return kthvalue_quantile(_flat(x), PERCENTILE)


def numpy_sort(x: Tensor) -> Tensor:
    values = np.sort(_flat(x).numpy(), axis=1)
    return torch.from_numpy(values[:, round(PERCENTILE * (values.shape[1] - 1))])


def _flat(x: Tensor) -> Tensor:
    """Magnitudes (B, n), in the least dtype that `torch.quantile` takes"""
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1).abs()


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype, tags: frozenset[str] = frozenset()) -> Case:
    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        return {"x": random_normal(generator, shape, dtype).to(device)}

    def ours(x: Tensor) -> Tensor:
        return ops.abs_quantile(x, PERCENTILE)

    def truth(x: Tensor) -> Tensor:
        return reference(x, PERCENTILE)

    size = "x".join(map(str, shape))
    return Case(
        op=OP,
        name=f"{size}-{dtype_name(dtype)}",
        title=size.replace("x", "×"),
        shape=shape,
        dtype=dtype,
        layout="nchw",
        direction="forward",
        inputs=inputs,
        ours=ours,
        eager=truth,
        truth=truth,
        peers=(
            Peer("eager", {"eager": lambda case: eager}),
            Peer("kthvalue", {"kthvalue": lambda case: kthvalue}),
            Peer("numpy-sort", {"numpy-sort": lambda case: numpy_sort}),
            compiled(eager, modes=("default",)),
        ),
        bytes=elements(shape) * dtype.itemsize,
        flops=_FLOPS_PER_ELEMENT * elements(shape),
        tags=tags,
    )
