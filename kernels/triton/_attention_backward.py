"""Kernels of attention's gradients of keys, values and biases; `attention.py` says how they are launched.

The scores s and P = exp(s - lse) are computed again. With dP = dout v^T and delta = sum_d dout out,

    dS = P (dP - delta)    dv = P^T dout    dq = scale dS k    dk = scale dS^T q    dbias = dS

Every sum is taken by one program, in one order: the gradient of keys by a program for each block of keys, which goes
through the queries of all heads that read it; that of queries by one for each block of queries; that of a bias by one
for each block of the bias, which goes through whatever it is broadcast over. The table's gradient is collected by the
programs of the queries, for each bucket, and summed over them afterwards.
"""

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
def attention_backward_keys_kernel(
    p_q,  # (B, Hq, Lq, D)
    p_k,  # (B, Hkv, N, D): one segment
    p_v,
    p_bias,  # (B, Hq, Lq, L), at the segment's first key
    p_diagonal,  # (Hq, Lq + Lk - 1)
    p_mask,  # (B, L), at the segment's first key
    p_q_scale,  # (D,)
    p_k_scale,
    p_dout,  # (B, Hq, Lq, D)
    p_lse,  # (B, Hq, Lq)
    p_delta,
    p_dk,  # (B, Hkv, N, D)
    p_dv,
    p_dk_scale,  # (programs, D)
    scale,
    kv_heads,
    group,  # query heads to a key head
    queries,
    keys,
    diagonals,
    stride_q_b,
    stride_q_h,
    stride_q_l,
    stride_k_b,
    stride_k_h,
    stride_k_l,
    stride_v_b,
    stride_v_h,
    stride_v_l,
    stride_bias_b,
    stride_bias_h,
    stride_bias_l,
    stride_bias_n,
    stride_mask_b,
    stride_dout_b,
    stride_dout_h,
    stride_dout_l,
    stride_dk_b,
    stride_dk_h,
    stride_dk_l,
    stride_dv_b,
    stride_dv_h,
    stride_dv_l,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALISED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one head of one sample."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    i_n = (i_program % blocks).to(tl.int32) * BLOCK_N
    i_b, i_kv = i_program // blocks // kv_heads, i_program // blocks % kv_heads

    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = i_n + o_n < keys
    b_k = load_rows(p_k + i_b * stride_k_b + i_kv * stride_k_h, stride_k_l, i_n, o_n, m_n, o_d, D, BLOCK_D)
    b_first, b_second = key_parts(b_k, p_q_scale, p_k_scale, o_d, D, NORMALISED)
    b_v = load_rows(p_v + i_b * stride_v_b + i_kv * stride_v_h, stride_v_l, i_n, o_n, m_n, o_d, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_g in range(0, group):
        i_h = i_kv * group + i_g
        i_row = (i_b * kv_heads * group + i_h) * queries
        for i_m in range(0, queries, BLOCK_M):
            m_m = i_m + o_m < queries
            i_first = i_m + tl.zeros([], tl.int32)
            b_q = load_rows(p_q + i_b * stride_q_b + i_h * stride_q_h, stride_q_l, i_first, o_m, m_m, o_d, D, BLOCK_D)
            b_s = scores(
                b_q,
                b_first,
                b_second,
                query_factor(b_q, scale, NORMALISED),
                i_first,
                o_m,
                m_m,
                i_n,
                o_n,
                m_n,
                p_bias + i_b * stride_bias_b + i_h * stride_bias_h,
                stride_bias_l,
                stride_bias_n,
                p_diagonal + i_h * diagonals,
                queries,
                p_mask + i_b * stride_mask_b,
                HAS_BIAS,
                HAS_TABLE,
                HAS_MASK,
                NORMALISED,
                INTERPRETED,
            )
            b_p = probabilities(b_s, p_lse + i_row, i_m, o_m, m_m)
            b_dout = load_rows(
                p_dout + i_b * stride_dout_b + i_h * stride_dout_h,
                stride_dout_l,
                i_first,
                o_m,
                m_m,
                o_d,
                D,
                BLOCK_D,
            )
            b_dv += product(tl.trans(b_p.to(b_dout.dtype)), b_dout, INTERPRETED)
            b_delta = tl.load(p_delta + i_row + i_m + o_m, mask=m_m, other=0.0)
            b_ds = b_p * (product(b_dout, tl.trans(b_v), INTERPRETED) - b_delta[:, None])
            b_q = normalised(b_q, p_q_scale, o_d, D, NORMALISED)
            b_dk += product(tl.trans(b_ds.to(b_q.dtype)), b_q, INTERPRETED)
    b_dk = b_dk * scale
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    if NORMALISED:
        b_dk, b_terms = normalised_gradient(b_dk, b_k, p_k_scale, o_d, D)
        b_sum = tl.sum(tl.where(m_nd, b_terms, 0.0), axis=0)
        tl.store(p_dk_scale + i_program * D + o_d, b_sum, mask=o_d < D)
    p_tile = p_dk + i_b * stride_dk_b + i_kv * stride_dk_h + i_n.to(tl.int64) * stride_dk_l
    tl.store(p_tile + o_n[:, None] * stride_dk_l + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_nd)
    p_tile = p_dv + i_b * stride_dv_b + i_kv * stride_dv_h + i_n.to(tl.int64) * stride_dv_l
    tl.store(p_tile + o_n[:, None] * stride_dv_l + o_d[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_nd)


@triton.jit
def attention_backward_bias_kernel(
    p_q,  # (B, Hq, Lq, D)
    p_k,  # (B, Hkv, N, D): one segment
    p_v,
    p_bias,  # (B, Hq, Lq, L), at the segment's first key
    p_mask,  # (B, L), at the segment's first key
    p_q_scale,  # (D,)
    p_k_scale,
    p_dout,  # (B, Hq, Lq, D)
    p_lse,  # (B, Hq, Lq)
    p_delta,
    p_dbias,  # (1 or B, 1 or Hq, 1 or Lq, L or blocks of the segment), at the segment's first
    scale,
    batch,
    heads,
    group,
    queries,
    keys,
    over_b,  # how many samples, heads and blocks of queries a program goes through
    over_h,
    over_m,
    bias_heads,
    stride_q_b,
    stride_q_h,
    stride_q_l,
    stride_k_b,
    stride_k_h,
    stride_k_l,
    stride_v_b,
    stride_v_h,
    stride_v_l,
    stride_bias_b,
    stride_bias_h,
    stride_bias_l,
    stride_bias_n,
    stride_mask_b,
    stride_dout_b,
    stride_dout_h,
    stride_dout_l,
    stride_dbias_b,
    stride_dbias_h,
    stride_dbias_l,
    HAS_MASK: tl.constexpr,
    NORMALISED: tl.constexpr,
    PER_QUERY: tl.constexpr,
    PER_KEY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dbias of BLOCK_M queries (or of all, summed) and BLOCK_N keys (or their sum), summed over samples and heads that
    share a bias."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks_n = tl.cdiv(keys, BLOCK_N)
    blocks_m = tl.cdiv(queries, BLOCK_M) // over_m
    i_block_n = (i_program % blocks_n).to(tl.int32)
    i_block_m = (i_program // blocks_n % blocks_m).to(tl.int32)
    i_bias_h = i_program // blocks_n // blocks_m % bias_heads
    i_bias_b = i_program // blocks_n // blocks_m // bias_heads
    i_n = i_block_n * BLOCK_N

    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = i_n + o_n < keys
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in range(0, over_b * over_h):
        i_b, i_h = i_bias_b + j // over_h, i_bias_h + j % over_h
        i_kv = i_h // group
        b_k = load_rows(p_k + i_b * stride_k_b + i_kv * stride_k_h, stride_k_l, i_n, o_n, m_n, o_d, D, BLOCK_D)
        b_first, b_second = key_parts(b_k, p_q_scale, p_k_scale, o_d, D, NORMALISED)
        b_v = load_rows(p_v + i_b * stride_v_b + i_kv * stride_v_h, stride_v_l, i_n, o_n, m_n, o_d, D, BLOCK_D)
        i_row = (i_b * heads + i_h) * queries
        for i_over in range(0, over_m):
            i_m = (i_block_m + i_over) * BLOCK_M
            m_m = i_m + o_m < queries
            b_q = load_rows(p_q + i_b * stride_q_b + i_h * stride_q_h, stride_q_l, i_m, o_m, m_m, o_d, D, BLOCK_D)
            b_s = scores(
                b_q,
                b_first,
                b_second,
                query_factor(b_q, scale, NORMALISED),
                i_m,
                o_m,
                m_m,
                i_n,
                o_n,
                m_n,
                p_bias + i_b * stride_bias_b + i_h * stride_bias_h,
                stride_bias_l,
                stride_bias_n,
                p_lse,
                queries,
                p_mask + i_b * stride_mask_b,
                True,
                False,
                HAS_MASK,
                NORMALISED,
                INTERPRETED,
            )
            b_p = probabilities(b_s, p_lse + i_row, i_m, o_m, m_m)
            b_dout = load_rows(
                p_dout + i_b * stride_dout_b + i_h * stride_dout_h, stride_dout_l, i_m, o_m, m_m, o_d, D, BLOCK_D
            )
            b_delta = tl.load(p_delta + i_row + i_m + o_m, mask=m_m, other=0.0)
            b_dbias += b_p * (product(b_dout, tl.trans(b_v), INTERPRETED) - b_delta[:, None])
    p_dbias += i_bias_b * stride_dbias_b + i_bias_h * stride_dbias_h
    i_m = i_block_m * BLOCK_M
    m_m = i_m + o_m < queries
    if PER_QUERY and PER_KEY:
        p_tile = p_dbias + i_m.to(tl.int64) * stride_dbias_l + i_n + o_m[:, None] * stride_dbias_l + o_n[None, :]
        tl.store(p_tile, b_dbias.to(p_dbias.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
    elif PER_QUERY:
        p_column = p_dbias + (i_m.to(tl.int64) + o_m) * stride_dbias_l + i_block_n
        tl.store(p_column, tl.sum(b_dbias, axis=1).to(p_dbias.dtype.element_ty), mask=m_m)
    elif PER_KEY:
        tl.store(p_dbias + i_n + o_n, tl.sum(b_dbias, axis=0).to(p_dbias.dtype.element_ty), mask=m_n)
    else:
        tl.store(p_dbias + i_block_n, tl.sum(tl.sum(b_dbias, axis=1), axis=0))
