"""The activations of the C++ kernels, number by number, at each instruction set.

With a weight of 0 the op is `act(shift)`, whatever x is, and its sum over the one position is `act'(shift)`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imagen_fast import _native, ops  # noqa: F401  (ops defines the operators)

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the native library is not built")

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")
# Code of the operator, function, and how many ulp of float32 the kernel may be off, relative to its own value
ACTIVATIONS = {
    "silu": (1, F.silu, 4),
    "gelu": (2, F.gelu, 40),
    "gelu_tanh": (3, lambda t: F.gelu(t, approximate="tanh"), 16),
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
    _, slope, _ = torch.ops.imagen_fast.group_norm_act_backward_cpu(
        torch.ones_like(x), x, mean, rstd, 1, zero, None, None, shift, code
    )
    return y[0], slope[0]


def exactly(t: torch.Tensor, function) -> tuple[torch.Tensor, torch.Tensor]:
    t = t.double().requires_grad_()
    y = function(t)
    (slope,) = torch.autograd.grad(y.sum(), t)
    return y.detach(), slope


def test_float32_is_right_to_a_few_ulp(capability, activation):
    code, function, ulp = activation
    t = torch.cat([torch.linspace(-8, 8, 200_001), torch.randn(10_000) * 1e-3])
    (y, slope), (true_y, true_slope) = kernel(t, code), exactly(t, function)
    # Where float64's own `1 + erf` cancels the truth is not one: only t > -5 is compared by its own value.
    relative = ((y.double() - true_y).abs() / true_y.abs())[(t > -5) & (t != 0)]
    assert relative.max() <= ulp * 2**-23
    # The slope has a zero near -1.3 and -0.75: absolute.
    assert (slope.double() - true_slope).abs().max() <= 4 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_rounded_from_enough_of_them(capability, activation, dtype):
    code, function, _ = activation
    t = torch.linspace(-6, 6, 20_001).to(dtype)
    y, (true_y, _) = kernel(t, code)[0], exactly(t, function)
    half_ulp = torch.finfo(dtype).eps / 2
    error = (y.double() - true_y).abs()
    assert (error <= 1.1 * half_ulp * true_y.abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_and_special_values_are_those_of_pytorch(capability, activation, dtype):
    code, function, _ = activation
    t = torch.tensor([-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    t = t.repeat(5)  # whole vectors of them, and a rest
    torch.testing.assert_close(kernel(t, code)[0], function(t), rtol=0, atol=1e-30, equal_nan=True)


def test_float64_is_exact(capability, activation):
    code, function, _ = activation
    t = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    for ours, true in zip(kernel(t, code), exactly(t, function), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-15)
