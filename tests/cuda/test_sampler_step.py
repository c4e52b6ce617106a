"""The CUDA kernels of sampler_step: every way to keep x0 while its quantile is selected, on devices of several kinds.

What they compute in general is tested in `tests/ops/test_sampler_step*.py`, which run on these kernels too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imagen_fast import ops, use_backend
from imagen_fast.diffusion import DynamicThreshold, Guidance, StepTable, squaredcos_cap_v2
from imagen_fast.layout import channels_last
from imagen_fast.testing import assert_as_accurate

Emulator = Callable[..., None]

ALPHAS = squaredcos_cap_v2(1000)
LEARNED = StepTable.ddpm(ALPHAS, steps=10, variance="learned_range")
MULTISTEP = StepTable.dpm_solver_pp(ALPHAS, steps=20, sde=True)
CHURN = StepTable.euler(ALPHAS, steps=10, churn=5.0)

HOPPER = {"capability": 90, "multiprocessors": 4}
AMPERE = {"capability": 80, "multiprocessors": 4}  # no clusters
ADA = {"capability": 89, "multiprocessors": 2}  # neither clusters nor much shared memory
BLOCK, CLUSTER, GRID = range(3)


class Plan(NamedTuple):
    resident: int
    team: int
    blocks: int
    teams: int
    keeps_update: int


def plan(sample: Tensor) -> Plan:
    return Plan(*torch.ops.imagen_fast._sampler_step_cuda_plan(sample))


class Case(NamedTuple):
    device: dict[str, int]
    shape: tuple[int, ...]
    expected: Plan


WAYS = {
    "block": Case(HOPPER, (2, 3, 32, 32), Plan(1, BLOCK, 1, 2, 1)),
    "block-odd": Case(HOPPER, (2, 3, 31, 33), Plan(1, BLOCK, 1, 2, 1)),
    "block-rest": Case(HOPPER, (1, 3, 31, 33), Plan(1, BLOCK, 1, 1, 1)),
    "cluster-2": Case(HOPPER, (2, 3, 72, 80), Plan(1, CLUSTER, 2, 2, 1)),
    "cluster-8": Case(HOPPER, (1, 3, 150, 151), Plan(1, CLUSTER, 8, 1, 1)),
    "grid": Case(AMPERE, (1, 3, 120, 128), Plan(1, GRID, 4, 1, 1)),
    "grid-teams": Case(AMPERE, (5, 3, 88, 96), Plan(1, GRID, 2, 2, 1)),
    "grid-turns": Case(AMPERE, (3, 3, 110, 131), Plan(1, GRID, 4, 1, 1)),
    "grid-x0-alone": Case(ADA, (2, 3, 100, 104), Plan(1, GRID, 2, 1, 0)),
    "split": Case(ADA, (2, 3, 120, 128), Plan(0, GRID, 4, 2, 0)),
    "split-odd": Case(ADA, (2, 3, 121, 127), Plan(0, GRID, 4, 2, 0)),
}
ways = pytest.mark.parametrize("way", WAYS)


def call(
    way: str, emulator: Emulator, dtype: torch.dtype = torch.float32, table: StepTable = LEARNED, **more: Any
) -> dict[str, Any]:
    """Outputs are the halves of one batch, as a U-Net gives them under guidance."""
    emulator(**WAYS[way].device, **more)
    torch.manual_seed(0)
    shape = WAYS[way].shape
    batch, channels, *positions = shape
    wide = (2 if table.learned_variance else 1) * channels
    unconditional, output = torch.randn(2 * batch, wide, *positions).to(dtype).chunk(2)
    return {
        "sample": torch.randn(shape).to(dtype),
        "output": output,
        "table": table,
        "index": torch.tensor(3),
        "unconditional_output": unconditional,
        "guidance": 3.0,
        "threshold": DynamicThreshold(0.9, min_value=0.5),
        "previous_x0": torch.randn(shape).to(dtype) if table.uses("next_from_previous_x0") else None,
        "noise": torch.randn(shape).to(dtype),
        "return_x0": True,
    }


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def assert_accurate(given: dict[str, Any]) -> None:
    ours = ops.sampler_step(**given)
    with use_backend("eager"):
        eager, truth = ops.sampler_step(**given), ops.sampler_step(**in_float64(given))
    for name, y, e, t in zip(("next", "x0"), ours, eager, truth, strict=True):
        assert_as_accurate(y, e, t, name=name)


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    emulator(**WAYS[way].device)
    assert plan(torch.empty(WAYS[way].shape)) == WAYS[way].expected


@ways
def test_each_way_is_right(way: str, emulator: Emulator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_accurate(call(way, emulator, dtype))


@ways
def test_channels_last_with_noise_from_a_seed(way: str, emulator: Emulator) -> None:
    given = call(way, emulator)
    for name in ("sample", "output", "unconditional_output"):
        given[name] = channels_last(given[name])
    given |= {"noise": None, "seed": 5}
    assert_accurate(given)


@pytest.mark.parametrize("way", ["block", "cluster-2", "grid-teams", "grid-x0-alone", "split"])
@pytest.mark.parametrize("table", [MULTISTEP, CHURN], ids=["multistep", "churn"])
def test_noise_and_x0_of_the_step_before(way: str, table: StepTable, emulator: Emulator) -> None:
    given = call(way, emulator, table=table)
    assert_accurate(given)
    assert_accurate(given | {"noise": None, "seed": 7, "guidance": Guidance(3.0, 0.5, True)})


@ways
@pytest.mark.parametrize("max_value", [None, 0.5], ids=["quantile", "known"])
def test_a_nan_spoils_its_own_sample_alone(way: str, max_value: float | None, emulator: Emulator) -> None:
    given = call(way, emulator) | {"threshold": DynamicThreshold(0.9, 0.5, max_value)}
    assert_accurate(given)
    given["sample"][-1, 2, -1, -1] = math.nan
    for y in ops.sampler_step(**given):
        assert y[-1].isnan().all()
        assert y[:-1].isfinite().all()


@ways
def test_an_index_out_of_range_gives_nan(way: str, emulator: Emulator) -> None:
    given = call(way, emulator)
    for index in (-1, len(LEARNED), 2**40):
        for y in ops.sampler_step(**given | {"index": torch.tensor(index)}):
            assert y.isnan().all()


@ways
def test_blocks_and_threads_in_any_order(way: str, emulator: Emulator) -> None:
    given = call(way, emulator, torch.bfloat16) | {"guidance": Guidance(3.0, 0.5)}
    first = ops.sampler_step(**given)
    for order in ("reverse", "random"):
        emulator(order=order, seed=3)
        for expected, found in zip(first, ops.sampler_step(**given), strict=True):
            assert torch.equal(expected, found)


def test_the_way_does_not_change_the_result(emulator: Emulator) -> None:
    """Which device it is, and how many samples there are: the same bits."""
    given = call("grid", emulator)
    expected = ops.sampler_step(**given)
    for device in (HOPPER, ADA, {"capability": 120, "multiprocessors": 6}):
        emulator(**device)
        for y, e in zip(ops.sampler_step(**given), expected, strict=True):
            assert torch.equal(y, e)


@pytest.mark.instrumented
@pytest.mark.parametrize(
    ("device", "shape"),
    [
        (HOPPER, (2, 3, 8, 8)),
        (HOPPER, (1, 3, 77, 81)),
        ({**AMPERE, "multiprocessors": 2}, (1, 3, 110, 101)),
        ({**ADA, "multiprocessors": 1}, (2, 3, 84, 85)),
    ],
    ids=["block", "cluster", "grid", "split"],
)
def test_every_access_is_in_order_and_in_bounds(
    device: dict[str, int], shape: tuple[int, ...], emulator: Emulator
) -> None:
    """What is asserted besides is that the instrumented process reports nothing."""
    emulator(**device)
    torch.manual_seed(0)
    sample, output = torch.randn(shape), torch.randn(shape[0], 2 * shape[1], *shape[2:])
    unconditional = torch.randn(shape)
    given = {"unconditional_output": unconditional, "guidance": Guidance(3.0, 0.5), "seed": 3, "return_x0": True}
    for threshold in (DynamicThreshold(0.9), None):
        for y in ops.sampler_step(sample, output, LEARNED, 3, threshold=threshold, **given):
            assert y.isfinite().all()


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "side", "expected"),
    [
        (90, 132, 64, Plan(1, BLOCK, 1, 1, 1)),
        (90, 132, 256, Plan(1, CLUSTER, 8, 1, 1)),
        (90, 132, 1024, Plan(1, GRID, 132, 1, 1)),
        (80, 108, 256, Plan(1, GRID, 48, 1, 1)),
        (80, 108, 1024, Plan(1, GRID, 108, 1, 0)),
        (120, 170, 1024, Plan(1, GRID, 170, 1, 0)),
        (89, 128, 1024, Plan(0, GRID, 256, 1, 0)),
    ],
)
def test_pictures_on_real_devices(
    capability: int, multiprocessors: int, side: int, expected: Plan, emulator: Emulator
) -> None:
    emulator(capability=capability, multiprocessors=multiprocessors)
    assert plan(torch.empty(1, 3, side, side)) == expected


def operator_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    sample, output, previous = (torch.randn(2, c, 6, 5).to(dtype) for c in (3, 6, 3))
    flags = (True, 3.0, 0.0, False, 2, 0.9, 1.0, 1.5, True)
    return (sample, output, None, previous, None, torch.arange(2), LEARNED.rows, torch.tensor(2), *flags)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.imagen_fast.sampler_step_cuda, operator_arguments())


def test_direct_calls_of_the_operator_are_checked() -> None:
    """What the public op never does, but would read out of bounds."""
    good = operator_arguments()
    apart = torch.randn(2, 3, 6, 10)[..., ::2]
    for place, wrong in (
        (0, apart),
        (0, good[0].double()),
        (1, good[1][:, :3]),
        (3, good[3][:1]),
        (5, torch.arange(3)),
        (6, LEARNED.rows.float()),
        (7, torch.tensor([1, 2])),
    ):
        with pytest.raises(RuntimeError, match="sampler_step"):
            torch.ops.imagen_fast.sampler_step_cuda(*good[:place], wrong, *good[place + 1 :])


def test_what_a_row_needs_and_is_not_there_is_nan() -> None:
    """Only the device knows the row, so that nothing can be checked; the public op asks for what any row needs."""
    without = (*operator_arguments()[:5], None, *operator_arguments()[6:])
    assert all(y.isnan().all() for y in torch.ops.imagen_fast.sampler_step_cuda(*without)[:1])
