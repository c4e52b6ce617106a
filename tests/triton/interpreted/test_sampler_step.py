"""sampler_step in Triton's interpreter: its noise, every way of launching it, indices on the device."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imagen_fast import _native, _triton, layout, ops, use_backend
from imagen_fast.diffusion import DynamicThreshold, Guidance, StepTable, squaredcos_cap_v2
from imagen_fast.reference import philox
from imagen_fast.testing import assert_as_accurate

kernels = _triton.kernels("sampler_step")
quantile_kernels = _triton.kernels("abs_quantile")
draw = _triton.kernels("_philox")

ALPHAS = squaredcos_cap_v2(1000)
LEARNED = StepTable.ddpm(ALPHAS, steps=10, variance="learned_range")
TABLES = {
    "ddpm-learned": LEARNED,
    "ddim": StepTable.ddim(ALPHAS, steps=10, prediction="v"),
    "dpm-2m-sde": StepTable.dpm_solver_pp(ALPHAS, steps=20, sde=True),
    "euler-churn": StepTable.euler(ALPHAS, steps=10, churn=5.0),
}
THRESHOLDS = {
    "none": None,
    "static": "static",
    "quantile": DynamicThreshold(0.9, max_value=1.5),
    "known": DynamicThreshold(0.95, max_value=1.0),
}
GUIDANCE = {
    "plain": 3.0,
    "rescale": Guidance(5.0, rescale=0.7),
    "parallel": Guidance(5.0, remove_parallel=True),
    "both": Guidance(4.0, 0.3, True),
}
WAYS = ["whole", "split"]
# Without a dynamic threshold there is one way, unless guidance needs sums.
WAYS_AND_THRESHOLDS = [("whole", "none"), *itertools.product(WAYS, ("quantile", "known"))]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


ways_and_thresholds = pytest.mark.parametrize(
    ("way", "threshold"), WAYS_AND_THRESHOLDS, indirect=["way"], ids=["-".join(both) for both in WAYS_AND_THRESHOLDS]
)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Samples are one program's, or three share one; in tiles so small that there are several, with edges."""
    take(request.param, monkeypatch)
    return request.param


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = copy.deepcopy(kernels.CONFIGURATIONS.table)
    small = {"tile": 64, "channels": 2, "num_warps": 4}
    table["tiles"] = {"default": [small]}
    table["whole"] = {"default": [{"up_to": 16384, **small}] if way == "whole" else []}
    table["split"] = {"default": [{"programs_per_multiprocessor": 3, "most_splits": 512, **small}]}
    monkeypatch.setattr(kernels.CONFIGURATIONS, "table", table)
    table = copy.deepcopy(quantile_kernels.CONFIGURATIONS.table)
    table["split"] = {"default": [{"tile": 256, "programs_per_multiprocessor": 3, "num_warps": 4}]}
    monkeypatch.setattr(quantile_kernels.CONFIGURATIONS, "table", table)
    device = _triton.KNOWN_DEVICES["9.0"]._replace(multiprocessors=1)
    for module in (kernels, quantile_kernels):
        monkeypatch.setattr(module, "device_of", lambda x: device)


def arguments(
    table: StepTable,
    shape: tuple[int, ...] = (2, 3, 9, 7),
    dtype: torch.dtype = torch.float32,
    layout_name: str = "nchw",
    source: str = "noise",
) -> dict[str, Any]:
    batch, channels, *positions = shape

    def tensor(*sizes: int) -> Tensor:
        x = torch.randn(sizes).to(dtype)
        return layout.channels_last(x) if layout_name == "nhwc" else x

    both = tensor(2 * batch, (2 if table.learned_variance else 1) * channels, *positions)
    unconditional, conditional = both.chunk(2)
    given = {"sample": tensor(*shape), "output": conditional, "table": table, "index": 3, "return_x0": True}
    given |= {"unconditional_output": unconditional, "guidance": 3.0}
    given |= {"seed": torch.arange(batch) * 1000 - 7} if source == "seed" else {"noise": tensor(*shape)}
    if table.uses("next_from_previous_x0"):
        given["previous_x0"] = tensor(*shape)
    return given


def to_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def assert_accurate(given: dict[str, Any]) -> None:
    ours = ops.sampler_step(**given)
    with use_backend("eager"):
        eager, truth = ops.sampler_step(**given), ops.sampler_step(**to_float64(given))
    for name, y, e, t in zip(("next", "x0"), ours, eager, truth, strict=True):
        assert (y is None) == (e is None)
        if y is not None:
            assert_as_accurate(y, e, t, name=name)


