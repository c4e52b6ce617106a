"""The gated GELU of a feed-forward layer, of two tensors or of the two halves of one.

    y = gelu(gate) * value

Shazeer 2020 (arXiv:2002.05202); in T5 v1.1 and later with the approximation of GELU by tanh (Hendrycks and Gimpel 2016,
arXiv:1606.08415).

A forward operator `gated_gelu_<backend>` takes rows (outer, inner, D) whose last dimension is dense, or one tensor of
rows of 2 D, gate first, and no value; it returns y (outer, inner, D), dense in the memory order of the gate. The
backward operator returns

    dgate = dy * value * gelu'(gate)        dvalue = dy * gelu(gate)

the same way: each dense in the memory order of what it belongs to; packed in dgate (outer, inner, 2 D) if there is no
value. Bits of `needs`: 1 for dgate, 2 for dvalue; what is not needed is of size (0,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .._autograd import register_autograd, run_operator
from ..backends import Backend, Op, dtypes
from ..layout import empty_rows_like, is_rows, rows
from ..reference.gated_gelu import gated_gelu as eager_gated_gelu
from . import _checks


class _Call(NamedTuple):
    gate: Tensor
    value: Tensor | None
    approximate: str


def _check(gate: Tensor, value: Tensor | None = None, approximate: str = "tanh") -> _Call:
    _checks.floating("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, got shape ()")
    if value is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate must have an even last size where there is no value, got {gate.shape[-1]}")
    else:
        gate, value = _checks.promoted(gate, "value", value)
        _checks.alike("value", value, "gate", gate)
    _checks.one_of("approximate", approximate, ("tanh", "none"))
    return _Call(gate, value, approximate)


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake_forward(gate: Tensor, value: Tensor | None, tanh: bool) -> Tensor:
    return empty_rows_like(gate, gate.shape[2] // 2 if value is None else gate.shape[2])


def _fake_backward(dy: Tensor, gate: Tensor, value: Tensor | None, tanh: bool, needs: int) -> tuple[Tensor, Tensor]:
    dgate = empty_rows_like(gate, gate.shape[2]) if needs & 1 else gate.new_empty(0)
    dvalue = gate.new_empty(0) if value is None or not needs & 2 else empty_rows_like(value, gate.shape[2])
    return dgate, dvalue


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, value, ctx.tanh = inputs
    ctx.save_for_backward(gate, value)


def _differentiate(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    def formula(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, value = ctx.saved_tensors
        gate, value = rows(gate), None if value is None else rows(value)
        need_gate, need_value, _ = ctx.needs_input_grad
        dgate, dvalue = run_operator(backward, rows(dy), gate, value, ctx.tanh, need_gate + 2 * need_value)
        return dgate if need_gate else None, dvalue if need_value else None, None

    return formula


def _no_second_derivative(backend: str) -> Callable[..., None]:
    def formula(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"gated_gelu has no second derivative on the {backend} backend; "
            'run its forward pass under imagen_fast.use_backend("eager"), which has'
        )

    return formula


def _register_autograd(backend: str) -> None:
    forward, backward = f"gated_gelu_{backend}", f"gated_gelu_backward_{backend}"
    register_autograd(
        f"imagen_fast::{forward}",
        _differentiate(getattr(torch.ops.imagen_fast, backward).default),
        setup_context=_save_for_backward,
        lib=_LIBRARY,
    )
    torch.library.register_autograd(f"imagen_fast::{backward}", _no_second_derivative(backend), lib=_LIBRARY)


def _define(backend: str) -> None:
    """The operators of a backend that a library implements."""
    forward, backward = f"gated_gelu_{backend}", f"gated_gelu_backward_{backend}"
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{forward}(Tensor gate, Tensor? value, bool tanh) -> Tensor", tags=tags)
    _LIBRARY.define(
        f"{backward}(Tensor dy, Tensor gate, Tensor? value, bool tanh, int needs) -> (Tensor dgate, Tensor dvalue)",
        tags=tags,
    )
    torch.library.register_fake(f"imagen_fast::{forward}", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"imagen_fast::{backward}", _fake_backward, lib=_LIBRARY)
    _register_autograd(backend)


_define("cpu")
_define("cuda")
# For tests: how the rows are cut for the device; see csrc/gated_gelu/cuda.cu
_LIBRARY.define("_gated_gelu_cuda_plan(Tensor gate, Tensor? value) -> int[]")


@_triton.once
def _define_triton() -> None:
    """The operators of Triton's backend."""
    kernels = _triton.kernels("gated_gelu")
    _triton.define("gated_gelu_triton", kernels.forward, fake=_fake_forward)
    _triton.define("gated_gelu_backward_triton", kernels.backward, fake=_fake_backward)
    _register_autograd("triton")


def _run(forward: Callable[..., Any], call: _Call) -> Tensor:
    gate, value, approximate = call
    y = run_operator(forward, rows(gate), None if value is None else rows(value), approximate == "tanh")
    return y if gate.dim() == 3 else y.view(*gate.shape[:-1], y.shape[2])


def _run_eager(call: _Call) -> Tensor:
    return eager_gated_gelu(*call)


def _run_cpu(call: _Call) -> Tensor:
    return _run(torch.ops.imagen_fast.gated_gelu_cpu.default, call)


def _run_cuda(call: _Call) -> Tensor:
    return _run(torch.ops.imagen_fast.gated_gelu_cuda.default, call)


def _run_triton(call: _Call) -> Tensor:
    _define_triton()
    return _run(torch.ops.imagen_fast.gated_gelu_triton.default, call)


def _notes(call: _Call) -> list[str]:
    return [
        f"{name} will be copied: its rows do not lie at one distance, or are not dense"
        for name, x in (("gate", call.gate), ("value", call.value))
        if x is not None and not is_rows(x)
    ]


_OP = Op(
    "gated_gelu",
    _check,
    (
        Backend("eager", _run_eager),
        Backend("cpu", _run_cpu),
        Backend("triton", _run_triton, (dtypes("gate", torch.float16, torch.bfloat16, torch.float32),)),
        Backend("cuda", _run_cuda, (dtypes("gate", torch.float16, torch.bfloat16, torch.float32),)),
    ),
    _notes,
)


def gated_gelu(gate: Tensor, value: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(gate) * value`, fused.

    It is computed in float32 (float64 for float64) and rounded once. Gradients flow to both tensors. On the `eager`
    backend alone it can be differentiated twice. Under autocast two of different dtypes are cast to
    the wider one, as by the product.

    Args:
        gate: (..., D), float16, bfloat16, float32 or float64; without a value (..., 2 D), the gate and then the value,
            as they come out of one packed projection. Rows (the last dimension) must be dense, and up to two dimensions
            of them may have any strides; else it is copied (`imagen_fast.explain` says so).
        value: of the shape and dtype of gate, strided as it may be; or None.
        approximate: "tanh", the approximation that T5 uses, or "none", the exact GELU by erf.

    Returns:
        (..., D) of gate's dtype, dense, with the last dimension innermost.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: Shazeer 2020 (arXiv:2002.05202), as in transformers' `T5DenseGatedActDense`.

    Example:
        >>> h = ops.gated_gelu(wi(x))  # wi packs wi_0 and wi_1
    """
    return _OP.run(_check(gate, value, approximate))
