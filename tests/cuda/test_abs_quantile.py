"""The CUDA kernels of abs_quantile: a block, a cluster, the grid and several launches, on devices of several kinds.

What they compute in general is tested in `tests/ops/test_abs_quantile.py`, which runs on these kernels too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast import ops

Emulator = Callable[..., None]

HOPPER = {"capability": 90, "multiprocessors": 4}
AMPERE = {"capability": 80, "multiprocessors": 4}  # no clusters
ADA = {"capability": 89, "multiprocessors": 4}  # neither clusters nor much shared memory
BLOCK, CLUSTER, GRID = range(3)


class Plan(NamedTuple):
    resident: int
    team: int
    blocks: int
    teams: int


def plan(x: Tensor) -> Plan:
    return Plan(*torch.ops.imagen_fast._abs_quantile_cuda_plan(x))


class Case(NamedTuple):
    device: dict[str, int]
    shape: tuple[int, int]
    expected: Plan  # in fp32


WAYS = {
    "block": Case(HOPPER, (3, 12_288), Plan(1, BLOCK, 1, 3)),
    "block-odd": Case(HOPPER, (3, 4097), Plan(1, BLOCK, 1, 3)),
    "block-few": Case(HOPPER, (5, 3), Plan(1, BLOCK, 1, 5)),
    "block-ampere": Case(AMPERE, (2, 30_001), Plan(1, BLOCK, 1, 2)),
    "cluster-2": Case(HOPPER, (2, 20_001), Plan(1, CLUSTER, 2, 2)),
    "cluster-8": Case(HOPPER, (2, 70_007), Plan(1, CLUSTER, 8, 2)),
    "grid": Case(AMPERE, (1, 80_003), Plan(1, GRID, 4, 1)),
    "grid-teams": Case(AMPERE, (5, 40_001), Plan(1, GRID, 2, 2)),
    "grid-turns": Case(ADA, (3, 60_001), Plan(1, GRID, 4, 1)),
    "split": Case(ADA, (2, 100_003), Plan(0, GRID, 8, 2)),
}
ways = pytest.mark.parametrize("way", WAYS)


def values(way: str, emulator: Emulator, **more: object) -> Tensor:
    emulator(**WAYS[way].device, **more)
    torch.manual_seed(0)
    return torch.randn(WAYS[way].shape)


def expected(x: Tensor, q: float) -> Tensor:
    with imagen_fast.use_backend("eager"):
        return ops.abs_quantile(x, q)


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    assert plan(values(way, emulator)) == WAYS[way].expected


@ways
@pytest.mark.parametrize("q", [0.0, 0.5, 0.95, 0.99999, 1.0])
def test_each_way_is_exact(way: str, q: float, emulator: Emulator) -> None:
    x = values(way, emulator)
    assert torch.equal(ops.abs_quantile(x, q), expected(x, q))


@ways
def test_sixteen_bits_and_ties(way: str, emulator: Emulator) -> None:
    x = values(way, emulator)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ops.abs_quantile(x.to(dtype), 0.9), expected(x.to(dtype), 0.9))
    for tied in ((2 * x).round(), torch.full_like(x, -3.0), x.sign() * (1 + (x > 1.5))):
        assert torch.equal(ops.abs_quantile(tied, 0.77), expected(tied, 0.77))


@ways
def test_the_value_above_is_found_where_it_is_rare(way: str, emulator: Emulator) -> None:
    """A rank whose next one begins with other digits, in whichever block it is."""
    x = values(way, emulator)
    n = x.shape[1]
    for place in (0, n // 2, n - 1):
        one = torch.zeros_like(x)
        one[:, place] = 5.0
        q = (n - 1.5) / (n - 1) if n > 1 else 1.0
        assert torch.equal(ops.abs_quantile(one, q), expected(one, q))


@ways
def test_what_is_not_finite(way: str, emulator: Emulator) -> None:
    x = values(way, emulator)
    for place in (0, -1):
        spoilt = x.clone()
        spoilt[-1, place] = math.nan
        result = ops.abs_quantile(spoilt, 0.5)
        assert result.isnan().tolist() == [False] * (len(x) - 1) + [True]
        spoilt[-1, place] = -math.inf
        assert ops.abs_quantile(spoilt, 1.0).isinf().tolist() == [False] * (len(x) - 1) + [True]
        assert torch.equal(ops.abs_quantile(spoilt, 0.5), expected(spoilt, 0.5))


@ways
def test_blocks_and_threads_in_any_order(way: str, emulator: Emulator) -> None:
    x = values(way, emulator)
    for order in ("reverse", "random"):
        emulator(order=order, seed=3)
        assert torch.equal(ops.abs_quantile(x, 0.95), expected(x, 0.95))


@ways
def test_samples_that_begin_anywhere(way: str, emulator: Emulator) -> None:
    """At no multiple of 16 bytes, and at any distance from each other."""
    batch, n = WAYS[way].shape
    x = values(way, emulator)
    for dtype in (torch.float32, torch.bfloat16):
        apart = torch.full((batch, n + 5), math.nan, dtype=dtype)
        apart[:, 3:-2] = x.to(dtype)
        x_apart = apart[:, 3:-2]
        assert torch.equal(ops.abs_quantile(x_apart, 0.9), expected(x_apart, 0.9))


@pytest.mark.instrumented
@pytest.mark.parametrize(
    ("device", "size"),
    [(HOPPER, 2051), (HOPPER, 17_001), (AMPERE, 41_001), ({**ADA, "multiprocessors": 1}, 20_003)],
    ids=["block", "cluster", "grid", "split"],
)
def test_every_access_is_in_order_and_in_bounds(device: dict[str, int], size: int, emulator: Emulator) -> None:
    """What is asserted besides is that the instrumented process reports nothing."""
    emulator(**device)
    x = torch.randn(2, size + 1)[:, 1:]
    assert torch.equal(ops.abs_quantile(x, 0.95), expected(x, 0.95))


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "size", "team", "blocks"),
    [
        (90, 132, 3 * 64**2, BLOCK, 1),
        (90, 132, 3 * 256**2, CLUSTER, 8),
        (90, 132, 3 * 1024**2, GRID, 132),
        (80, 108, 3 * 256**2, GRID, 48),
        (80, 108, 3 * 1024**2, GRID, 108),
        (120, 170, 3 * 1024**2, GRID, 170),
    ],
)
def test_sizes_of_pictures_on_real_devices(
    capability: int, multiprocessors: int, size: int, team: int, blocks: int, emulator: Emulator
) -> None:
    emulator(capability=capability, multiprocessors=multiprocessors)
    found = plan(torch.empty(1, size))
    assert (found.resident, found.team, found.blocks, found.teams) == (1, team, blocks, 1)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.imagen_fast.abs_quantile_cuda, (torch.randn(2, 50), 0.95))


def test_direct_calls_of_the_operator_are_checked() -> None:
    for x, q in ((torch.randn(2, 4, 6)[..., ::2], 0.5), (torch.randn(2, 4), 1.5), (torch.randn(2, 0), 0.5)):
        with pytest.raises(RuntimeError, match="abs_quantile"):
            torch.ops.imagen_fast.abs_quantile_cuda(x, q)
    with pytest.raises(RuntimeError, match="float16, bfloat16 and float32"):
        torch.ops.imagen_fast.abs_quantile_cuda(torch.randn(2, 4).double(), 0.5)