@triton.jit
def stream_kernel(p_words, p_normals, p_by_element, seed, row, first, STAGE: tl.constexpr, N: tl.constexpr):
    seed, row = tl.cast(seed, tl.int64), tl.cast(row, tl.int64)
    o_counter = tl.arange(0, N).to(tl.int64)[None, :] + first
    o_element = tl.arange(0, 4 * N)[None, :]
    w0, w1, w2, w3 = draw.words(seed, o_counter, row, STAGE)
    pairs = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    tl.store(p_words + o_element, pairs.to(tl.int32, bitcast=True))
    tl.store(p_normals + o_element, draw.normals_of_counters(seed, o_counter, row, STAGE))
    tl.store(p_by_element + o_element, draw.normals_of_elements(seed, o_element + 4 * first, row, STAGE))


def stream(seed: int, row: int, stage: int, first: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words (counters, 4) and normals, drawn by fours and one by one."""
    words = torch.empty(counters, 4, dtype=torch.int32)
    normals, by_element = torch.empty(counters, 4), torch.empty(counters, 4)
    stream_kernel[(1,)](words, normals, by_element, seed, row, first, STAGE=stage, N=counters)
    return words, normals, by_element


def ulps(a: Tensor, b: Tensor) -> int:
    """How many float32 lie between a and b, at most."""
    ordered = [torch.where(i < 0, -(i & 0x7FFFFFFF), i) for i in (x.view(torch.int32).long() for x in (a, b))]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0])
@pytest.mark.parametrize("row", [7, 2**31])
def test_noise_has_the_words_of_every_other_backend(seed: int, row: int) -> None:
    words, normals, by_element = stream(seed, row, 0, 0, 256)
    seeds = torch.tensor([seed])
    assert torch.equal(words.long() & 0xFFFFFFFF, philox.words(seeds, 256, row)[0])
    assert ulps(normals.flatten(), philox.normals(seeds, 1024, row)[0]) <= 2
    assert torch.equal(by_element, normals)
    if _native.unavailable_reason() is None:
        native_words, native_normals = torch.ops.imagen_fast._philox_cpu(seed, row, 0, 0, 256)
        assert torch.equal(words, native_words)
        assert ulps(normals, native_normals) <= 4


def test_noise_of_counters_past_32_bits() -> None:
    first = 2**32 - 5
    e = torch.arange(first, first + 64)
    expected = philox.philox(
        (e & 0xFFFFFFFF, e >> 32, torch.tensor(1), torch.tensor(2)), (torch.tensor(9), torch.tensor(0))
    )
    words, normals, by_element = stream(9, 1, 2, first, 64)
    assert torch.equal(words.long() & 0xFFFFFFFF, torch.stack(expected, dim=1))
    assert torch.equal(by_element, normals)


def test_normals_are_within_2_ulp_over_many() -> None:
    _, normals, _ = stream(5, 0, 0, 0, 2**16)
    assert ulps(normals.flatten(), philox.normals(torch.tensor([5]), 2**18, 0)[0]) <= 2


@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (3, 5), (1, 3, 8, 12), (2, 1, 1, 1)], ids=str)
def test_noise_goes_by_the_place_in_the_sample(shape: tuple[int, ...], way: str) -> None:
    """Whatever the layout is, and the way it is launched."""
    table = StepTable.ddpm(ALPHAS, steps=10, variance="fixed_large")
    expected = table.row(3)["noise_scale"] * philox.normals(torch.arange(shape[0]) + 40, math.prod(shape[1:]), 3)
    zero = torch.zeros(shape)
    for x, threshold in itertools.product((zero, layout.channels_last(zero)), (None, DynamicThreshold(0.5))):
        drawn, _ = ops.sampler_step(x, x, table, 3, seed=40, threshold=threshold)
        torch.testing.assert_close(drawn, expected.view(shape), rtol=3e-7, atol=0)


@pytest.mark.parametrize("solver", TABLES)
@ways_and_thresholds
def test_solvers(solver: str, threshold: str, way: str) -> None:
    for layout_name, source, dtype in (("nchw", "seed", torch.float32), ("nhwc", "noise", torch.bfloat16)):
        given = arguments(TABLES[solver], dtype=dtype, layout_name=layout_name, source=source)
        assert_accurate({**given, "threshold": THRESHOLDS[threshold], "return_x0": source == "seed"})


@pytest.mark.parametrize("threshold", ["none", "quantile"])
@pytest.mark.parametrize("guidance", ["rescale", "parallel", "both"])
def test_guidance(guidance: str, threshold: str, way: str) -> None:
    dtype = torch.float16 if guidance == "parallel" else torch.float32
    given = {**arguments(TABLES["ddim"], (2, 3, 9, 11), dtype), "guidance": GUIDANCE[guidance]}
    for name in ("output", "unconditional_output"):  # a large mean costs the deviations nothing
        given[name] = (given[name] + (100 if threshold == "none" else 0)).to(dtype)
    assert_accurate({**given, "threshold": THRESHOLDS[threshold]})


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (1, 300, 1), (1, 3, 2, 3, 5), (0, 3, 4, 4), (2, 1, 9, 11)], ids=str)
def test_shapes(shape: tuple[int, ...], way: str) -> None:
    for layout_name in ("nchw", "nhwc"):
        given = arguments(LEARNED, shape, layout_name=layout_name, source="seed")
        assert_accurate({**given, "threshold": THRESHOLDS["quantile"]})


def test_one_channel_of_several(way: str) -> None:
    wide = layout.channels_last(torch.randn(2, 6, 9, 7))
    given = arguments(TABLES["ddim"], (2, 1, 9, 7), source="seed")
    given |= {"output": wide[:, 2:3], "unconditional_output": wide[:, 4:5], "threshold": THRESHOLDS["quantile"]}
    assert_accurate(given)


def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain guidance, where there are no sums."""
    given = arguments(LEARNED, source="seed")
    for threshold, layout_name in itertools.product(("quantile", "known"), ("nchw", "nhwc")):
        results = []
        for way in WAYS:
            take(way, monkeypatch)
            if layout_name == "nhwc":
                given["output"] = layout.channels_last(given["output"])
            results.append(ops.sampler_step(**given, threshold=THRESHOLDS[threshold]))
        for whole, split in zip(*results, strict=True):
            assert torch.equal(whole, split)


def test_does_not_depend_on_the_batch(way: str) -> None:
    given = arguments(LEARNED, (3, 3, 9, 7), source="seed")
    given |= {"guidance": GUIDANCE["both"], "threshold": THRESHOLDS["quantile"]}
    together = ops.sampler_step(**given)
    for b in range(3):
        own = {name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in given.items()}
        for all_of_them, alone in zip(together, ops.sampler_step(**own), strict=True):
            assert torch.equal(all_of_them[b : b + 1], alone)


@ways_and_thresholds
def test_nan_and_infinity(threshold: str, way: str) -> None:
    given = {**arguments(LEARNED, (3, 3, 9, 7)), "threshold": THRESHOLDS[threshold]}
    given["sample"][1, 2, 3, 4], given["sample"][2, 0, 0, 0] = math.nan, -math.inf
    assert_accurate(given)
    for y in ops.sampler_step(**given):
        dynamic = isinstance(THRESHOLDS[threshold], DynamicThreshold)
        assert y[1].isnan().sum() == (y[1].numel() if dynamic else 1)
        assert y[0].isfinite().all()


def test_a_nan_in_x0_spoils_a_sample_that_does_not_use_x0(way: str) -> None:
    """diffusers' DDIM, at a step whose next sample takes nothing of x0."""
    row = LEARNED.rows[3:4].clone()
    row[0, 5] = 0
    table = StepTable(row, (0.0,), learned_variance=True)
    given = {**arguments(LEARNED), "table": table, "index": 0}
    given["output"] = given["output"].clone()
    given["output"][1, 2, 8, 6] = math.nan
    for threshold in ("quantile", "known"):
        for y in ops.sampler_step(**given, threshold=THRESHOLDS[threshold]):
            assert y[1].isnan().all()
            assert y[0].isfinite().all()


def test_what_a_coefficient_of_zero_multiplies_does_not_matter(way: str) -> None:
    for column, name in ((3, "sample"), (4, "output"), (6, "previous_x0"), (7, "noise")):
        rows = torch.full((1, LEARNED.rows.shape[1]), 0.5, dtype=torch.float64)
        rows[0, column] = 0
        if column in (3, 4):
            rows[0, column - 3] = 0
        if column == 7:
            rows[0, 2] = 0
        given = {**arguments(TABLES["ddim"]), "table": StepTable(rows, (0.0,)), "index": 0}
        given |= {"previous_x0": torch.randn_like(given["sample"]), name: torch.full_like(given["sample"], math.nan)}
        for threshold in ("none", "quantile"):
            assert all(y.isfinite().all() for y in ops.sampler_step(**given, threshold=THRESHOLDS[threshold])), name


@ways_and_thresholds
def test_an_index_on_the_device(threshold: str, way: str) -> None:
    given = {**arguments(LEARNED, (1, 3, 9, 7), source="seed"), "threshold": THRESHOLDS[threshold]}
    expected = ops.sampler_step(**{**given, "index": 8})
    found = ops.sampler_step(**{**given, "index": torch.tensor(8, dtype=torch.int32)})
    assert all(torch.equal(y, e) for y, e in zip(found, expected, strict=True))
    for i in (-1, 10):
        for y in ops.sampler_step(**{**given, "index": torch.tensor(i)}):
            assert y.isnan().all()


class Spy(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_one_operator_runs() -> None:
    given = {**arguments(LEARNED, source="seed"), "threshold": THRESHOLDS["quantile"], "index": torch.tensor(3)}
    with Spy() as spy:
        ops.sampler_step(**given)
    assert spy.names == ["imagen_fast::sampler_step_triton"]


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 256, 256)], ids=str)
@pytest.mark.parametrize("threshold", range(4))
def test_nothing_is_read_back(threshold: int, shape: tuple[int, ...]) -> None:
    """There is nothing to read in tensors without data."""
    sample, output = (torch.empty(shape[0], c, *shape[2:], device="meta") for c in (3, 6))
    seed, index = (torch.empty(size, dtype=torch.int64, device="meta") for size in ((2,), ()))
    tensors = (sample, output, output, None, None, seed, LEARNED.rows.to("meta"), index)
    with _triton.record(_triton.KNOWN_DEVICES["9.0"]) as launches:
        limits = (0.9, 1.0, 1.5 if threshold == 2 else 1.0)
        kernels.forward(*tensors, True, 5.0, 0.5, True, min(threshold, 2), *limits, True)
    assert launches


