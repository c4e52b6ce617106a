"""Triton kernels of `imagen_fast.ops.attention`: what is launched, how, and in which order.

Tiles of queries are no larger than the queries are many, so that a problem of 64 does not pay for 128. The relative
position bias is expanded from its table by diagonal, Lq + Lk - 1 numbers a head, and read from there.

Everything is deterministic: see `_attention_backward` for who sums what.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import INTERPRETED, Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from ..reference.attention import heads_are_inner
from . import _attention_backward as _backward
from . import _attention_backward_queries as _backward_queries
from . import _attention_delta as _deltas
from . import _attention_forward as _forward

CONFIGURATIONS = Configurations("attention")

_SMALLEST_TILE = 16  # of a matrix product


class _Tiles(NamedTuple):
    """Arguments of every kernel that multiplies matrices, by name."""

    D: int
    BLOCK_D: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    @property
    def rows_only(self) -> dict[str, int]:
        return {"D": self.D, "BLOCK_D": self.BLOCK_D, "BLOCK_M": self.BLOCK_M}


def _kind(direction: str, q: Tensor, q_scale: Tensor | None) -> str:
    """The name under which the tiles of such a call stand in the launch configurations."""
    if q.dtype == torch.float32:
        return f"{direction}_float32"
    return direction if q_scale is None else f"{direction}_normalised"  # whose keys have two parts


def _tiles(direction: str, q: Tensor, q_scale: Tensor | None) -> _Tiles:
    width = q.shape[3]
    block_d = max(power_of_two_at_least(width), _SMALLEST_TILE)
    row = CONFIGURATIONS.find(_kind(direction, q, q_scale), device_of(q), block_d)
    assert row is not None, "heads wider than 256"
    block_m = min(row["queries"], max(power_of_two_at_least(q.shape[2]), _SMALLEST_TILE))
    return _Tiles(width, block_d, block_m, row["keys"], row["num_warps"], row["num_stages"])


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """Of (B, H, L, D) tensors whose last stride is 1."""
    found = {}
    for name, x in tensors.items():
        b, h, length = (0, 0, 0) if x is None else x.stride()[:3]
        found |= {f"stride_{name}_b": b, f"stride_{name}_h": h, f"stride_{name}_l": length}
    return found


def _bias_arguments(bias: Tensor | None, anything: Tensor) -> dict[str, Any]:
    """A size of 1 is broadcast by a stride of 0."""
    strides = (0,) * 4 if bias is None else [s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape, strict=True)]
    names = ("stride_bias_b", "stride_bias_h", "stride_bias_l", "stride_bias_n")
    return {"p_bias": anything if bias is None else bias, **dict(zip(names, strides, strict=True))}


def _mask_arguments(key_mask: Tensor | None, anything: Tensor) -> dict[str, Any]:
    if key_mask is None:
        return {"p_mask": anything, "stride_mask_b": 0}
    return {"p_mask": key_mask.view(torch.uint8), "stride_mask_b": key_mask.stride(0)}


def _by_diagonal(table: Tensor | None, buckets: Tensor | None) -> Tensor | None:
    """(Hq, Lq + Lk - 1), the bias of every diagonal."""
    return None if table is None or buckets is None else table.float().t()[:, buckets.long()].contiguous()


def _like(x: Tensor, sizes: Any) -> Tensor:
    """Of these four sizes, dense in x's memory order."""
    if heads_are_inner(x):
        batch, heads, length, width = sizes
        return x.new_empty((batch, length, heads, width)).transpose(1, 2)
    return x.new_empty(sizes)


