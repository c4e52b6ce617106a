"""The kernel of attention's gradients of queries, of their scale and of the table; `_attention_backward` says how."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    key_parts,
    load_rows,
    normalised,
    normalised_gradient,
    probabilities,
    product,
    query_factor,
    scores,
)


@triton.jit
def _queries_from_segment(
    b_dq,  # [M, D]
    b_dtable,  # [ROWS]
    b_q,
    b_factor,  # [M]
    b_dout,
    b_delta,  # [M]
    p_k,
    p_v,
    stride_k_l,
    stride_v_l,
    keys,
    i_m,
    o_m,
    m_m,
    o_d,
    p_bias,
    stride_bias_l,
    stride_bias_n,
    p_diagonal,
    p_buckets,
    queries,
    p_mask,
    p_q_scale,
    p_k_scale,
    p_lse,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,
    NORMALISED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    o_row = tl.arange(0, BLOCK_ROWS)
    o_n = tl.arange(0, BLOCK_N)
    for i_n in range(0, keys, BLOCK_N):
        m_n = i_n + o_n < keys
        i_first = i_n + tl.zeros([], tl.int32)
        b_k = load_rows(p_k, stride_k_l, i_first, o_n, m_n, o_d, D, BLOCK_D)
        b_first, b_second = key_parts(b_k, p_q_scale, p_k_scale, o_d, D, NORMALISED)
        b_s = scores(
            b_q,
            b_first,
            b_second,
            b_factor,
            i_m,
            o_m,
            m_m,
            i_first,
            o_n,
            m_n,
            p_bias,
            stride_bias_l,
            stride_bias_n,
            p_diagonal,
            queries,
            p_mask,
            HAS_BIAS,
            HAS_TABLE,
            HAS_MASK,
            NORMALISED,
            INTERPRETED,
        )
        b_p = probabilities(b_s, p_lse, i_m, o_m, m_m)
        b_v = load_rows(p_v, stride_v_l, i_first, o_n, m_n, o_d, D, BLOCK_D)
        b_ds = b_p * (product(b_dout, tl.trans(b_v), INTERPRETED) - b_delta[:, None])
        b_k = normalised(b_k, p_k_scale, o_d, D, NORMALISED)
        b_dq += product(b_ds.to(b_k.dtype), b_k, INTERPRETED)
        if NEEDS_TABLE:
            # Few buckets meet in a tile: those far from the diagonal have one.
            m_mn = m_m[:, None] & m_n[None, :]
            o_diagonal = (i_first - i_m + queries - 1) + (o_n[None, :] - o_m[:, None])
            b_bucket = tl.load(p_buckets + o_diagonal, mask=m_mn, other=-1)
            i_lowest = tl.min(tl.min(tl.where(m_mn, b_bucket, 2147483647), axis=1), axis=0)
            i_highest = tl.max(tl.max(b_bucket, axis=1), axis=0)
            for i_row in range(i_lowest, i_highest + 1):
                b_sum = tl.sum(tl.sum(tl.where(b_bucket == i_row, b_ds, 0.0), axis=1), axis=0)
                b_dtable += tl.where(o_row == i_row, b_sum, 0.0)
    return b_dq, b_dtable


@triton.jit
def attention_backward_queries_kernel(
    p_q,  # (B, Hq, Lq, D)
    p_k,  # (B, Hkv, Lk, D)
    p_v,
    p_context_k,  # (B, Hkv, Lc, D)
    p_context_v,
    p_bias,  # (B, Hq, Lq, Lc + Lk)
    p_diagonal,  # (Hq, Lq + Lk - 1)
    p_buckets,  # (Lq + Lk - 1,)
    p_mask,  # (B, Lc + Lk)
    p_q_scale,  # (D,)
    p_k_scale,
    p_dout,  # (B, Hq, Lq, D)
    p_lse,  # (B, Hq, Lq)
    p_delta,
    p_dq,  # (B, Hq, Lq, D)
    p_dq_scale,  # (programs, D)
    p_dtable,  # (programs, rows)
    scale,
    heads,
    group,
    queries,
    keys,
    context,
    rows,
    stride_q_b,
    stride_q_h,
    stride_q_l,
    stride_k_b,
    stride_k_h,
    stride_k_l,
    stride_v_b,
    stride_v_h,
    stride_v_l,
    stride_context_k_b,
    stride_context_k_h,
    stride_context_k_l,
    stride_context_v_b,
    stride_context_v_h,
    stride_context_v_l,
    stride_bias_b,
    stride_bias_h,
    stride_bias_l,
    stride_bias_n,
    stride_mask_b,
    stride_dout_b,
    stride_dout_h,
    stride_dout_l,
    stride_dq_b,
    stride_dq_h,
    stride_dq_l,
    HAS_CONTEXT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,
    NORMALISED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dq of BLOCK_M queries of one head of one sample, and their part of the gradients of q_scale and the table."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    i_m = (i_program % blocks).to(tl.int32) * BLOCK_M
    i_bh = i_program // blocks
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group

    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = i_m + o_m < queries
    b_q = load_rows(p_q + i_b * stride_q_b + i_h * stride_q_h, stride_q_l, i_m, o_m, m_m, o_d, D, BLOCK_D)
    b_factor = query_factor(b_q, scale, NORMALISED)
    b_dout = load_rows(
        p_dout + i_b * stride_dout_b + i_h * stride_dout_h, stride_dout_l, i_m, o_m, m_m, o_d, D, BLOCK_D
    )
    p_lse += i_bh * queries
    b_delta = tl.load(p_delta + i_bh * queries + i_m + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dtable = tl.zeros([BLOCK_ROWS], tl.float32)
    p_bias += i_b * stride_bias_b + i_h * stride_bias_h
    p_mask += i_b * stride_mask_b
    p_diagonal += i_h * (queries + keys - 1)
    if HAS_CONTEXT:
        b_dq, b_dtable = _queries_from_segment(
            b_dq,
            b_dtable,
            b_q,
            b_factor,
            b_dout,
            b_delta,
            p_context_k + i_b * stride_context_k_b + i_kv * stride_context_k_h,
            p_context_v + i_b * stride_context_v_b + i_kv * stride_context_v_h,
            stride_context_k_l,
            stride_context_v_l,
            context,
            i_m,
            o_m,
            m_m,
            o_d,
            p_bias,
            stride_bias_l,
            stride_bias_n,
            p_diagonal,
            p_buckets,
            queries,
            p_mask,
            p_q_scale,
            p_k_scale,
            p_lse,
            HAS_BIAS,
            False,
            HAS_MASK,
            False,
            NORMALISED,
            D,
            BLOCK_D,
            BLOCK_N,
            BLOCK_ROWS,
            INTERPRETED,
        )
    b_dq, b_dtable = _queries_from_segment(
        b_dq,
        b_dtable,
        b_q,
        b_factor,
        b_dout,
        b_delta,
        p_k + i_b * stride_k_b + i_kv * stride_k_h,
        p_v + i_b * stride_v_b + i_kv * stride_v_h,
        stride_k_l,
        stride_v_l,
        keys,
        i_m,
        o_m,
        m_m,
        o_d,
        p_bias + context * stride_bias_n,
        stride_bias_l,
        stride_bias_n,
        p_diagonal,
        p_buckets,
        queries,
        p_mask + context,
        p_q_scale,
        p_k_scale,
        p_lse,
        HAS_BIAS,
        HAS_TABLE,
        HAS_MASK,
        NEEDS_TABLE,
        NORMALISED,
        D,
        BLOCK_D,
        BLOCK_N,
        BLOCK_ROWS,
        INTERPRETED,
    )
    if NEEDS_TABLE:
        o_row = tl.arange(0, BLOCK_ROWS)
        tl.store(p_dtable + i_program * rows + o_row, b_dtable, mask=o_row < rows)
    b_dq = b_dq * scale
    m_md = m_m[:, None] & (o_d < D)[None, :]
    if NORMALISED:
        b_dq, b_terms = normalised_gradient(b_dq, b_q, p_q_scale, o_d, D)
        b_sum = tl.sum(tl.where(m_md, b_terms, 0.0), axis=0)
        tl.store(p_dq_scale + i_program * D + o_d, b_sum, mask=o_d < D)
    p_tile = p_dq + i_b * stride_dq_b + i_h * stride_dq_h + i_m.to(tl.int64) * stride_dq_l
    tl.store(p_tile + o_m[:, None] * stride_dq_l + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_md)