def names_of_launches(shape: tuple[int, ...], threshold: str, guidance: str = "plain") -> list[str]:
    with _triton.record(_triton.KNOWN_DEVICES["9.0"]) as launches:
        ops.sampler_step(
            **{**arguments(LEARNED, shape, source="seed"), "guidance": GUIDANCE[guidance]},
            threshold=THRESHOLDS[threshold],
        )
    return [launch.kernel.__name__.removeprefix("sampler_step_").removesuffix("_kernel") for launch in launches]


def test_what_is_launched() -> None:
    base, large = (2, 3, 64, 64), (1, 3, 128, 128)
    count = "abs_quantile_count"
    for threshold in THRESHOLDS:
        assert names_of_launches(base, threshold) == (["tiles"] if threshold in ("none", "static") else ["whole"])
        assert names_of_launches(base, threshold, "both") == ["whole"]
    assert names_of_launches(large, "static") == ["tiles"]
    assert names_of_launches(large, "static", "both") == ["sums", "tiles"]
    assert names_of_launches(large, "quantile") == ["predict", count, count, "tiles"]
    assert names_of_launches(large, "quantile", "both") == ["sums", "predict", count, count, "tiles"]
    assert names_of_launches(large, "known") == ["tiles", "spoil"]
    assert names_of_launches((0, 3, 64, 64), "quantile") == []


