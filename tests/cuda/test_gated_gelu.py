"""The CUDA kernels of gated_gelu: every way to cut rows into tiles.

What they compute in general is tested in `tests/ops/test_gated_gelu.py`, which runs on these kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imagen_fast import ops
from imagen_fast.testing import assert_op_as_accurate

Emulator = Callable[..., None]


class Plan(NamedTuple):
    vector: int  # elements in an access
    threads: int  # abreast on a row
    blocks: int  # of a row
    rows: int  # of a block
    one_distance: int  # whether all rows lie at one


def plan(gate: Tensor, value: Tensor | None) -> Plan:
    return Plan(*torch.ops.imagen_fast._gated_gelu_cuda_plan(gate, value))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


# gate, value or None, and what is expected of the plan; in bf16 a vector has 8 elements.
WAYS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor] | None, dict[str, int]]] = {
    "rows": (lambda: randn(2, 9, 64), lambda: randn(2, 9, 64), {"vector": 8, "threads": 8, "rows": 18, "blocks": 1}),
    "rows-of-several-blocks": (lambda: randn(1, 71, 48), lambda: randn(1, 71, 48), {"vector": 8, "rows": 42}),
    "elements": (lambda: randn(2, 9, 7), lambda: randn(2, 9, 7), {"vector": 1, "threads": 7, "rows": 18}),
    "packed": (lambda: randn(2, 3, 1536), None, {"vector": 8, "threads": 96, "rows": 2, "one_distance": 1}),
    "packed-elements": (lambda: randn(2, 3, 10), None, {"vector": 1, "threads": 5}),
    "wide": (lambda: randn(1, 2, 20480), None, {"vector": 8, "threads": 256, "blocks": 5, "rows": 1}),
    "wide-rest": (lambda: randn(1, 2, 2056), lambda: randn(1, 2, 2056), {"vector": 8, "threads": 129, "blocks": 2}),
    "wide-elements": (lambda: randn(1, 2, 333), lambda: randn(1, 2, 333), {"vector": 1, "threads": 167, "blocks": 2}),
    "parts-of-projections": (
        lambda: randn(2, 5, 96)[..., 32:64],
        lambda: randn(2, 5, 96)[..., 64:],
        {"vector": 8, "one_distance": 1},
    ),
    "window": (lambda: randn(2, 9, 32)[:, 2:7], lambda: randn(2, 5, 32), {"vector": 8, "one_distance": 0}),
    "sequence-first": (
        lambda: randn(5, 2, 32).transpose(0, 1),
        lambda: randn(2, 5, 32),
        {"vector": 8, "one_distance": 0},
    ),
    "expanded": (lambda: randn(1, 5, 32).expand(2, 5, 32), lambda: randn(2, 5, 32), {"vector": 8, "one_distance": 0}),
    "unaligned-storage": (
        lambda: randn(1 + 2 * 5 * 32)[1:].view(2, 5, 32),
        lambda: randn(2, 5, 32),
        {"vector": 1, "one_distance": 1},
    ),
    "unaligned-value": (lambda: randn(2, 5, 32), lambda: randn(2, 5, 40)[..., 3:35], {"vector": 1}),
    "unaligned-rows": (lambda: randn(2, 6, 36)[..., :32], lambda: randn(2, 6, 32), {"vector": 1}),
    "unaligned-sequences": (
        lambda: randn(2, 164)[:, :160].view(2, 5, 32),
        lambda: randn(2, 5, 32),
        {"vector": 1},
    ),
}

ways = pytest.mark.parametrize("way", WAYS)


def call(way: str) -> dict[str, Any]:
    gate, value, _ = WAYS[way]
    return {"gate": gate(), "value": value() if value else None}


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    found, expected = plan(**call(way))._asdict(), WAYS[way][2]
    assert {name: found[name] for name in expected} == expected


@ways
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_each_way_is_right(way: str, approximate: str, emulator: Emulator) -> None:
    assert_op_as_accurate(ops.gated_gelu, **call(way), approximate=approximate)


@pytest.mark.instrumented
@pytest.mark.parametrize("way", ["rows", "packed-elements", "wide-rest", "unaligned-rows"])
def test_every_access_is_in_order_and_in_bounds(way: str, emulator: Emulator) -> None:
    """What is asserted is that the instrumented process reports nothing."""
    leaves = [x.detach().requires_grad_() for x in call(way).values() if x is not None]
    y = ops.gated_gelu(*leaves)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y, leaves, torch.cos(y.detach())))


@pytest.mark.parametrize("strides", ["unaligned", "expanded", "sequence-first"])
def test_gradients_from_a_gradient_that_lies_otherwise(strides: str, emulator: Emulator) -> None:
    gate, value = (randn(2, 5, 32).requires_grad_() for _ in range(2))
    dy = {
        "unaligned": lambda: randn(1 + 2 * 5 * 32)[1:].view(2, 5, 32),
        "expanded": lambda: randn(32).expand(2, 5, 32),
        "sequence-first": lambda: randn(5, 2, 32).transpose(0, 1),
    }[strides]()
    y = ops.gated_gelu(gate, value)
    found = torch.autograd.grad(y, [gate, value], dy, retain_graph=True)
    expected = torch.autograd.grad(y, [gate, value], dy.contiguous().clone())
    assert all(map(torch.equal, found, expected))


def test_wrong_tensors_for_the_operators() -> None:
    with pytest.raises(RuntimeError, match="gated_gelu: the CUDA kernels take float16, bfloat16 and float32"):
        torch.ops.imagen_fast.gated_gelu_cuda(torch.ones(1, 2, 8, dtype=torch.float64), None, True)
    with pytest.raises(RuntimeError, match="gated_gelu: dy does not fit"):
        torch.ops.imagen_fast.gated_gelu_backward_cuda(torch.ones(1, 2, 8), torch.ones(1, 2, 8), None, True, 1)
