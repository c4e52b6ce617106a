"""Device functions that kernels share. Tiles are float32; constants are the mathematical ones, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

# Codes of the activations, as the ops pass them.
IDENTITY = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_GELU_FACTOR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def logistic(t):
    """1 / (1 + exp(-t))"""
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def activation(t, CODE: tl.constexpr):
    """The activation CODE of t. At -inf all but the identity give NaN, as PyTorch's do."""
    if CODE == SILU:
        return t / (1.0 + tl.exp(-t))
    elif CODE == GELU:
        return 0.5 * t * (1.0 + tl.erf(t * _SQRT_HALF))
    elif CODE == GELU_TANH:  # t (1 + tanh(k)) / 2 = t logistic(2 k)
        return t / (1.0 + tl.exp(-_twice_k(t)))
    else:
        return t


@triton.jit
def activation_slope(t, CODE: tl.constexpr):
    """The derivative of `activation` at t."""
    if CODE == SILU:
        s = logistic(t)
        return s * (1.0 + t * (1.0 - s))
    elif CODE == GELU:
        return 0.5 * (1.0 + tl.erf(t * _SQRT_HALF)) + t * (_INV_SQRT_TWO_PI * tl.exp(-0.5 * t * t))
    elif CODE == GELU_TANH:
        s = logistic(_twice_k(t))
        return s + t * (s * (1.0 - s)) * (_GELU_FACTOR + (3.0 * _GELU_FACTOR * _GELU_CUBIC) * t * t)
    else:
        return tl.full(t.shape, 1.0, tl.float32)


@triton.jit
def _twice_k(t):
    return t * (_GELU_FACTOR + (_GELU_FACTOR * _GELU_CUBIC) * t * t)


@triton.jit
def dot(a, b, accumulator, INTERPRETED: tl.constexpr):
    """a @ b + accumulator on the tensor cores. Triton's interpreter multiplies bfloat16 operands as raw integers, so
    they are cast up there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator)
