"""Forward noising: numbers, gradients, moments, and what the op promises besides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import imagen_fast
from imagen_fast import layout, ops
from imagen_fast.diffusion import linear_betas, squaredcos_cap_v2
from imagen_fast.testing import assert_op_as_accurate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def call(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, x0_layout: str = "nchw", noise_layout: str = "nchw"
) -> tuple[Tensor, ...]:
    x0, noise = (torch.randn(shape).to(dtype) for _ in range(2))
    x0 = layout.channels_last(x0) if x0_layout == "nhwc" else x0
    noise = layout.channels_last(noise) if noise_layout == "nhwc" else noise
    return x0, noise, linear_betas(50), torch.randint(50, shape[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("x0_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("noise_layout", ["nchw", "nhwc"])
def test_dtypes_and_layouts(kernel: str, dtype: torch.dtype, x0_layout: str, noise_layout: str) -> None:
    assert_op_as_accurate(ops.add_noise, *call((3, 3, 9, 7), dtype, x0_layout, noise_layout))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 1), (1, 1, 1, 1), (4, 3, 65, 33), (1, 3, 3, 5, 2)], ids=str)
def test_shapes(kernel: str, shape: tuple[int, ...]) -> None:
    assert_op_as_accurate(ops.add_noise, *call(shape))


NOTHING = [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 0), (1, 3, 2, 0, 4)]


@pytest.mark.parametrize("shape", NOTHING, ids=str)
def test_nothing_to_noise(kernel: str, shape: tuple[int, ...]) -> None:
    assert_op_as_accurate(ops.add_noise, *call(shape))


def test_nothing_to_noise_in_any_strides(kernel: str) -> None:
    x0, noise, alphas, t = call((2, 3, 8, 5))
    assert_op_as_accurate(ops.add_noise, x0[:0, :, ::2], noise[:0, :, ::2], alphas, t[:0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    rank = data.draw(st.integers(2, 5))
    shape = [data.draw(st.integers(1, 9)) for _ in range(rank)]

    def strided() -> Tensor:
        order = data.draw(st.permutations(range(rank)))
        padding = data.draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
        full = torch.randn([shape[i] + padding[i] for i in order]).permute([order.index(i) for i in range(rank)])
        return full[tuple(slice(pad, None) for pad in padding)]

    assert_op_as_accurate(ops.add_noise, strided(), strided(), linear_betas(9), torch.randint(9, shape[:1]))


def test_halves_of_one_tensor_and_expanded_noise(kernel: str) -> None:
    both = layout.channels_last(torch.randn(4, 6, 5, 7))
    x0, noise = both[:2, :3], both[2:3, 3:].expand(2, 3, 5, 7)
    assert_op_as_accurate(ops.add_noise, x0, noise, linear_betas(9), torch.tensor([8, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_infinities_and_nan_stay_where_they_are(kernel: str, dtype: torch.dtype) -> None:
    x0, noise, alphas, t = call((2, 3, 9, 7), dtype)
    x0[0, 1, 2, 3], noise[1, 0, 4, 4], noise[0, 0, 0, 0] = math.inf, -math.inf, math.nan
    y = ops.add_noise(x0, noise, alphas, t)
    assert y[0, 1, 2, 3] == math.inf
    assert y[1, 0, 4, 4] == -math.inf
    assert y[0, 0, 0, 0].isnan()
    assert y.isfinite().sum() == y.numel() - 3


def test_timesteps_out_of_range_spoil_their_own_sample_alone(backend: str) -> None:
    x0, noise, alphas, _ = call((4, 3, 5, 5))
    y = ops.add_noise(x0, noise, alphas, torch.tensor([0, 50, -1, 49]))
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("timesteps", [7, torch.tensor(7), torch.tensor([7, 7], dtype=torch.int32)], ids=repr)
def test_forms_of_timesteps(backend: str, timesteps: Tensor | int) -> None:
    x0, noise, alphas, _ = call((2, 3, 5, 5))
    expected = ops.add_noise(x0, noise, alphas, torch.tensor([7, 7]))
    assert torch.equal(ops.add_noise(x0, noise, alphas, timesteps), expected)
    assert torch.equal(ops.add_noise(x0, noise, alphas.repeat_interleave(2)[::2], timesteps), expected)


def test_a_timestep_may_be_a_number_of_numpy(backend: str) -> None:
    x0, noise, alphas, _ = call((2, 3, 5, 5))
    assert torch.equal(ops.add_noise(x0, noise, alphas, np.int64(7)), ops.add_noise(x0, noise, alphas, 7))


def test_same_distribution_as_single_steps(backend: str) -> None:
    """x_s = sqrt(a_s) x_{s-1} + sqrt(1 - a_s) noise, over and over, against the closed form: mean and deviation."""
    alphas = squaredcos_cap_v2(40)
    t, n = 25, 200_000
    x = torch.full((1, n), 0.8)
    for alpha, before in zip(alphas[: t + 1], [torch.tensor(1.0), *alphas[:t]], strict=True):
        x = ops.add_noise(x, torch.randn(1, n), (alpha / before)[None], 0)
    y = ops.add_noise(torch.full((1, n), 0.8), torch.randn(1, n), alphas, t)
    for moments in (x, y):
        assert abs(moments.mean().item() - 0.8 * alphas[t].sqrt().item()) < 5 / math.sqrt(n)
        assert abs(moments.std().item() - (1 - alphas[t]).sqrt().item()) < 5 / math.sqrt(n)


def test_does_not_depend_on_batch_and_threads(kernel: str) -> None:
    x0, noise, alphas, t = call((5, 3, 65, 63))
    whole = ops.add_noise(x0, noise, alphas, t)
    alone = [ops.add_noise(x0[i : i + 1], noise[i : i + 1], alphas, t[i : i + 1]) for i in range(5)]
    assert torch.equal(whole, torch.cat(alone))


def test_gradcheck(backend: str) -> None:
    x0, noise, alphas, t = call((3, 2, 3, 2), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x0, noise, alphas)]
    assert torch.autograd.gradcheck(lambda *args: ops.add_noise(*args, t), leaves)


def test_gradients_may_be_taken_in_batches(backend: str) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` does."""
    x0, noise, alphas_cumprod, timesteps = call((2, 3, 4, 5))
    leaves = [leaf.requires_grad_() for leaf in (x0, noise, alphas_cumprod)]
    y, dys = ops.add_noise(*leaves, timesteps), torch.randn(3, 2, 3, 4, 5)
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for gradients, expected in zip(batched, torch.autograd.grad(y, leaves, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(gradients[i], expected)


def test_opcheck(backend: str) -> None:
    if backend == "cpu":
        x0, noise, alphas, t = call((3, 2, 5, 4))
        torch.library.opcheck(torch.ops.imagen_fast.add_noise_cpu, (x0, noise.requires_grad_(), alphas, t))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(ops.add_noise, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        arguments = call((batch, 3, 6, 5))
        assert torch.equal(compiled(*arguments), ops.add_noise(*arguments))


GOOD: dict[str, Any] = {
    "x0": torch.randn(2, 3, 4, 4),
    "noise": torch.randn(2, 3, 4, 4),
    "alphas_cumprod": linear_betas(10),
    "timesteps": torch.tensor([3, 4]),
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x0": 1.0}, TypeError, "x0 must be a tensor"),
        ({"x0": torch.ones(3)}, ValueError, "x0 must have 2 to 5 dimensions"),
        ({"noise": torch.randn(2, 3, 4, 5)}, ValueError, r"noise must have the shape of x0, .*got \(2, 3, 4, 5\)"),
        ({"noise": torch.randn(2, 3, 4, 4).half()}, TypeError, "noise must be torch.float32.*got torch.float16"),
        ({"noise": torch.randn(2, 3, 4, 4, device="meta")}, ValueError, "noise must be on cpu"),
        ({"alphas_cumprod": torch.ones(2, 2)}, ValueError, r"alphas_cumprod must have shape \(n,\)"),
        ({"alphas_cumprod": torch.ones(3, dtype=torch.int64)}, TypeError, "alphas_cumprod must be float16"),
        ({"timesteps": 10}, ValueError, "timesteps must be less than 10, got 10"),
        ({"timesteps": -1}, ValueError, "timesteps must be at least 0, got -1"),
        ({"timesteps": 1.5}, TypeError, "timesteps must be an integer"),
        ({"timesteps": np.float32(1)}, TypeError, "timesteps must be an integer"),
        ({"timesteps": np.int64(10)}, ValueError, "timesteps must be less than 10, got 10"),
        ({"timesteps": torch.tensor([1.0, 2.0])}, TypeError, "timesteps must be int64 or int32"),
        ({"timesteps": torch.tensor([1, 2, 3])}, ValueError, r"timesteps must have shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.add_noise(**(GOOD | wrong))


def test_under_autocast_the_wider_dtype_counts(backend: str) -> None:
    x0, noise = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), torch.randn(2, 3, 4, 4)
    alphas_cumprod = squaredcos_cap_v2(10)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.add_noise(x0, noise, alphas_cumprod, 4)
    assert torch.equal(y, ops.add_noise(x0.float(), noise, alphas_cumprod, 4))
    assert y.dtype == torch.float32


def test_copies_are_explained() -> None:
    x0, noise, alphas, t = call((2, 3, 5, 8))
    assert imagen_fast.explain("add_noise", x0, noise, alphas, t).notes == ()
    assert "x0 will be copied" in imagen_fast.explain("add_noise", x0[..., ::2], noise[..., ::2], alphas, t).notes[0]