def test_opcheck() -> None:
    sample, output = torch.randn(2, 3, 6, 5), torch.randn(2, 6, 6, 5)
    ops.sampler_step(sample, output, LEARNED, 2, seed=0)  # defines the operator
    seed, index = torch.arange(2), torch.tensor(2)
    for write_x0 in (False, True):
        flags = (True, 3.0, 0.0, False, 2, 0.9, 1.0, 1.5, write_x0)
        call = (sample, output, output, None, None, seed, LEARNED.rows, index, *flags)
        torch.library.opcheck(torch.ops.imagen_fast.sampler_step_triton, call)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 3 if rank > 3 else 6)) for _ in range(rank)]
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    torch.manual_seed(draw(st.integers(0, 2**16)))

    def strided(channels: int) -> Tensor:
        """A window into a larger tensor whose dimensions lie in memory in any order."""
        sizes = [shape[0], channels, *shape[2:]]
        order = draw(st.permutations(range(rank)))
        padding = draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
        full = torch.randn([sizes[i] + padding[i] for i in order]).permute([order.index(i) for i in range(rank)])
        return full[tuple(slice(pad, None) for pad in padding)].to(dtype)

    table = TABLES[draw(st.sampled_from(sorted(TABLES)))]
    widths = [2 * shape[1]] if table.learned_variance else [shape[1], 2 * shape[1]]
    call = {"sample": strided(shape[1]), "output": strided(draw(st.sampled_from(widths))), "table": table}
    call |= {"index": draw(st.integers(0, len(table) - 1)), "previous_x0": strided(shape[1])}
    call |= {"threshold": draw(st.sampled_from(list(THRESHOLDS.values()))), "return_x0": draw(st.booleans())}
    if draw(st.booleans()):
        call["unconditional_output"] = strided(draw(st.sampled_from([shape[1], 2 * shape[1]])))
        call["guidance"] = draw(st.sampled_from([0.0, 3.0, Guidance(3.0, remove_parallel=True)]))
    return call | (
        {"seed": draw(st.integers(-(2**63), 2**64))} if draw(st.booleans()) else {"noise": strided(shape[1])}
    )


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_any_call(call: dict[str, Any], way: str) -> None:
    assert_accurate(call)
