"""The operators behind `ops.attention`: one pair for every backend that has kernels, all of the same signature.

    attention_<backend>(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale)
        -> (out, lse)
    attention_backward_<backend>(dout, out, lse, <the same arguments>, needs)
        -> (dq, dk, dv, dcontext_k, dcontext_v, dbias, dtable, dq_scale, dk_scale)

With L = Lc + Lk keys, those of the context first, and query head h reading key head h // (Hq / Hkv):

    s[b, h, i, j] = scale * qn[b, h, i] . kn[b, j] + bias[b, h, i, j]     -inf where key_mask[b, j] is False
    lse[b, h, i]  = log(sum_j exp(s[b, h, i, j]))                        -inf where there is nothing to attend to
    out[b, h, i]  = sum_j exp(s[b, h, i, j] - lse[b, h, i]) v[b, j]      0 where there is nothing to attend to

qn and kn are q and k (the context's too) or, with q_scale and k_scale, x / max(|x|, 1e-12) * x_scale over D, in float32
and rounded at most once, to q's dtype.

    q            (B, Hq, Lq, D); k, v (B, Hkv, Lk, D); context_k, context_v (B, Hkv, Lc, D), both or neither; of one
                 dtype. B, Hq, Lq, Lk and Lc may be 0. The stride of D is 1; the others are any, 0 among them.
    bias         of any floating dtype; each of its four sizes is that of (B, Hq, Lq, L) or 1. A last size over 1 has
                 stride 1.
    table        (rows, Hq), contiguous, of any floating dtype; not beside a bias. With it comes
    buckets      (max(Lq + Lk - 1, 0),) int32, contiguous: the row of the table for each diagonal of query i and own key
                 j, so that bias[b, h, i, Lc + j] = table[buckets[j - i + Lq - 1], h]; the context's keys get 0.
    key_mask     (B, L) bool; the stride of L is 1.
    q_scale      (D,), contiguous, both or neither, of any floating dtype. Parameters are float64 if and only if q is.
    out          of q's dtype, dense, in q's memory order: (B, Lq, Hq, D) if `heads_are_inner(q)`, else (B, Hq, Lq, D).
    lse          (B, Hq, Lq), contiguous, float32 or, where q is, float64.
    dout         as out, but of any strides with stride 1 of D.
    needs        bit i is set if the i-th of the returned gradients is needed. One that is not needed is of size (0,)
                 and of q's dtype. The others have the dtype and sizes of what they belong to, and are dense: those of
                 q, k, v and the context in the memory order of that tensor, as out is in q's; the others contiguous.

Sums are in float32 (float64 for float64), in an order that depends on the sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._autograd import register_autograd, run_operator
from ..layout import has_dense_rows
from ..reference.attention import heads_are_inner

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? context_k, Tensor? context_v, Tensor? bias, Tensor? table, "
    "Tensor? buckets, Tensor? key_mask, Tensor? q_scale, Tensor? k_scale, float scale"
)
SCHEMA = f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)"
BACKWARD_SCHEMA = (
    f"(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}, int needs) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dcontext_k, Tensor dcontext_v, Tensor dbias, Tensor dtable, Tensor dq_scale, Tensor dk_scale)"
)

# Of an operator's arguments, those that have a gradient, in the order of the bits of `needs`
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 6, 9, 10)
_COUNT = 12


def empty_like(x: Tensor, sizes: tuple[int, ...] | torch.Size) -> Tensor:
    """Of these four sizes, in x's memory order, dense."""
    if heads_are_inner(x):
        batch, heads, length, width = sizes
        return x.new_empty((batch, length, heads, width)).transpose(1, 2)
    return x.new_empty(sizes)


def fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Outputs without data, for tracing."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_like(q, q.shape), q.new_empty(q.shape[:3], dtype=wide)


def fake_backward(dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Outputs without data, for tracing."""
    arguments, needs = (q, *rest[:-1]), rest[-1]
    gradients = []
    for bit, i in enumerate(_DIFFERENTIABLE):
        x = arguments[i]
        if x is None or not needs >> bit & 1:
            gradients.append(q.new_empty(0))
        else:
            gradients.append(empty_like(x, x.shape) if i <= 4 else x.new_empty(x.shape))
    return tuple(gradients)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The `setup_context` of the forward operators."""
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, *tensors)


def differentiate(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The autograd formula of a forward operator, from its backward operator."""

    def formula(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        needs = sum(1 << bit for bit, i in enumerate(_DIFFERENTIABLE) if ctx.needs_input_grad[i])
        gradients = run_operator(backward, with_dense_rows(dout), out, lse, *tensors, ctx.scale, needs)
        result: list[Tensor | None] = [None] * _COUNT
        for bit, (i, gradient) in enumerate(zip(_DIFFERENTIABLE, gradients, strict=True)):
            result[i] = gradient if needs >> bit & 1 else None
        return tuple(result)

    return formula


def no_second_derivative(backend: str) -> Callable[..., None]:
    """The autograd formula of a backward operator."""

    def formula(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"attention has no second derivative on the {backend} backend; run its forward pass under "
            'imagen_fast.use_backend("eager") and torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which has'
        )

    return formula


def with_dense_rows(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense, else a copy; of heads (B, H, L, D) in their order in memory."""
    if has_dense_rows(x):
        return x
    if x.dim() == 4 and heads_are_inner(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


def define(library: torch.library.Library, backend: str) -> Callable[..., Any]:
    """Define both operators of a backend whose kernels are in a shared library, with what tracing and autograd need,
    and return the forward one."""
    forward, backward = f"attention_{backend}", f"attention_backward_{backend}"
    for name, schema, fake in ((forward, SCHEMA, fake_forward), (backward, BACKWARD_SCHEMA, fake_backward)):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"imagen_fast::{name}", fake, lib=library)
    _register_autograd(library, backend)
    return getattr(torch.ops.imagen_fast, forward).default


def define_triton(library: torch.library.Library) -> None:
    """The same for Triton's operators, which are made of their launchers."""
    kernels = _triton.kernels("attention")
    _triton.define("attention_triton", kernels.forward, fake=fake_forward)
    _triton.define("attention_backward_triton", kernels.backward, fake=fake_backward)
    _register_autograd(library, "triton")


def _register_autograd(library: torch.library.Library, backend: str) -> None:
    forward, backward = f"attention_{backend}", f"attention_backward_{backend}"
    register_autograd(
        f"imagen_fast::{forward}",
        differentiate(getattr(torch.ops.imagen_fast, backward).default),
        setup_context=save_for_backward,
        lib=library,
    )
    torch.library.register_autograd(f"imagen_fast::{backward}", no_second_derivative(backend), lib=library)
