"""Forward kernel of attention; `attention.py` says how it is launched.

Keys are taken in blocks, those of the context first. For each query the largest score so far m, the sum l of
exp(s - m) and the weighted sum of values follow the blocks (arXiv:2205.14135), so no score goes to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import MINUS_INFINITY, finite_or_zero, key_parts, load_rows, product, query_factor, scores


@triton.jit
def _attend_to_segment(
    b_q,
    b_factor,  # [M]
    b_m,  # [M]
    b_l,  # [M]
    b_acc,  # [M, D]
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
        b_k = load_rows(p_k, stride_k_l, i_n + tl.zeros([], tl.int32), o_n, m_n, o_d, D, BLOCK_D)
        b_first, b_second = key_parts(b_k, p_q_scale, p_k_scale, o_d, D, NORMALISED)
        b_s = scores(
            b_q,
            b_first,
            b_second,
            b_factor,
            i_m,
            o_m,
            m_m,
            i_n,
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
        b_new_m = tl.maximum(b_m, tl.max(b_s, axis=1))
        b_finite = finite_or_zero(b_new_m)
        b_p = tl.exp(b_s - b_finite[:, None])
        b_decay = tl.exp(b_m - b_finite)
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
        b_v = load_rows(p_v, stride_v_l, i_n + tl.zeros([], tl.int32), o_n, m_n, o_d, D, BLOCK_D)
        b_acc = b_acc * b_decay[:, None] + product(b_p.to(b_v.dtype), b_v, INTERPRETED)
        b_m = b_new_m
    return b_m, b_l, b_acc


@triton.jit
def attention_forward_kernel(
    p_q,  # (B, Hq, Lq, D)
    p_k,  # (B, Hkv, Lk, D)
    p_v,
    p_context_k,  # (B, Hkv, Lc, D)
    p_context_v,
    p_bias,  # (B, Hq, Lq, Lc + Lk), any stride but the last may be 0, or all
    p_diagonal,  # (Hq, Lq + Lk - 1)
    p_mask,  # (B, Lc + Lk)
    p_q_scale,  # (D,)
    p_k_scale,
    p_out,  # (B, Hq, Lq, D)
    p_lse,  # (B, Hq, Lq)
    scale,
    heads,
    group,  # query heads to a key head
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
    stride_out_b,
    stride_out_h,
    stride_out_l,
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
    """BLOCK_M queries of one head of one sample."""
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
    b_m = tl.full([BLOCK_M], MINUS_INFINITY, tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    p_bias += i_b * stride_bias_b + i_h * stride_bias_h
    p_mask += i_b * stride_mask_b
    p_diagonal += i_h * (queries + keys - 1)
    if HAS_CONTEXT:
        b_m, b_l, b_acc = _attend_to_segment(
            b_q,
            b_factor,
            b_m,
            b_l,
            b_acc,
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
            HAS_BIAS,
            False,
            HAS_MASK,
            NORMALISED,
            D,
            BLOCK_D,
            BLOCK_N,
            INTERPRETED,
        )
    b_m, b_l, b_acc = _attend_to_segment(
        b_q,
        b_factor,
        b_m,
        b_l,
        b_acc,
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
        HAS_BIAS,
        HAS_TABLE,
        HAS_MASK,
        NORMALISED,
        D,
        BLOCK_D,
        BLOCK_N,
        INTERPRETED,
    )
    # With nothing to attend to, l is 0 and so is the sum of values.
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p_tile = p_out + i_b * stride_out_b + i_h * stride_out_h + i_m.to(tl.int64) * stride_out_l
    p_tile += o_m[:, None] * stride_out_l + o_d[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])
    tl.store(p_lse + i_bh * queries + i_m + o_m, b_m + tl.log(b_l), mask=m_m)
