"""Attention whose keys come in two segments, with T5's position bias and with normalised queries and keys.

    s   = scale * q k^T + bias              over the keys [context; k]
    out = softmax(s) v                      over the values [context; v]

The context (text, null keys) and the relative position bias are read in place: there is no concatenation, and no bias
of queries x keys. The scores are never in memory either: Milakov and Gimelshein 2018 (arXiv:1805.02867); Dao et al.
2022 (arXiv:2205.14135). Who attends so: Imagen and DeepFloyd IF (text, then pixels), imagen-pytorch (one head of keys,
l2-normalised queries and keys), T5 (relative position bias: Raffel et al. 2020, arXiv:1910.10683).

The backward pass recomputes the scores from the saved log of their sums, lse. With P = exp(s - lse) and dP = dout v^T,

    dS = P * (dP - sum(dout * out))    dv = P^T dout    dq = scale * dS k    dk = scale * dS^T q    dbias = dS

What each backend's operators take and return stands in `_attention_operators`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .._autograd import run_operator
from ..backends import Backend, Op, dtypes
from ..layout import has_dense_rows
from ..reference.attention import RelativePositionBias
from ..reference.attention import attention as eager_attention
from . import _checks
from ._attention_buckets import diagonal_buckets
from ._attention_operators import define, define_triton, with_dense_rows

WIDEST = 256  # of a head


class _Call(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    context_k: Tensor | None
    context_v: Tensor | None
    bias: Tensor | RelativePositionBias | None
    key_mask: Tensor | None
    scale: float | None
    q_scale: Tensor | None
    k_scale: Tensor | None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    bias: Tensor | RelativePositionBias | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> _Call:
    _checks.floating("q", q)
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, context_k, context_v = (_autocast(x, dtype) for x in (q, k, v, context_k, context_v))
    if q.dim() != 4:
        raise ValueError(f"q must have shape (batch, heads, queries, width), got {tuple(q.shape)}")
    width = q.shape[3]
    if width == 0 or width % 8 or width > WIDEST:
        raise ValueError(f"q must have a head width that is a multiple of 8, of at most {WIDEST}, got {width}")
    _check_keys("k", k, q)
    _checks.alike("v", v, "k", k)
    kv_heads, keys = k.shape[1:3]
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"k must have a number of heads that divides the {q.shape[1]} heads of q, got {kv_heads}")
    _check_together("context_k", context_k, "context_v", context_v)
    if context_k is not None and context_v is not None:
        _check_keys("context_k", context_k, q)
        if context_k.shape[1] != kv_heads:
            raise ValueError(f"context_k must have the {kv_heads} heads of k, got {context_k.shape[1]}")
        _checks.alike("context_v", context_v, "context_k", context_k)
        keys = context_k.shape[2] + keys
    if isinstance(bias, RelativePositionBias):
        bias = _check_position_bias(bias, q)
    elif bias is not None:
        _check_bias(bias, q, keys)
    if key_mask is not None:
        _check_key_mask(key_mask, q, keys)
    scale = _check_scale(scale)
    _check_together("q_scale", q_scale, "k_scale", k_scale)
    for name, vector in (("q_scale", q_scale), ("k_scale", k_scale)):
        if vector is not None:
            _checks.parameter(name, vector, q, "q")
            if vector.shape != (width,):
                raise ValueError(f"{name} must have shape ({width},), the head width of q, got {tuple(vector.shape)}")
    return _Call(q, k, v, context_k, context_v, bias, key_mask, scale, q_scale, k_scale)


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    """As autocast treats the arguments of `F.scaled_dot_product_attention`."""
    narrowed = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if narrowed else x


def _check_keys(name: str, k: Tensor, q: Tensor) -> None:
    _checks.floating(name, k)
    if k.dtype != q.dtype:
        raise TypeError(f"{name} must be {q.dtype}, as q is, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"{name} must be on {q.device}, where q is, got {k.device}")
    if k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{name} must have shape ({q.shape[0]}, heads, keys, {q.shape[3]}), batch and head width as of q, "
            f"got {tuple(k.shape)}"
        )


def _check_together(first: str, x: Tensor | None, second: str, y: Tensor | None) -> None:
    if (x is None) != (y is None):
        given, missing = (first, second) if y is None else (second, first)
        raise ValueError(f"{missing} must be given together with {given}, got None")


def _check_position_bias(bias: RelativePositionBias, q: Tensor) -> RelativePositionBias:
    table, bidirectional, max_distance = bias
    _checks.parameter("bias.table", table, q, "q", required=True)
    if table.dim() != 2 or table.shape[1] != q.shape[1]:
        raise ValueError(
            f"bias.table must have shape (buckets, {q.shape[1]}), with a column for each head of q, "
            f"got {tuple(table.shape)}"
        )
    if not isinstance(bidirectional, bool):
        raise TypeError(f"bias.bidirectional must be True or False, got {bidirectional!r}")
    directions = 2 if bidirectional else 1
    exact = table.shape[0] // directions // 2
    if exact == 0:
        raise ValueError(
            f"bias.table must have at least {2 * directions} rows (buckets) if bidirectional is {bidirectional}, "
            f"got {table.shape[0]}"
        )
    max_distance = _checks.integer("bias.max_distance", max_distance, minimum=exact + 1)
    return RelativePositionBias(table, bidirectional, max_distance)


def _check_bias(bias: Tensor, q: Tensor, keys: int) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, a RelativePositionBias or None, got {type(bias).__name__}")
    if bias.dtype == torch.bool:
        raise TypeError("bias must be floating, got torch.bool: give what may not be attended to the bias -inf")
    _checks.parameter("bias", bias, q, "q")
    full = (*q.shape[:3], keys)
    if bias.dim() > 4 or any(
        size not in (1, most) for size, most in zip(reversed(bias.shape), reversed(full), strict=False)
    ):
        raise ValueError(
            f"bias must broadcast to {full}, (batch, heads of q, queries, keys of the context and of k), "
            f"got shape {tuple(bias.shape)}"
        )


def _check_key_mask(key_mask: Tensor, q: Tensor, keys: int) -> None:
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor or None, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be bool, True where a key is attended to, got {key_mask.dtype}")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask must be on {q.device}, where q is, got {key_mask.device}")
    if key_mask.shape != (q.shape[0], keys):
        raise ValueError(
            f"key_mask must have shape {(q.shape[0], keys)}, (batch, keys of the context and of k), "
            f"got {tuple(key_mask.shape)}"
        )


def _check_scale(scale: float | None) -> float | None:
    if scale is None:
        return None
    if not _checks.is_number(scale):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not -math.inf < scale < math.inf:  # (comparisons can be traced)
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")
_LIBRARY.define("_attention_cuda_plan(Tensor q, Tensor k, Tensor? table, Tensor? buckets) -> int[]")
_forward = {backend: define(_LIBRARY, backend) for backend in ("cpu", "cuda")}


def _operator_arguments(call: _Call) -> tuple[Any, ...]:
    """Of the operators of every backend."""
    q, k, v, context_k, context_v, bias, key_mask, scale, q_scale, k_scale = call
    table = buckets = None
    if isinstance(bias, RelativePositionBias):
        table, buckets = bias.table.contiguous(), diagonal_buckets(bias, q.shape[2], k.shape[2])
        bias = None
    elif bias is not None:
        bias = with_dense_rows(bias.reshape((1,) * (4 - bias.dim()) + bias.shape))
    if context_k is not None and context_v is not None:
        context_k, context_v = with_dense_rows(context_k), with_dense_rows(context_v)
    if q_scale is not None and k_scale is not None:
        q_scale, k_scale = q_scale.contiguous(), k_scale.contiguous()
    return (
        with_dense_rows(q),
        with_dense_rows(k),
        with_dense_rows(v),
        context_k,
        context_v,
        bias,
        table,
        buckets,
        None if key_mask is None else with_dense_rows(key_mask),
        q_scale,
        k_scale,
        q.shape[3] ** -0.5 if scale is None else scale,
    )


def _run_eager(call: _Call) -> Tensor:
    q, k, v, context_k, context_v, bias, key_mask, scale, q_scale, k_scale = call
    return eager_attention(
        q,
        k,
        v,
        context_k=context_k,
        context_v=context_v,
        bias=bias,
        key_mask=key_mask,
        scale=scale,
        q_scale=q_scale,
        k_scale=k_scale,
    )


def _run_cpu(call: _Call) -> Tensor:
    return run_operator(_forward["cpu"], *_operator_arguments(call))[0]


def _run_cuda(call: _Call) -> Tensor:
    return run_operator(_forward["cuda"], *_operator_arguments(call))[0]


def _notes(call: _Call) -> list[str]:
    notes = [
        f"{name} will be copied: its last dimension is not dense"
        for name in ("q", "k", "v", "context_k", "context_v", "bias", "key_mask", "q_scale", "k_scale")
        if isinstance(x := getattr(call, name), Tensor) and x.dim() and x.numel() and not has_dense_rows(x)
    ]
    if isinstance(call.bias, RelativePositionBias) and not call.bias.table.is_contiguous():
        notes.append("bias.table will be copied: it is not contiguous")
    return notes


@_triton.once
def _define_triton() -> None:
    define_triton(_LIBRARY)


def _run_triton(call: _Call) -> Tensor:
    _define_triton()
    return run_operator(torch.ops.imagen_fast.attention_triton.default, *_operator_arguments(call))[0]


_OP = Op(
    "attention",
    _check,
    (
        Backend("eager", _run_eager),
        Backend("cpu", _run_cpu, (dtypes("q", torch.float16, torch.bfloat16, torch.float32, torch.float64),)),
        Backend("triton", _run_triton, (dtypes("q", torch.float16, torch.bfloat16, torch.float32),)),
        Backend("cuda", _run_cuda, (dtypes("q", torch.float16, torch.bfloat16, torch.float32),)),
    ),
    _notes,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    bias: Tensor | RelativePositionBias | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q @ k^T + bias) @ v` over the keys [context; k], fused.

    Sums and the softmax are in float32 (float64 for float64). Gradients flow to every tensor but the mask, and are
    deterministic; the backward pass recomputes the scores instead of storing them.

    Under autocast q, k, v and the context are cast to its dtype, as by `F.scaled_dot_product_attention`; the others are
    used as they are.

    Args:
        q: (B, Hq, Lq, D), float16, bfloat16, float32 or float64; D a multiple of 8, at most 256.
        k, v: (B, Hkv, Lk, D), of q's dtype. Hkv divides Hq: query head h reads head h // (Hq / Hkv) (grouped queries;
            with one head, multi-query attention). q, k, v and the context may have any strides as long as D is dense,
            so parts of a packed projection are read in place; else they are copied (`imagen_fast.explain` says so).
        context_k, context_v: (B, Hkv, Lc, D), a second segment of keys and values that stand before k and v; both or
            neither.
        bias: added to the scaled scores: a tensor that broadcasts to (B, Hq, Lq, Lc + Lk), where -inf means "not
            attended", or a `RelativePositionBias`, which gives the context's keys 0. Its dtype may be any of 16 or 32
            bits beside a q of 16 or 32 bits, and is float64 beside float64; that of q_scale and k_scale too.
        key_mask: (B, Lc + Lk) bool, True where a key is attended to. A query with nothing to attend to gets zeros,
            and zero gradients.
        scale: what the scores are multiplied by; 1 / sqrt(D) if None. (T5 uses 1, imagen-pytorch 8.)
        q_scale, k_scale: (D,), both or neither: q and the keys, the context's too, are l2-normalised over D and
            multiplied by them first.

    Returns:
        (B, Hq, Lq, D) of q's dtype, dense, in q's memory order: where q is a transposed (B, Lq, Hq, D), as it comes out
        of a projection, so is the result, and `out.transpose(1, 2).flatten(2)` is free.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); text and pixels as keys of one attention: Imagen (Saharia et al.
    2022, arXiv:2205.11487); grouped heads: Ainslie et al. 2023 (arXiv:2305.13245); normalised queries and keys: Henry
    et al. 2020 (arXiv:2010.04245).

    Example:
        >>> q, k, v = (x.transpose(1, 2) for x in qkv(pixels).unflatten(-1, (3, 8, 64)).unbind(2))  # (B, 8, L, 64)
        >>> h = ops.attention(q, k, v, context_k=text_k, context_v=text_v, key_mask=mask)
    """
    return _OP.run(
        _check(
            q,
            k,
            v,
            context_k=context_k,
            context_v=context_v,
            bias=bias,
            key_mask=key_mask,
            scale=scale,
            q_scale=q_scale,
            k_scale=k_scale,
        )
    )