def _from(p: Tensor, offset: int) -> Tensor:
    """p without its first `offset` elements along the last dimension."""
    return p[..., offset:] if offset else p


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    buckets: Tensor | None,
    key_mask: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, D) and lse (B, Hq, Lq); arguments as `imagen_fast.ops._attention_operators` says."""
    batch, heads, queries, _ = q.shape
    out, lse = _like(q, q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tiles = _tiles("forward", q, q_scale)
    diagonal = _by_diagonal(table, buckets)
    wrap_triton(_forward.attention_forward_kernel)[(ceil_div(queries, tiles.BLOCK_M) * batch * heads,)](
        p_q=q,
        p_k=k,
        p_v=v,
        p_context_k=q if context_k is None else context_k,
        p_context_v=q if context_v is None else context_v,
        p_diagonal=lse if diagonal is None else diagonal,
        p_q_scale=q if q_scale is None else q_scale,
        p_k_scale=q if k_scale is None else k_scale,
        p_out=out,
        p_lse=lse,
        scale=scale,
        heads=heads,
        group=heads // k.shape[1],
        queries=queries,
        keys=k.shape[2],
        context=0 if context_k is None else context_k.shape[2],
        **_strides(q=q, k=k, v=v, context_k=context_k, context_v=context_v, out=out),
        **_bias_arguments(bias, q),
        **_mask_arguments(key_mask, q),
        HAS_CONTEXT=context_k is not None,
        HAS_BIAS=bias is not None,
        HAS_TABLE=diagonal is not None,
        HAS_MASK=key_mask is not None,
        NORMALISED=q_scale is not None,
        **tiles._asdict(),
        INTERPRETED=INTERPRETED,
    )
    return out, lse


class _Segment(NamedTuple):
    """Keys and values, and where they stand among all keys."""

    k: Tensor
    v: Tensor
    first: int
    own: bool


class _Problem(NamedTuple):
    """What the backward kernels share."""

    q: Tensor
    segments: list[_Segment]
    bias: Tensor | None
    diagonal: Tensor | None
    key_mask: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    scale: float
    dout: Tensor
    lse: Tensor
    delta: Tensor
    tiles: _Tiles

    def arguments(self, segment: _Segment) -> dict[str, Any]:
        """Of a kernel that looks at one segment."""
        bias = self.bias
        if bias is not None and bias.shape[3] > 1:
            bias = _from(bias, segment.first)
        mask = None if self.key_mask is None else _from(self.key_mask, segment.first)
        return {
            "p_q": self.q,
            "p_k": segment.k,
            "p_v": segment.v,
            "p_q_scale": self.q if self.q_scale is None else self.q_scale,
            "p_k_scale": self.q if self.k_scale is None else self.k_scale,
            "p_dout": self.dout,
            "p_lse": self.lse,
            "p_delta": self.delta,
            "scale": self.scale,
            "group": self.q.shape[1] // segment.k.shape[1],
            "queries": self.q.shape[2],
            "keys": segment.k.shape[2],
            **_strides(q=self.q, k=segment.k, v=segment.v, dout=self.dout),
            **_bias_arguments(bias, self.q),
            **_mask_arguments(mask, self.q),
            "HAS_MASK": mask is not None,
            "NORMALISED": self.q_scale is not None,
            **self.tiles._asdict(),
            "INTERPRETED": INTERPRETED,
        }

    def arguments_of_queries(self) -> dict[str, Any]:
        """Of a kernel that goes through both segments, for a block of queries."""
        q, own = self.q, self.segments[-1]
        context = self.segments[0] if len(self.segments) > 1 else None
        context_k, context_v = (None, None) if context is None else (context.k, context.v)
        return {
            **self.arguments(own),
            **_bias_arguments(self.bias, q),
            **_mask_arguments(self.key_mask, q),
            **_strides(context_k=context_k, context_v=context_v),
            "p_context_k": q if context_k is None else context_k,
            "p_context_v": q if context_v is None else context_v,
            "p_diagonal": self.lse if self.diagonal is None else self.diagonal,
            "p_delta": self.delta,
            "heads": q.shape[1],
            "context": own.first,
            "HAS_CONTEXT": context is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_TABLE": self.diagonal is not None,
        }


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    buckets: Tensor | None,
    key_mask: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    scale: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients that `needs` asks for; arguments as `imagen_fast.ops._attention_operators` says."""
    asked = [bool(needs >> bit & 1) for bit in range(9)]
    differentiable = (q, k, v, context_k, context_v, bias, table, q_scale, k_scale)
    gradients = [
        q.new_empty(0) if x is None or not need else (_like(x, x.shape) if bit < 5 else x.new_zeros(x.shape))
        for bit, (x, need) in enumerate(zip(differentiable, asked, strict=True))
    ]
    if q.numel() == 0 or lse.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)  # type: ignore[return-value]
    context = 0 if context_k is None else context_k.shape[2]
    segments = [_Segment(k, v, context, True)]
    if context_k is not None and context_v is not None:
        segments.insert(0, _Segment(context_k, context_v, 0, False))
    diagonal = _by_diagonal(table, buckets)
    tiles = _tiles("backward", q, q_scale)
    delta = torch.empty_like(lse)
    problem = _Problem(q, segments, bias, diagonal, key_mask, q_scale, k_scale, scale, dout, lse, delta, tiles)
    if q.dtype == torch.float32:
        _delta(problem, out)
    else:
        _exact_delta(problem)
    if asked[0] or asked[6] or asked[7]:
        dq, dq_scale, dtable = _differentiate_queries(problem, buckets, table if asked[6] else None)
        gradients[0] = dq if asked[0] else gradients[0]
        if asked[6] and table is not None:
            gradients[6] = dtable.to(table.dtype)
        if asked[7] and q_scale is not None:
            gradients[7] = dq_scale.to(q_scale.dtype)
    if any(asked[1:5]) or asked[8]:
        dk_scale = None
        for segment in segments:
            dk, dv, terms = _differentiate_keys(problem, segment)
            dk_scale = terms if dk_scale is None else dk_scale + terms
            for bit, gradient in ((1, dk), (2, dv)) if segment.own else ((3, dk), (4, dv)):
                gradients[bit] = gradient if asked[bit] else gradients[bit]
        if asked[8] and k_scale is not None and dk_scale is not None:
            gradients[8] = dk_scale.to(k_scale.dtype)
    if asked[5] and bias is not None:
        gradients[5] = _differentiate_bias(problem, bias)
    return tuple(gradients)  # type: ignore[return-value]


