"""T5's layer norm: RMS normalisation over the last dimension, of x or of a sum that it forms first.

    s = x + residual                               rounded to x's dtype, as a residual stream is
    y = s * rstd * weight        rstd = 1 / sqrt(mean(s^2) + eps)

Raffel et al. 2020 (arXiv:1910.10683); RMS normalisation: Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019.

A forward operator `rms_norm_<backend>` takes rows (outer, inner, C) whose last dimension is dense, and returns y and,
with a residual, s (else a tensor of size (0,)), both dense in the memory order of x, and rstd (outer, inner) in float32
(float64 for float64). The backward operator takes s as x, and what has come back for s, if anything. With xhat = x *
rstd and g = dy * weight,

    dx = rstd * (g - xhat * mean(g * xhat)) + dsum        dweight = sum of dy * xhat over all rows

dx is the gradient of x and of the residual. Bits of `needs`: 1 for dx, 2 for dweight; what is not needed is of size
(0,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .. import _triton
from .._autograd import register_autograd, run_operator
from ..backends import Backend, Op, dtypes
from ..layout import empty_rows_like, is_rows, rows
from ..reference.rms_norm import rms_norm as eager_rms_norm
from . import _checks


class _Call(NamedTuple):
    x: Tensor
    weight: Tensor
    residual: Tensor | None
    eps: float


def _check(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6) -> _Call:
    _checks.floating("x", x)
    x, residual = _checks.promoted(x, "residual", residual)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    _checks.parameter("weight", weight, x, required=True)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},), the last size of x, got {tuple(weight.shape)}")
    if residual is not None:
        _checks.alike("residual", residual, "x", x)
    eps = _checks.not_negative("eps", eps)
    return _Call(x, weight, residual, eps)


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake_forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    summed = x.new_empty(0) if residual is None else empty_rows_like(x, x.shape[2])
    return empty_rows_like(x, x.shape[2]), summed, x.new_empty(x.shape[:2], dtype=wide)


def _fake_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    dx = empty_rows_like(x, x.shape[2]) if needs & 1 else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if needs & 2 else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, _ = inputs
    _, summed, rstd = output
    ctx.has_residual = residual is not None
    sum_has_gradient = ctx.has_residual and (ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
    ctx.mark_non_differentiable(*([rstd] if sum_has_gradient else [summed, rstd]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed if ctx.has_residual else x, rstd, weight)


def _differentiate(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    def formula(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        x, rstd, weight = rows(x), rstd.contiguous(), weight.contiguous()
        if not ctx.has_residual:
            dsum = None
        need_x, need_weight, need_residual, _ = ctx.needs_input_grad
        if dy is None:
            return dsum if need_x else None, None, dsum if need_residual else None, None
        needs = (need_x or need_residual) + 2 * need_weight
        dsum = None if dsum is None else rows(dsum)
        dx, dweight = run_operator(backward, rows(dy), dsum, x, rstd, weight, needs)
        return dx if need_x else None, dweight if need_weight else None, dx if need_residual else None, None

    return formula


def _no_second_derivative(backend: str) -> Callable[..., None]:
    def formula(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"rms_norm has no second derivative on the {backend} backend; "
            'run its forward pass under imagen_fast.use_backend("eager"), which has'
        )

    return formula


def _register_autograd(backend: str) -> None:
    forward, backward = f"rms_norm_{backend}", f"rms_norm_backward_{backend}"
    register_autograd(
        f"imagen_fast::{forward}",
        _differentiate(getattr(torch.ops.imagen_fast, backward).default),
        setup_context=_save_for_backward,
        lib=_LIBRARY,
    )
    torch.library.register_autograd(f"imagen_fast::{backward}", _no_second_derivative(backend), lib=_LIBRARY)


def _define(backend: str) -> None:
    """The operators of a backend that a library implements."""
    forward, backward = f"rms_norm_{backend}", f"rms_norm_backward_{backend}"
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(
        f"{forward}(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor sum, Tensor rstd)",
        tags=tags,
    )
    _LIBRARY.define(
        f"{backward}(Tensor dy, Tensor? dsum, Tensor x, Tensor rstd, Tensor weight, int needs) "
        "-> (Tensor dx, Tensor dweight)",
        tags=tags,
    )
    torch.library.register_fake(f"imagen_fast::{forward}", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"imagen_fast::{backward}", _fake_backward, lib=_LIBRARY)
    _register_autograd(backend)


_define("cpu")
_define("cuda")
# For tests: how the rows are cut for the device; see csrc/rms_norm/cuda.cu
_LIBRARY.define("_rms_norm_cuda_plan(Tensor x, Tensor weight) -> int[]")


@_triton.once
def _define_triton() -> None:
    """The operators of Triton's backend."""
    kernels = _triton.kernels("rms_norm")
    _triton.define("rms_norm_triton", kernels.forward, fake=_fake_forward)
    _triton.define("rms_norm_backward_triton", kernels.backward, fake=_fake_backward)
    _register_autograd("triton")


