from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from imagen_fast import _native, backends, ops, use_backend
from imagen_fast.diffusion import StepTable, squaredcos_cap_v2
from imagen_fast.testing import (
    assert_as_accurate,
    assert_model_as_accurate,
    assert_op_as_accurate,
    assert_sampling_as_accurate,
    sampling_error,
)

needs_library = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def three_results(dtype: torch.dtype, shape: tuple[int, ...] = (4, 33)) -> tuple[Tensor, Tensor, Tensor]:
    """Ours is correctly rounded, eager is off by up to an ulp more."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(shape, dtype=torch.float64, generator=generator)
    noise = torch.rand(shape, dtype=torch.float64, generator=generator) - 0.5
    eager = truth * (1 + 2 * torch.finfo(dtype).eps * noise)
    return truth.to(dtype, copy=True), eager.to(dtype), truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_a_correctly_rounded_result(dtype: torch.dtype) -> None:
    ours, eager, truth = three_results(dtype)
    assert_as_accurate(ours, eager, truth)
    assert_model_as_accurate(ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_eager_itself(dtype: torch.dtype) -> None:
    _, eager, truth = three_results(dtype)
    assert_as_accurate(eager, eager, truth)
    assert_model_as_accurate(eager, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_one_bad_element(dtype: torch.dtype) -> None:
    ours, eager, truth = three_results(dtype)
    ours[2, 5] += 0.25
    with pytest.raises(AssertionError, match=r"at \(2, 5\)") as failure:
        assert_as_accurate(ours, eager, truth, name="gradient of x")
    message = str(failure.value)
    for part in ("gradient of x", f"ours {ours[2, 5].item():.9g}", f"truth {truth[2, 5].item():.9g}", "1 of 132"):
        assert part in message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_shifted_result(dtype: torch.dtype) -> None:
    ours, eager, truth = three_results(dtype)
    with pytest.raises(AssertionError, match="less accurate"):
        assert_as_accurate(ours.roll(1, 0), eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_small_deviation_everywhere(dtype: torch.dtype) -> None:
    """Hidden under the floor of the largest error, which follows the one large element."""
    unit = 1e-5 if dtype == torch.float32 else max(torch.finfo(dtype).eps, 1e-12)
    truth = 1 + torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth[0] = 20
    off = truth * (1 + 8 * unit)
    off[0] = 20
    eager = truth.to(dtype)
    with pytest.raises(AssertionError, match="all over"):
        assert_as_accurate(off.to(dtype), eager, truth)


@pytest.mark.parametrize("loose", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rejects_the_accuracy_of_a_narrower_dtype(dtype: torch.dtype, loose: torch.dtype) -> None:
    ours, eager, truth = three_results(dtype)
    with pytest.raises(AssertionError, match="less accurate"):
        assert_as_accurate(ours.to(loose).to(dtype), eager, truth)
    with pytest.raises(AssertionError, match="relative error"):
        assert_model_as_accurate(ours.to(loose).to(dtype), eager, truth)


def test_rejects_three_times_the_error_of_eager() -> None:
    _, _, truth = three_results(torch.bfloat16)
    step = 0.05 * truth.sign()
    with pytest.raises(AssertionError, match="less accurate"):
        assert_as_accurate((truth + 3 * step).bfloat16(), (truth + step).bfloat16(), truth)


@pytest.mark.parametrize(
    ("ours", "eager", "truth"),
    [
        pytest.param(math.nan, 1.0, 1.0, id="nan-for-a-number"),
        pytest.param(1.0, math.nan, math.nan, id="number-for-nan"),
        pytest.param(math.inf, 1.0, 1.0, id="inf-for-a-number"),
        pytest.param(math.inf, -math.inf, -math.inf, id="wrong-sign"),
        pytest.param(math.nan, math.inf, math.inf, id="nan-for-inf"),
    ],
)
@pytest.mark.parametrize("check", [assert_as_accurate, assert_model_as_accurate, assert_sampling_as_accurate])
def test_rejects_what_is_not_finite_in_the_wrong_place(check, ours: float, eager: float, truth: float) -> None:
    results = three_results(torch.float32)
    for result, value in zip(results, (ours, eager, truth), strict=True):
        result[3, 7] = value
    with pytest.raises(AssertionError, match=r"at \(3, 7\)"):
        check(*results)


@pytest.mark.parametrize(
    ("ours", "eager", "truth"),
    [
        pytest.param(math.nan, math.nan, math.nan, id="nan"),
        pytest.param(-math.inf, -math.inf, -math.inf, id="inf"),
        pytest.param(math.inf, math.inf, 1e5, id="overflow-as-eager"),
        pytest.param(6e4, math.inf, 6e4, id="finite-as-the-truth"),
    ],
)
def test_accepts_what_is_not_finite_in_the_right_place(ours: float, eager: float, truth: float) -> None:
    results = three_results(torch.float16)
    for result, value in zip(results, (ours, eager, truth), strict=True):
        result[3, 7] = value
    assert_as_accurate(*results)


def test_a_bad_element_beside_an_infinity_is_found() -> None:
    results = three_results(torch.float32)
    for result in results:
        result[0, 0] = math.inf
    results[0][1, 1] += 1
    with pytest.raises(AssertionError, match=r"at \(1, 1\)"):
        assert_as_accurate(*results)


def test_rejects_another_shape_or_dtype() -> None:
    ours, eager, truth = three_results(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(ours[:, :32], eager, truth)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_as_accurate(ours.bfloat16(), eager, truth)
    with pytest.raises(TypeError, match="float64"):
        assert_as_accurate(ours, eager, truth.float())
    with pytest.raises(TypeError, match="floating"):
        assert_as_accurate(ours.int(), eager.int(), truth)


def test_numbers_whose_squares_overflow_are_compared() -> None:
    truth = torch.tensor([1e300, 2e300], dtype=torch.float64)
    assert_model_as_accurate(truth, truth, truth)
    with pytest.raises(AssertionError, match="less accurate"):
        assert_model_as_accurate(1.1 * truth, truth, truth)


def test_arrays_are_refused_by_name() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="eager must be a tensor, got ndarray"):
        assert_as_accurate(x, x.numpy(), x)  # type: ignore[arg-type]


def test_accepts_empty_results() -> None:
    assert_as_accurate(*three_results(torch.float32, (0, 3)))
    assert_model_as_accurate(*three_results(torch.float32, (0, 3)))
    assert_sampling_as_accurate(*three_results(torch.float32, (0, 3)))


def test_a_model_may_be_half_as_wrong_again_as_eager_and_no_more() -> None:
    _, _, truth = three_results(torch.bfloat16, (64, 64))
    direction = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eager, good, bad = ((truth + step * direction).bfloat16() for step in (0.1, 0.14, 0.16))
    assert_model_as_accurate(good, eager, truth)
    with pytest.raises(AssertionError, match="relative error"):
        assert_model_as_accurate(bad, eager, truth)


class TestAssertSamplingAsAccurate:
    """Samples whose errors are what they are meant to be, exactly."""

    truth = torch.ones(16, 3, 4, dtype=torch.float64)
    eager = truth * (1 + 2.0 ** -torch.arange(4, 20).view(-1, 1, 1))

    def test_one_sample_of_a_large_error_is_not_the_rule(self) -> None:
        ours = self.eager.clone()
        ours[8] += 2.0**-6  # where eager is off by 2^-12
        with pytest.raises(AssertionError):
            assert_model_as_accurate(ours[4:], self.eager[4:], self.truth[4:])
        assert_sampling_as_accurate(ours[4:], self.eager[4:], self.truth[4:])

    @pytest.mark.parametrize("which", [slice(None), slice(0, 16, 2), slice(1, 16, 2)], ids=["all", "even", "odd"])
    def test_rejects_samples_that_are_less_accurate(self, which: slice) -> None:
        ours, worse = self.eager.clone(), self.eager.clone()
        ours[which] += 0.4 * (self.eager - self.truth)[which]
        worse[which] += 1.6 * (self.eager - self.truth)[which]
        assert_sampling_as_accurate(ours, self.eager, self.truth)
        with pytest.raises(AssertionError, match=r"samples are less accurate .* geometric mean over 16"):
            assert_sampling_as_accurate(worse, self.eager, self.truth)

    def test_rejects_a_few_wrong_samples(self) -> None:
        ours = self.eager.clone()
        ours[[5, 11]] *= -1
        with pytest.raises(AssertionError, match="less accurate"):
            assert_sampling_as_accurate(ours, self.eager, self.truth)

    def test_the_error_is_the_geometric_mean(self) -> None:
        error, allowed = sampling_error(self.eager, self.eager, self.truth)
        assert error == pytest.approx(2.0 ** (-sum(range(4, 20)) / 16), rel=1e-9)
        assert allowed == pytest.approx(1.5 * error)

    def test_a_sample_without_an_error_does_not_excuse_the_others(self) -> None:
        eager = self.eager.clone()
        eager[0] = self.truth[0]
        assert sampling_error(eager, eager, self.truth)[0] > 1e-5


class TestAssertOpAsAccurate:
    """With ops that are wrong on one backend alone."""

    def test_accepts_a_right_op(self) -> None:
        assert_op_as_accurate(wrong, torch.randn(3, 5), torch.randn(5), fault="")

    def test_names_the_wrong_result(self) -> None:
        with pytest.raises(AssertionError, match="result 0 of wrong"):
            assert_op_as_accurate(wrong, torch.randn(3, 5), torch.randn(5), fault="result")

    def test_names_the_wrong_gradient(self) -> None:
        with pytest.raises(AssertionError, match="gradient of gain of wrong"):
            assert_op_as_accurate(wrong, torch.randn(3, 5), gain=torch.randn(5), fault="gradient")

    def test_names_wrong_strides(self) -> None:
        with pytest.raises(AssertionError, match="strides"):
            assert_op_as_accurate(wrong, torch.randn(3, 5), torch.randn(5), fault="strides")


class TestOpsWithoutABackwardPass:
    """Their kernels run where no gradient is asked for, so that their results alone can be compared."""

    TABLE = StepTable.ddim(squaredcos_cap_v2(1000), steps=6, eta=0.5)

    def test_accepts_a_right_kernel(self, backend: str) -> None:
        sample, output, noise = (torch.randn(2, 3, 5, 4) for _ in range(3))
        assert_op_as_accurate(ops.sampler_step, sample, output, self.TABLE, 1, noise=noise, return_x0=True)
        assert_op_as_accurate(ops.abs_quantile, sample, 0.9)

    @needs_library
    @pytest.mark.parametrize("name", ["auto", "cpu"])
    @pytest.mark.parametrize("op", ["sampler_step", "abs_quantile"])
    def test_names_the_wrong_result_of_a_kernel(self, monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> None:
        x, module = torch.randn(2, 3, 5, 4), sys.modules[f"imagen_fast.ops.{op}"]
        right = module._cpu

        def wrong(*arguments: object) -> object:
            result = right(*arguments)
            return result + 1e-3 if op == "abs_quantile" else (result[0] + 1e-3, result[1])

        monkeypatch.setattr(module, "_cpu", wrong)
        with use_backend(name), pytest.raises(AssertionError, match=f"result 0 of {op}"):
            if op == "abs_quantile":
                assert_op_as_accurate(ops.abs_quantile, x, 0.9)
            else:
                assert_op_as_accurate(ops.sampler_step, x, x, self.TABLE, 1, seed=0)

    def test_a_tensor_that_does_not_matter_has_a_gradient_of_zero(self) -> None:
        x = torch.randn(2, 3, 5, 4)
        with use_backend("eager"):
            assert_op_as_accurate(ops.sampler_step, x, x, self.TABLE, 1, noise=x, previous_x0=x)
        assert_op_as_accurate(ignores, x, torch.randn(3))
        with pytest.raises(AssertionError, match="gradient of gain of ignores"):
            assert_op_as_accurate(ignores, x, torch.randn(3), on_eager=False)


def ignores(x: Tensor, gain: Tensor, on_eager: bool = True) -> Tensor:
    """Of the second tensor nothing comes through; or, on eager, a gradient."""
    y = 2 * x
    if not on_eager and backends._state.selection.backend == "eager":
        y = y + (gain - gain.detach()).sum()
    return y


def wrong(x: Tensor, gain: Tensor, fault: str) -> Tensor:
    y = x * gain
    if backends._state.selection.backend == "eager":
        return y
    if fault == "result":
        return y + 1e-3
    if fault == "gradient":
        return y + 1e-3 * (gain - gain.detach())
    return y.t().contiguous().t() if fault == "strides" else y
