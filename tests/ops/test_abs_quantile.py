"""The exact quantile of magnitudes: values, ties, what is not finite, sizes, layouts, and the op's promises."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import imagen_fast
from imagen_fast import layout, ops

PERCENTILES = (0.0, 0.5, 0.95, 0.995, 1.0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IN_SMALL_TILES = pytest.mark.not_interpreted("tests/triton/interpreted/test_abs_quantile.py does this in small tiles")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def truth(x: Tensor, q: float) -> Tensor:
    """By numpy in float64, with the limits it does not take: 0 of an infinity is nothing, and inf - inf is inf."""
    values = np.sort(np.abs(x.double().flatten(1).numpy()), axis=1)
    place = q * (values.shape[1] - 1)
    rank = int(place)
    lower, upper = values[:, rank], values[:, min(rank + 1, values.shape[1] - 1)]
    if place == rank:
        result = lower
    else:
        with np.errstate(invalid="ignore"):
            result = np.where(np.isinf(upper), upper, lower + (place - rank) * (upper - lower))
    return torch.from_numpy(np.where(np.isnan(values[:, -1]), np.nan, result))


def assert_exact(x: Tensor, q: float) -> None:
    """To one ulp of float32, of float64 for float64."""
    ours, true = ops.abs_quantile(x, q), truth(x, q)
    assert ours.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    true = true.to(ours.dtype)
    off = (torch.nextafter(true, ours) != ours) & (true != ours) & ~(true.isnan() & ours.isnan())
    assert not off.any(), f"q = {q}, shape {tuple(x.shape)}: ours {ours[off][:3]}, true {true[off][:3]}"


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "ties": lambda x: (4 * x).round() / 4,
    "two-values": lambda x: x.sign() * (1 + (x > 1)),
    "constant": lambda x: torch.full_like(x, -2.5),
    "zeros-and-one": lambda x: torch.zeros_like(x).index_fill_(1, torch.tensor([0]), 1.0),
    "sorted": lambda x: x.sort(dim=1).values,
    "falling": lambda x: x.sort(dim=1, descending=True).values,
    "wide-range": lambda x: (8 * x).exp(),
    "subnormal": lambda x: x * 1e-42,
    "half-infinite": lambda x: torch.where(x > 0, torch.inf, x),
    "periodic": lambda x: x.flatten()[torch.arange(x.shape[1]) % 97].expand_as(x).contiguous(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [100, 5000, 12_288, pytest.param(70_001, marks=IN_SMALL_TILES)])
def test_values(kernel: str, kind: str, n: int) -> None:
    x = KINDS[kind](torch.randn(2, n))
    for q in PERCENTILES:
        assert_exact(x, q)


def test_eager_is_exact_too() -> None:
    with imagen_fast.use_backend("eager"):
        for kind in KINDS.values():
            for q in (*PERCENTILES, 0.3):
                assert_exact(kind(torch.randn(2, 5000)), q)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "n", [1, 2, 3, 24, 25, 31, 4096, 4097, *(pytest.param(n, marks=IN_SMALL_TILES) for n in (32_768, 32_769, 100_003))]
)
def test_sizes_and_dtypes(kernel: str, dtype: torch.dtype, n: int) -> None:
    x = torch.randn(3, n).to(dtype)
    for q in (*PERCENTILES, 1 / 3, 0.9999):
        assert_exact(x, q)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=80),
    repeats=st.integers(1, 100),
    q=st.floats(0, 1),
)
def test_any_values(values: list[float], repeats: int, q: float) -> None:
    assert_exact(torch.tensor([values]).repeat(1, repeats), q)


def test_more_than_torch_quantile_takes(backend: str) -> None:
    """2^24 + 3 values of a known order: the magnitudes 0, 1, ..., all exact in float32."""
    n = 2**24 + 3
    x = torch.arange(n, dtype=torch.int32).flip(0).clamp(max=2**24).float()
    x[::2] *= -1
    for q in (0.0, 0.5, 0.995):
        place = q * (n - 1)
        assert ops.abs_quantile(x[None], q).item() == pytest.approx(place, rel=1e-7, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("place", [0, 6000, 12_287])
def test_a_nan_spoils_its_own_sample_alone(kernel: str, dtype: torch.dtype, place: int) -> None:
    x = torch.randn(3, 12_288).to(dtype)
    x[1, place] = math.nan
    for q in PERCENTILES:
        result = ops.abs_quantile(x, q)
        assert result.isnan().tolist() == [False, True, False]


def test_infinities(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0, math.inf, -math.inf]])
    for q, expected in ((0, 1.0), (1 / 3, 2.0), (0.5, math.inf), (2 / 3, math.inf), (0.9, math.inf), (1, math.inf)):
        assert ops.abs_quantile(x, q).item() == expected


@pytest.mark.parametrize("kind", ["nchw", "nhwc", "every-other-sample", "permuted", "expanded"])
def test_layouts_that_are_read_in_place(backend: str, kind: str) -> None:
    x = {
        "nchw": torch.randn(3, 3, 17, 9),
        "nhwc": layout.channels_last(torch.randn(3, 3, 17, 9)),
        "every-other-sample": torch.randn(6, 3, 17, 9)[::2],
        "permuted": torch.randn(9, 3, 3, 17).permute(1, 2, 3, 0).transpose(1, 3).contiguous().transpose(1, 3),
        "expanded": torch.randn(1, 3, 17, 9).expand(3, 3, 17, 9),
    }[kind]
    assert imagen_fast.explain("abs_quantile", x, 0.5).notes == ()
    assert_exact(x, 0.37)


def test_other_layouts_are_copied_and_explain_says_so(backend: str) -> None:
    x = torch.randn(3, 3, 17, 9)[..., ::2]
    assert_exact(x, 0.37)
    assert imagen_fast.explain("abs_quantile", x, 0.5).notes == ("x will be copied: its samples are not dense",)


@IN_SMALL_TILES
def test_does_not_depend_on_batch_and_threads(kernel: str) -> None:
    x = torch.randn(5, 150_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results += [ops.abs_quantile(x, 0.95), torch.cat([ops.abs_quantile(row[None], 0.95) for row in x])]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def test_no_samples(backend: str) -> None:
    assert ops.abs_quantile(torch.randn(0, 3, 4, 4), 0.5).shape == (0,)


@pytest.mark.parametrize("q", [np.float32(0.37), np.float64(0.37), np.int64(1)], ids=repr)
def test_the_percentile_may_be_a_number_of_numpy(backend: str, q: Any) -> None:
    """And is what it is in float64, as any other."""
    x = torch.randn(2, 5000)
    assert torch.equal(ops.abs_quantile(x, q), ops.abs_quantile(x, float(q)))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
@pytest.mark.parametrize("rows", [1, 4], ids=["of-a-sample", "of-a-thread"])
def test_memory_that_is_not_there_raises(rows: int) -> None:
    """In a process of its own, as all of it would end otherwise."""
    program = f"""if True:
        import resource, torch
        from imagen_fast import ops
        torch.set_num_threads(2)
        x = torch.randn({rows}, 1 << 22)
        ops.abs_quantile(x[:, :100000].contiguous(), 0.5)  # starts the threads
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), -1))
        try:
            ops.abs_quantile(x, 0.5)
        except RuntimeError as error:
            assert "out of memory: a kernel needs 16777" in str(error), error
        else:
            raise AssertionError("there was memory enough")
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert ops.abs_quantile(x, 0.5).isfinite().all()
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_gradients_are_those_of_eager() -> None:
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.abs_quantile(x, 0.4), x)
    reasons = imagen_fast.explain("abs_quantile", x, 0.4).reasons
    assert "no backward pass" in (reasons["cpu"] or "")


def test_opcheck() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.imagen_fast.abs_quantile_cpu, (torch.randn(2, 50).to(dtype), 0.95))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(ops.abs_quantile, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 8, 6), (3, 3, 7, 5)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x, 0.95), ops.abs_quantile(x, 0.95))


@pytest.mark.parametrize(
    ("x", "q", "error", "message"),
    [
        ([1.0], 0.5, TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), 0.5, TypeError, "x must be float16.*got torch.int64"),
        (torch.ones(3), 0.5, ValueError, r"x must have at least 2 dimensions.*\(3,\)"),
        (torch.ones(2, 0), 0.5, ValueError, r"x must have values in each sample, got shape \(2, 0\)"),
        (torch.ones(2, 3), 1.5, ValueError, "q must be between 0 and 1, got 1.5"),
        (torch.ones(2, 3), math.nan, ValueError, "q must be between 0 and 1, got nan"),
        (torch.ones(2, 3), "half", TypeError, "q must be a number"),
    ],
)
def test_wrong_arguments_are_named(backend: str, x: Tensor, q: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.abs_quantile(x, q)