def _run(forward: Callable[..., Any], call: _Call) -> Tensor | tuple[Tensor, Tensor]:
    x, weight, residual, eps = call
    residual_rows = None if residual is None else rows(residual)
    y, summed, _ = run_operator(forward, rows(x), weight.contiguous(), residual_rows, eps)
    if x.dim() != 3:
        y = y.view(x.shape)
        summed = summed if residual is None else summed.view(x.shape)
    return y if residual is None else (y, summed)


def _run_eager(call: _Call) -> Tensor | tuple[Tensor, Tensor]:
    x, weight, residual, eps = call
    return eager_rms_norm(x, weight, residual=residual, eps=eps)


def _run_cpu(call: _Call) -> Tensor | tuple[Tensor, Tensor]:
    return _run(torch.ops.imagen_fast.rms_norm_cpu.default, call)


def _run_cuda(call: _Call) -> Tensor | tuple[Tensor, Tensor]:
    return _run(torch.ops.imagen_fast.rms_norm_cuda.default, call)


def _run_triton(call: _Call) -> Tensor | tuple[Tensor, Tensor]:
    _define_triton()
    return _run(torch.ops.imagen_fast.rms_norm_triton.default, call)


def _notes(call: _Call) -> list[str]:
    return [
        f"{name} will be copied: its rows do not lie at one distance, or are not dense"
        for name, x in (("x", call.x), ("residual", call.residual))
        if x is not None and not is_rows(x)
    ]


_OP = Op(
    "rms_norm",
    _check,
    (
        Backend("eager", _run_eager),
        Backend("cpu", _run_cpu),
        Backend("triton", _run_triton, (dtypes("x", torch.float16, torch.bfloat16, torch.float32),)),
        Backend("cuda", _run_cuda, (dtypes("x", torch.float16, torch.bfloat16, torch.float32),)),
    ),
    _notes,
)


@overload
def rms_norm(x: Tensor, weight: Tensor, *, residual: None = None, eps: float = 1e-6) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, *, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float = 1e-6
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension; with `residual`, of x + residual.

    This is T5's layer norm. Statistics are in float32 (float64 for float64). Gradients flow to every tensor and are
    deterministic. On the `eager` backend alone it can be differentiated twice.

    Under autocast x keeps its dtype and the weight is used as it is; x and a residual of another dtype are cast to the
    wider of the two, as by `x + residual`.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64. Rows (the last dimension) must be dense, and up to two
            dimensions of them may have any strides; else x is copied (`imagen_fast.explain` says so).
        weight: (C,), of any dtype of 16 or 32 bits beside an x of 16 or 32 bits, and float64 beside float64.
        residual: of the shape and (but for autocast) the dtype of x, added to it first, or None.
        eps: added to the mean square; not negative.

    Returns:
        y, of the shape and dtype of x; with a residual (y, x + residual), the second rounded to its dtype before it is
        normalised. Dense, with the last dimension innermost.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: Raffel et al. 2020 (arXiv:1910.10683), as in transformers' `T5LayerNorm`.

    Example:
        >>> y, x = ops.rms_norm(x, norm.weight, residual=attention(y))  # x = x + attention(y); y = norm(x)
    """
    return _OP.run(_check(x, weight, residual=residual, eps=eps))
