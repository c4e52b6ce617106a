"""The CUDA kernels of rms_norm: rows of one warp, of one block, and rows that are walked, on devices of several sizes.

What they compute in general is tested in `tests/ops/test_rms_norm.py`, which runs on these kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from imagen_fast import ops
from imagen_fast.testing import assert_op_as_accurate

Emulator = Callable[..., None]


class Plan(NamedTuple):
    resident: int
    resident_backward: int
    vector: int  # elements in an access
    threads: int  # of a row
    abreast: int  # rows of a block at a time
    row_blocks: int  # parts of the weight's gradient
    rows_of_block: int


def plan(x: Tensor, weight: Tensor) -> Plan:
    return Plan(*torch.ops.imagen_fast._rms_norm_cuda_plan(x, weight))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class Case(NamedTuple):
    x: Callable[[], Tensor]
    expected: dict[str, int]  # of the plan


# One for each way through the kernels, and rows of several kinds; in bf16 a vector has 8 elements.
WAYS = {
    "warp": Case(lambda: randn(2, 23, 40), {"resident": 1, "vector": 8, "abreast": 4, "rows_of_block": 8}),
    "warp-full": Case(lambda: randn(1, 3, 512), {"vector": 8, "abreast": 4}),
    "warp-elements": Case(lambda: randn(3, 5, 5), {"resident": 1, "vector": 1, "threads": 32, "abreast": 4}),
    "warp-elements-full": Case(lambda: randn(1, 9, 255), {"vector": 1, "abreast": 4}),
    "block": Case(lambda: randn(1, 13, 1472), {"resident": 1, "vector": 8, "threads": 96, "rows_of_block": 2}),
    "block-t5-xxl": Case(lambda: randn(1, 7, 4096), {"vector": 8, "threads": 256, "rows_of_block": 2}),
    "block-full": Case(lambda: randn(1, 2, 8192), {"resident_backward": 1, "vector": 8, "threads": 512}),
    "block-full-forward": Case(lambda: randn(1, 2, 16384), {"resident": 1, "resident_backward": 0, "vector": 8}),
    "block-elements": Case(lambda: randn(1, 19, 333), {"vector": 1, "threads": 64, "rows_of_block": 2}),
    "block-elements-full": Case(lambda: randn(1, 2, 4095), {"resident_backward": 1, "vector": 1, "threads": 512}),
    "block-elements-full-forward": Case(lambda: randn(1, 2, 8191), {"resident": 1, "resident_backward": 0}),
    "walk": Case(lambda: randn(1, 9, 16392), {"resident": 0, "vector": 8, "threads": 512, "rows_of_block": 9}),
    "walk-elements": Case(lambda: randn(1, 3, 8193), {"resident": 0, "resident_backward": 0, "vector": 1}),
    "window": Case(lambda: randn(2, 9, 64)[:, 2:7], {"vector": 8}),
    "part-of-a-projection": Case(lambda: randn(2, 5, 192)[..., 64:128], {"vector": 8}),
    "sequence-first": Case(lambda: randn(5, 2, 32).transpose(0, 1), {"vector": 8}),
    "unaligned-rows": Case(lambda: randn(2, 6, 36)[..., :32], {"vector": 1}),
    "unaligned-sequences": Case(lambda: randn(2, 164)[:, :160].view(2, 5, 32), {"vector": 1}),
    "unaligned-storage": Case(lambda: randn(1 + 2 * 5 * 32)[1:].view(2, 5, 32), {"vector": 1}),
}

ways = pytest.mark.parametrize("way", WAYS)


def call(way: str, emulator: Emulator, dtype: torch.dtype = torch.bfloat16, residual: bool = True) -> dict[str, Tensor]:
    """On a device so small that a block has several rows backward."""
    emulator(capability=80, multiprocessors=1)
    x = WAYS[way].x() if dtype == torch.bfloat16 else WAYS[way].x().to(dtype)
    weight = 1 + randn(x.shape[-1], dtype=torch.float32)
    return {"x": x, "weight": weight} | ({"residual": randn(*x.shape, dtype=dtype)} if residual else {})


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    arguments = call(way, emulator)
    found = plan(arguments["x"], arguments["weight"])._asdict()
    assert {name: found[name] for name in WAYS[way].expected} == WAYS[way].expected


@ways
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_each_way_is_right(way: str, residual: bool, emulator: Emulator) -> None:
    assert_op_as_accurate(ops.rms_norm, **call(way, emulator, residual=residual))


@pytest.mark.parametrize("way", ["warp", "block", "walk", "sequence-first"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(way: str, dtype: torch.dtype, emulator: Emulator) -> None:
    assert_op_as_accurate(ops.rms_norm, **call(way, emulator, dtype))


@pytest.mark.parametrize("way", ["warp", "block", "walk"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_of_16_bits(way: str, dtype: torch.dtype, emulator: Emulator) -> None:
    for x_dtype in (torch.bfloat16, torch.float32):
        arguments = call(way, emulator, x_dtype)
        assert_op_as_accurate(ops.rms_norm, **arguments | {"weight": arguments["weight"].to(dtype)})


@pytest.mark.parametrize("kind", ["strided", "unaligned"])
def test_weight_that_is_taken_by_elements(kind: str, emulator: Emulator) -> None:
    arguments = call("warp", emulator, residual=False)
    weight = {"strided": lambda: torch.randn(40, 3)[:, 1], "unaligned": lambda: torch.randn(41)[1:]}[kind]()
    assert plan(arguments["x"], weight).vector == 1
    y, _, rstd = torch.ops.imagen_fast.rms_norm_cuda(arguments["x"], weight, None, 1e-6)
    aligned, _, _ = torch.ops.imagen_fast.rms_norm_cuda(arguments["x"], weight.clone(), None, 1e-6)
    torch.testing.assert_close(y, aligned)
    gradients = torch.ops.imagen_fast.rms_norm_backward_cuda(y, None, arguments["x"], rstd, weight, 3)
    expected = torch.ops.imagen_fast.rms_norm_backward_cuda(y, None, arguments["x"], rstd, weight.clone(), 3)
    for found, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, other)


def results(arguments: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    y, summed = ops.rms_norm(**leaves)
    return [
        y.detach(),
        summed.detach(),
        *torch.autograd.grad([y, summed], list(leaves.values()), [torch.cos(y.detach()), torch.sin(y.detach())]),
    ]


@pytest.mark.instrumented
@pytest.mark.parametrize("way", ["warp", "warp-elements", "block-elements", "walk-elements", "unaligned-storage"])
def test_every_access_is_in_order_and_in_bounds(way: str, emulator: Emulator) -> None:
    """What is asserted is that the instrumented process reports nothing."""
    assert all(result.isfinite().all() for result in results(call(way, emulator)))


@pytest.mark.parametrize("way", ["warp", "warp-elements", "block", "block-elements", "walk", "walk-elements"])
def test_blocks_and_threads_in_any_order(way: str, emulator: Emulator) -> None:
    """The result is the same to the last bit: nothing depends on who is first."""
    arguments = call(way, emulator)
    first = results(arguments)
    for order in ("reverse", "random"):
        emulator(order=order, seed=3)
        assert all(map(torch.equal, first, results(arguments)))


@pytest.mark.parametrize("way", ["warp", "block", "walk"])
def test_a_row_does_not_depend_on_the_others_and_on_the_device(way: str, emulator: Emulator) -> None:
    arguments = call(way, emulator)
    every = results(arguments)
    emulator(capability=90, multiprocessors=132)
    alone = results({name: x if name == "weight" else x[:, 2:3] for name, x in arguments.items()})
    for i in (0, 1, 2, 4):  # not the weight's gradient
        assert torch.equal(every[i][:, 2:3], alone[i])


@pytest.mark.parametrize("way", ["warp", "block", "walk"])
@pytest.mark.parametrize("strides", ["unaligned", "expanded", "sequence-first"])
def test_gradients_from_gradients_that_lie_otherwise(way: str, strides: str, emulator: Emulator) -> None:
    arguments = {name: value.requires_grad_() for name, value in call(way, emulator).items()}
    outer, inner, width = arguments["x"].shape
    given = {
        "unaligned": lambda: randn(1 + outer * inner * width)[1:].view(outer, inner, width),
        "expanded": lambda: randn(width).expand(outer, inner, width),
        "sequence-first": lambda: randn(inner, outer, width).transpose(0, 1),
    }[strides]()
    y = ops.rms_norm(**arguments)
    leaves = list(arguments.values())
    found = torch.autograd.grad(y, leaves, [given, given.flip(0)], retain_graph=True)
    expected = torch.autograd.grad(y, leaves, [given.contiguous().clone(), given.flip(0).contiguous()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# (rows, width): the encoders of T5-base and T5-XXL, 4 prompts of 256 tokens
@pytest.mark.parametrize(("rows", "width"), [(1024, 768), (1024, 4096)])
def test_blocks_fill_an_h200(rows: int, width: int, emulator: Emulator) -> None:
    emulator(capability=90, multiprocessors=132)
    found = plan(torch.empty(1, rows, width, dtype=torch.bfloat16), torch.empty(width))
    assert (found.resident_backward, found.vector) == (1, 8)
    assert found.row_blocks >= 132
    assert found.row_blocks * found.rows_of_block >= rows > (found.row_blocks - 1) * found.rows_of_block
