"""Kernels of attention's delta, which its backward kernels subtract; `_attention_backward` says what from.

In 16 bits delta is taken from P and dP, at the cost of two more products: out has been rounded, and where a query
attends to one key almost alone, the small difference dP - delta would be lost in that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import key_parts, load_rows, probabilities, product, query_factor, scores


@triton.jit
def attention_delta_kernel(
    p_out,  # (B, Hq, Lq, D)
    p_dout,
    p_delta,  # (B, Hq, Lq)
    heads,
    queries,
    stride_out_b,
    stride_out_h,
    stride_out_l,
    stride_dout_b,
    stride_dout_h,
    stride_dout_l,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sum_d dout out"""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    i_m = (i_program % blocks).to(tl.int32) * BLOCK_M
    i_bh = i_program // blocks
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = i_m + o_m < queries
    b_out = load_rows(p_out + i_b * stride_out_b + i_h * stride_out_h, stride_out_l, i_m, o_m, m_m, o_d, D, BLOCK_D)
    b_dout = load_rows(
        p_dout + i_b * stride_dout_b + i_h * stride_dout_h, stride_dout_l, i_m, o_m, m_m, o_d, D, BLOCK_D
    )
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), axis=1)
    tl.store(p_delta + i_bh * queries + i_m + o_m, b_delta, mask=m_m)


@triton.jit
def _delta_from_segment(
    b_delta,  # [M]
    b_q,
    b_factor,  # [M]
    b_dout,
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
    queries,
    p_mask,
    p_q_scale,
    p_k_scale,
    p_lse,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALISED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
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
        b_delta += tl.sum(b_p * product(b_dout, tl.trans(b_v), INTERPRETED), axis=1)
    return b_delta


@triton.jit
def attention_exact_delta_kernel(
    p_q,  # (B, Hq, Lq, D)
    p_k,  # (B, Hkv, Lk, D)
    p_v,
    p_context_k,  # (B, Hkv, Lc, D)
    p_context_v,
    p_bias,  # (B, Hq, Lq, Lc + Lk)
    p_diagonal,  # (Hq, Lq + Lk - 1)
    p_mask,  # (B, Lc + Lk)
    p_q_scale,  # (D,)
    p_k_scale,
    p_dout,  # (B, Hq, Lq, D)
    p_lse,  # (B, Hq, Lq)
    p_delta,
    scale,
    heads,
    group,
    queries,
    keys,
    context,
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
    HAS_CONTEXT: tl.constexpr,
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
    """delta as sum_j P dP: in float32, where dout out has what out lost when it was rounded."""
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
    b_delta = tl.zeros([BLOCK_M], tl.float32)
    p_bias += i_b * stride_bias_b + i_h * stride_bias_h
    p_mask += i_b * stride_mask_b
    p_diagonal += i_h * (queries + keys - 1)
    if HAS_CONTEXT:
        b_delta = _delta_from_segment(
            b_delta,
            b_q,
            b_factor,
            b_dout,
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
            queries,
            p_mask,
            p_q_scale,
            p_k_scale,
            p_lse,
            HAS_BIAS,
            False,
            HAS_MASK,
            NORMALISED,
            D,
            BLOCK_D,
            BLOCK_N,
            INTERPRETED,
        )
    b_delta = _delta_from_segment(
        b_delta,
        b_q,
        b_factor,
        b_dout,
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
        queries,
        p_mask + context,
        p_q_scale,
        p_k_scale,
        p_lse,
        HAS_BIAS,
        HAS_TABLE,
        HAS_MASK,
        NORMALISED,
        D,
        BLOCK_D,
        BLOCK_N,
        INTERPRETED,
    )
    tl.store(p_delta + i_bh * queries + i_m + o_m, b_delta, mask=m_m)
