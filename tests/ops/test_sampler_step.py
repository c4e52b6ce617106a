"""Numbers of a solver's step on every kernel: layouts, dtypes, shapes, guidance, thresholds, what is not finite."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imagen_fast import layout, ops, use_backend
from imagen_fast.diffusion import DynamicThreshold, Guidance, StepTable, squaredcos_cap_v2
from imagen_fast.testing import assert_as_accurate

ALPHAS = squaredcos_cap_v2(1000)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LEARNED = StepTable.ddpm(ALPHAS, steps=10, variance="learned_range")
X0 = StepTable.ddim(ALPHAS, steps=4, prediction="x0")  # the output is x0, so thresholding is seen directly
TABLES = {
    "ddpm-learned": LEARNED,
    "ddpm-large": StepTable.ddpm(ALPHAS, steps=10, variance="fixed_large"),
    "ddim": StepTable.ddim(ALPHAS, steps=10, prediction="v"),
    "ddim-eta": StepTable.ddim(ALPHAS, steps=10, eta=0.7),
    "dpm-2m": StepTable.dpm_solver_pp(ALPHAS, steps=20),
    "dpm-2m-sde": StepTable.dpm_solver_pp(ALPHAS, steps=20, sde=True),
    "euler-churn": StepTable.euler(ALPHAS, steps=10, churn=5.0),
    "heun": StepTable.heun(ALPHAS, steps=6),
}
THRESHOLDS = {
    "none": None,
    "static": "static",
    "paper": DynamicThreshold(0.995),
    "if": DynamicThreshold(0.95, max_value=1.5),
    "if-super": DynamicThreshold(0.95, max_value=1.0),
    "low": DynamicThreshold(0.5, min_value=0.1),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(
    table: StepTable,
    shape: tuple[int, ...] = (2, 3, 9, 7),
    dtype: torch.dtype = torch.float32,
    sample_layout: str = "nchw",
    output_layout: str = "nchw",
) -> dict[str, Any]:
    """Outputs are the halves of one batch, as a U-Net gives them under guidance."""
    batch, channels, *positions = shape

    def tensor(*sizes: int, laid_out: str) -> Tensor:
        x = torch.randn(sizes).to(dtype)
        return layout.channels_last(x) if laid_out == "nhwc" else x

    both = tensor(2 * batch, (2 if table.learned_variance else 1) * channels, *positions, laid_out=output_layout)
    unconditional, conditional = both.chunk(2) if batch else (both, both)
    given = {
        "sample": tensor(*shape, laid_out=sample_layout),
        "output": conditional,
        "table": table,
        "index": 3,
        "unconditional_output": unconditional,
        "guidance": 3.0,
        "return_x0": True,
    }
    if table.uses("noise_scale") or table.uses("x0_from_noise"):
        given["noise"] = tensor(*shape, laid_out=output_layout)
    if table.uses("next_from_previous_x0"):
        given["previous_x0"] = tensor(*shape, laid_out=sample_layout)
    return given


def to_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def strides_that_matter(y: Tensor) -> list[int]:
    return [stride for stride, size in zip(y.stride(), y.shape, strict=True) if size > 1] if y.numel() else []


def assert_accurate(given: dict[str, Any]) -> None:
    ours = ops.sampler_step(**given)
    with use_backend("eager"):
        eager, truth = ops.sampler_step(**given), ops.sampler_step(**to_float64(given))
    for name, y, e, t in zip(("next", "x0"), ours, eager, truth, strict=True):
        assert (y is None) == (e is None)
        if y is not None:
            assert strides_that_matter(y) == strides_that_matter(e)
            assert_as_accurate(y, e, t, name=name)


@dtypes
@pytest.mark.parametrize("solver", TABLES)
def test_solvers(kernel: str, solver: str, dtype: torch.dtype) -> None:
    assert_accurate(arguments(TABLES[solver], dtype=dtype))


NOTHING = [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 0), (1, 3, 2, 0, 4)]


@pytest.mark.parametrize("shape", NOTHING, ids=str)
def test_nothing_to_step(kernel: str, shape: tuple[int, ...]) -> None:
    assert_accurate(arguments(LEARNED, shape) | {"threshold": THRESHOLDS["if"]})


def test_nothing_to_step_in_any_strides(kernel: str) -> None:
    given = arguments(LEARNED, (2, 3, 8, 5))
    assert_accurate({name: x[:0, :, ::2] if isinstance(x, Tensor) else x for name, x in given.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [(5, 8), (6, 3)], ids=str)
@pytest.mark.parametrize("output_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("guidance", [3.0, Guidance(3.0, 0.7, True)], ids=["plain", "sums"])
@pytest.mark.parametrize("threshold", ["none", "if"])
def test_further_channels_are_ignored(
    kernel: str,
    dtype: torch.dtype,
    channels: tuple[int, int],
    output_layout: str,
    guidance: float | Guidance,
    threshold: str,
) -> None:
    """Of the output and of the unconditional one, however many, where the table has no learned variance."""
    given = arguments(TABLES["ddim-eta"], (2, 3, 8, 8), dtype, output_layout=output_layout)
    given |= {"guidance": guidance, "threshold": THRESHOLDS[threshold]}
    expected = ops.sampler_step(**given)
    for name, count in zip(("output", "unconditional_output"), channels, strict=True):
        wide = torch.full((2, count, 8, 8), math.nan, dtype=dtype)
        wide = layout.channels_last(wide) if output_layout == "nhwc" else wide
        wide[:, :3] = given[name]
        given[name] = wide
    assert_accurate(given)
    for y, e in zip(ops.sampler_step(**given), expected, strict=True):
        torch.testing.assert_close(y, e)


@pytest.mark.parametrize("channels", [3, 6])
def test_the_unconditional_output_may_have_no_variance(kernel: str, channels: int) -> None:
    given = arguments(LEARNED)
    assert_accurate(given | {"unconditional_output": given["unconditional_output"][:, :channels]})


@dtypes
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds(kernel: str, threshold: str, dtype: torch.dtype) -> None:
    assert_accurate({**arguments(LEARNED, dtype=dtype), "threshold": THRESHOLDS[threshold]})


@dtypes
@pytest.mark.parametrize(
    "guidance",
    [1.0, 0.0, 7.5, Guidance(5.0, rescale=0.7), Guidance(5.0, remove_parallel=True), Guidance(4.0, 0.3, True)],
    ids=["1", "0", "7.5", "rescale", "parallel", "both"],
)
def test_guidance(kernel: str, guidance: float | Guidance, dtype: torch.dtype) -> None:
    given = {**arguments(TABLES["ddim"], (3, 3, 33, 31), dtype), "guidance": guidance}
    assert_accurate(given)
    # A large mean costs the deviations nothing.
    for name in ("output", "unconditional_output"):
        given[name] = (given[name] + 100).to(dtype)
    assert_accurate(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layouts", list(itertools.product(("nchw", "nhwc"), repeat=2)), ids="-".join)
@pytest.mark.parametrize("solver", ["ddpm-learned", "dpm-2m-sde"])
def test_layouts(kernel: str, layouts: tuple[str, str], solver: str, dtype: torch.dtype) -> None:
    for threshold in (None, DynamicThreshold(0.9)):
        assert_accurate({**arguments(TABLES[solver], (2, 3, 24, 25), dtype, *layouts), "threshold": threshold})


@pytest.mark.parametrize(
    "shape",
    [(2, 3), (1, 1), (2, 3, 5), (1, 3, 2, 3, 5), (0, 3, 4, 4), (2, 3, 0, 4), (5, 1, 9, 11), (1, 3, 129, 131)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("threshold", [None, DynamicThreshold(0.95)], ids=["plain", "dynamic"])
def test_shapes(kernel: str, shape: tuple[int, ...], threshold: DynamicThreshold | None) -> None:
    if threshold is not None and 0 in shape[1:]:
        pytest.skip("the quantile of nothing")
    assert_accurate({**arguments(LEARNED, shape), "threshold": threshold})


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 8)) for _ in range(rank)]
    dtype = draw(st.sampled_from(DTYPES))
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
    given = {
        "sample": strided(shape[1]),
        "output": strided(draw(st.sampled_from(widths))),
        "table": table,
        "index": draw(st.integers(0, len(table) - 1)),
        "previous_x0": strided(shape[1]),
        "threshold": draw(st.sampled_from([None, "static", DynamicThreshold(0.9), DynamicThreshold(0.9, 0.2, 0.2)])),
        "return_x0": draw(st.booleans()),
    }
    if draw(st.booleans()):
        given["unconditional_output"] = strided(draw(st.sampled_from([shape[1], 2 * shape[1]])))
        given["guidance"] = draw(st.sampled_from([0.0, 3.0, Guidance(3.0, remove_parallel=True)]))
    # (In float64 a drawn noise shows that it is exact to 2 ulp of float32.)
    from_seed = dtype != torch.float64 and draw(st.booleans())
    given |= {"seed": draw(st.integers(-(2**63), 2**64))} if from_seed else {"noise": strided(shape[1])}
    return given


@settings(max_examples=100, deadline=None, derandomize=True)
@given(given=calls())
def test_any_call(given: dict[str, Any]) -> None:
    assert_accurate(given)


def test_expanded_tensors_and_slices_of_channels(kernel: str) -> None:
    wide = layout.channels_last(torch.randn(2, 8, 6, 5))
    given = {**arguments(LEARNED, (2, 3, 6, 5)), "output": wide[:, 1:7], "threshold": DynamicThreshold(0.9)}
    given["noise"] = torch.randn(1, 3, 6, 5).expand(2, 3, 6, 5)
    given["unconditional_output"] = torch.randn(2, 1, 6, 5).expand(2, 3, 6, 5)
    assert_accurate(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_tensors_of_other_dtypes_are_not_rounded_to_that_of_the_sample(backend: str, dtype: torch.dtype) -> None:
    """In 16 bits it would show: rounding the output costs digits that a small ᾱ multiplies."""
    given = {**arguments(TABLES["ddim"]), "index": 0}
    expected, _ = ops.sampler_step(**given)
    narrow = given["sample"].bfloat16()
    given["sample"] = narrow.float()
    expected, _ = ops.sampler_step(**given)
    given["sample"] = narrow
    assert torch.equal(ops.sampler_step(**given)[0], expected.bfloat16())


def test_dynamic_threshold_is_exact(kernel: str) -> None:
    """Against numpy's quantile in float64, taken by hand, at a size that is more than one chunk of the search."""
    output = 3 * torch.randn(2, 3, 200, 180)
    for percentile in (0.5, 0.95, 0.995):
        _, x0 = ops.sampler_step(output, output, X0, 0, threshold=DynamicThreshold(percentile, 0.5), return_x0=True)
        limit = output.double().abs().flatten(1).quantile(percentile, dim=1)[:, None, None, None]
        torch.testing.assert_close(x0.double(), (output / limit).clamp(-1, 1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("max_value", [None, 1.0, 1.5])
@dtypes
def test_a_nan_spoils_its_whole_sample_under_a_dynamic_threshold(
    kernel: str, dtype: torch.dtype, max_value: float | None
) -> None:
    given = {**arguments(LEARNED, dtype=dtype), "threshold": DynamicThreshold(0.95, max_value=max_value)}
    given["output"] = given["output"].clone()
    given["output"][1, 2, 3, 4] = math.nan
    for y in ops.sampler_step(**given):
        assert y[1].isnan().all()
        assert y[0].isfinite().all()


@pytest.mark.parametrize("threshold", [None, "static"])
def test_a_nan_stays_where_it_is_otherwise(kernel: str, threshold: str | None) -> None:
    given = {**arguments(LEARNED), "threshold": threshold}
    given["sample"][1, 2, 3, 4] = math.nan
    for y in ops.sampler_step(**given):
        assert y.isnan().sum() == 1
        assert y[1, 2, 3, 4].isnan()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_infinities(kernel: str, threshold: str) -> None:
    given = {**arguments(LEARNED), "threshold": THRESHOLDS[threshold]}
    given["sample"][1, 2, 3, 4], given["sample"][0, 0, 0, 0] = math.inf, -math.inf
    assert_accurate(given)


def test_what_a_coefficient_of_zero_multiplies_does_not_matter(kernel: str) -> None:
    given = arguments(X0)
    given["sample"] = torch.full_like(given["sample"], math.nan)
    _, x0 = ops.sampler_step(**given)
    assert x0.isfinite().all()
    given = {**arguments(LEARNED), "index": len(LEARNED) - 1}  # adds no noise
    given["noise"] = torch.full_like(given["noise"], math.inf)
    assert ops.sampler_step(**given)[0].isfinite().all()


def test_extreme_log_variances(kernel: str) -> None:
    given = arguments(LEARNED)
    variance = torch.tensor([-1e4, -30.0, -1.0, 1.0, 40.0, math.inf, math.nan])
    given["output"] = given["output"].clone()
    given["output"][:, 3:] = variance
    assert_accurate(given)


@pytest.mark.not_interpreted("tests/triton/interpreted/test_sampler_step.py does this, without threads")
@pytest.mark.parametrize("layout_name", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(1, 3, 150, 149), (4, 3, 9, 7), (3, 3, 65, 66)], ids=str)
def test_does_not_depend_on_threads_and_batch(kernel: str, shape: tuple[int, ...], layout_name: str) -> None:
    given = arguments(LEARNED, shape, torch.float32, layout_name, layout_name)
    given |= {"guidance": Guidance(4.0, 0.5, True), "threshold": DynamicThreshold(0.9)}
    del given["noise"]
    seeds = torch.arange(shape[0]) * 1000
    alone = []
    for b in range(shape[0]):
        own = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in given.items()}
        alone.append(ops.sampler_step(**own, seed=seeds[b : b + 1]))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5) if kernel.startswith("cpu") else (1,):
            torch.set_num_threads(n)
            whole = ops.sampler_step(**given, seed=seeds)
            for i in range(2):
                assert torch.equal(whole[i], torch.cat([pair[i] for pair in alone]))
    finally:
        torch.set_num_threads(threads)


def test_input_is_not_written(backend: str) -> None:
    given = {**arguments(LEARNED), "threshold": DynamicThreshold(0.9)}
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    ops.sampler_step(**given)
    assert all(torch.equal(given[name], value) for name, value in before.items())
