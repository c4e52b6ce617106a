"""The activations of the C++ kernels, number by number, at each instruction set.

With a weight of 0 the op is `act(shift)`, whatever x is, and the gradient of shift is `act'(shift)`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from imagen_fast import _native, ops  # noqa: F401  (ops defines the operators)

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the native library is not built")

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


def gelu_tanh(t: torch.Tensor) -> torch.Tensor:
    return t * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))


# Code of the operator, PyTorch's function, a form of it that does not cancel for negative t (PyTorch's gelu loses all
# its digits there), and how many ulp of float32 the kernel may be off for t > -5
ACTIVATIONS = {
    "silu": (1, F.silu, F.silu, 4),
    "gelu": (2, F.gelu, lambda t: t * torch.special.erfc(-t / math.sqrt(2)) / 2, 15),
    "gelu_tanh": (3, lambda t: F.gelu(t, approximate="tanh"), gelu_tanh, 25),
}


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest):
    best = _native.cpu_capability()
    if CAPABILITIES.index(request.param) > CAPABILITIES.index(best):
        pytest.skip(f"this machine has no {request.param}")
    _native.set_cpu_capability(request.param)
    yield request.param
    _native.set_cpu_capability(best)


@pytest.fixture(params=ACTIVATIONS)
def activation(request: pytest.FixtureRequest):
    return ACTIVATIONS[request.param]


def kernel(t: torch.Tensor, code: int) -> tuple[torch.Tensor, torch.Tensor]:
    """act(t) and act'(t) of the CPU kernel for a vector t."""
    x = torch.randn(1, t.numel(), dtype=t.dtype)
    zero, shift = torch.zeros_like(t), t[None]
    y, mean, rstd = torch.ops.imagen_fast.group_norm_act_cpu(x, 1, zero, None, None, shift, code, 1e-5)
    slope = torch.ops.imagen_fast.group_norm_act_backward_cpu(
        torch.ones_like(x), x, mean, rstd, 1, zero, None, None, shift, code, 16
    )[4]
    return y[0], slope[0]


def exactly(t: torch.Tensor, function) -> tuple[torch.Tensor, torch.Tensor]:
    t = t.double().requires_grad_()
    y = function(t)
    (slope,) = torch.autograd.grad(y.sum(), t)
    return y.detach(), slope


def test_float32_is_right_to_a_few_ulp(capability, activation):
    code, _, exact, ulp = activation
    t = torch.cat([torch.linspace(-5, 8, 200_000), torch.randn(10_000) * 1e-3])
    (y, slope), (true_y, true_slope) = kernel(t, code), exactly(t, exact)
    assert ((y.double() - true_y).abs() <= ulp * 2**-23 * true_y.abs()).all()
    # The slopes have a zero: absolute.
    assert (slope.double() - true_slope).abs().max() <= 3 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_rounded_from_enough_of_them(capability, activation, dtype):
    code, _, exact, _ = activation
    t = torch.linspace(-6, 6, 20_001).to(dtype)
    y, (true_y, _) = kernel(t, code)[0], exactly(t, exact)
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((y.double() - true_y).abs() <= 1.1 * half_ulp * true_y.abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_and_special_values_are_those_of_pytorch_in_float64(capability, activation, dtype):
    code, function, _, _ = activation
    t = torch.tensor([-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    t = t.repeat(5)  # whole vectors of them, and a rest
    expected = function(t.double()).to(dtype)
    torch.testing.assert_close(kernel(t, code)[0], expected, rtol=0, atol=1e-30, equal_nan=True)


def test_float64_is_exact(capability, activation):
    code, _, exact, _ = activation
    t = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    for ours, true in zip(kernel(t, code), exactly(t, exact), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-15)