def _delta(problem: _Problem, out: Tensor) -> None:
    """Fills delta (B, Hq, Lq) with the sum over D of dout out."""
    batch, heads, queries, _ = out.shape
    tiles = problem.tiles
    wrap_triton(_deltas.attention_delta_kernel)[(ceil_div(queries, tiles.BLOCK_M) * batch * heads,)](
        p_out=out,
        p_dout=problem.dout,
        p_delta=problem.delta,
        heads=heads,
        queries=queries,
        **_strides(out=out, dout=problem.dout),
        **tiles.rows_only,
        num_warps=4,
    )


def _exact_delta(problem: _Problem) -> None:
    """Fills delta with the sum over the keys of P dP."""
    batch, heads, queries, _ = problem.q.shape
    wrap_triton(_deltas.attention_exact_delta_kernel)[(ceil_div(queries, problem.tiles.BLOCK_M) * batch * heads,)](
        **problem.arguments_of_queries()
    )


def _differentiate_queries(
    problem: _Problem, buckets: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and the gradients of q_scale (D,) and of the table in float32, of the latter if it is given."""
    q = problem.q
    batch, heads, queries, width = q.shape
    blocks = ceil_div(queries, problem.tiles.BLOCK_M)
    rows = 1 if table is None else table.shape[0]
    dq = _like(q, q.shape)
    dq_scale = q.new_empty((blocks * batch * heads, width), dtype=torch.float32)
    dtable = q.new_empty((batch, heads, blocks, rows), dtype=torch.float32)
    wrap_triton(_backward_queries.attention_backward_queries_kernel)[(blocks * batch * heads,)](
        **problem.arguments_of_queries(),
        **_strides(dq=dq),
        p_buckets=problem.lse if buckets is None else buckets,
        p_dq=dq,
        p_dq_scale=dq_scale,
        p_dtable=dtable,
        rows=rows,
        NEEDS_TABLE=table is not None,
        BLOCK_ROWS=power_of_two_at_least(rows),
    )
    return dq, dq_scale.sum(0), dtable.sum((0, 2)).t().contiguous()


def _differentiate_keys(problem: _Problem, segment: _Segment) -> tuple[Tensor, Tensor, Tensor]:
    """dk and dv of one segment, and its part of the gradient of k_scale (D,), in float32."""
    batch, kv_heads, keys, width = segment.k.shape
    dk, dv = _like(segment.k, segment.k.shape), _like(segment.v, segment.v.shape)
    programs = ceil_div(keys, problem.tiles.BLOCK_N) * batch * kv_heads
    terms = segment.k.new_empty((programs, width), dtype=torch.float32)
    if programs:
        has_table = segment.own and problem.diagonal is not None
        wrap_triton(_backward.attention_backward_keys_kernel)[(programs,)](
            **problem.arguments(segment),
            **_strides(dk=dk, dv=dv),
            p_diagonal=problem.diagonal if has_table else problem.lse,
            p_dk=dk,
            p_dv=dv,
            p_dk_scale=terms,
            kv_heads=kv_heads,
            diagonals=problem.diagonal.shape[1] if has_table and problem.diagonal is not None else 0,
            HAS_BIAS=problem.bias is not None,
            HAS_TABLE=has_table,
        )
    return dk, dv, terms.sum(0)


def _differentiate_bias(problem: _Problem, bias: Tensor) -> Tensor:
    """dbias, in the bias's dtype, contiguous."""
    batch, heads, queries, _ = problem.q.shape
    tiles, per_query, per_key = problem.tiles, bias.shape[2] > 1, bias.shape[3] > 1
    blocks = [ceil_div(segment.k.shape[2], tiles.BLOCK_N) for segment in problem.segments]
    sizes = (*bias.shape[:3], bias.shape[3] if per_key else sum(blocks))
    dbias = bias.new_empty(sizes, dtype=bias.dtype if per_key else torch.float32)
    blocks_m = ceil_div(queries, tiles.BLOCK_M)
    first = 0
    for segment, blocks_n in zip(problem.segments, blocks, strict=True):
        if blocks_n:
            part = dbias[..., segment.first if per_key else first :]
            arguments = problem.arguments(segment)
            wrap_triton(_backward.attention_backward_bias_kernel)[
                (blocks_n * (blocks_m if per_query else 1) * bias.shape[0] * bias.shape[1],)
            ](
                **arguments,
                **{f"stride_dbias_{n}": dbias.stride(i) for i, n in enumerate("bhl")},
                p_dbias=part,
                batch=batch,
                heads=heads,
                over_b=batch // bias.shape[0],
                over_h=heads // bias.shape[1],
                over_m=1 if per_query else blocks_m,
                bias_heads=bias.shape[1],
                PER_QUERY=per_query,
                PER_KEY=per_key,
            )
        first += blocks_n
    return dbias if per_key else dbias.sum(3, keepdim=True).to(bias.dtype)
