"""Device functions of attention's kernels: one tile of scores, and what is done to a tile before it is multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):
    """a @ b in float32; of float32 operands without TF32. Triton's interpreter multiplies bfloat16 operands as raw
    integers, so there they are cast up."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_rows(p, stride_l, i_first, o_l, m_l, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i_first + o_l of a (L, D) matrix whose last stride is 1; zero outside. [L, BLOCK_D]"""
    p_rows = p + i_first.to(tl.int64) * stride_l + o_l[:, None] * stride_l + o_d[None, :]
    if BLOCK_D == D:
        return tl.load(p_rows, mask=m_l[:, None], other=0.0)
    else:
        return tl.load(p_rows, mask=m_l[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def inverse_norm(b_x):
    """1 / max(|x|, 1e-12) over D. [L]"""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, axis=1)), 1e-12)


@triton.jit
def normalised(b_x, p_scale, o_d, D: tl.constexpr, NORMALISED: tl.constexpr):
    """x / max(|x|, 1e-12) * scale over D, in x's dtype; or x as it is."""
    if NORMALISED:
        b_wide = b_x.to(tl.float32)
        b_scale = tl.load(p_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        return (b_wide * inverse_norm(b_wide)[:, None] * b_scale[None, :]).to(b_x.dtype)
    else:
        return b_x


@triton.jit
def normalised_gradient(b_dn, b_x, p_scale, o_d, D: tl.constexpr):
    """From the gradient of `normalised`: those of x, and of scale (as terms, to be summed over rows). [L, D] each"""
    b_wide = b_x.to(tl.float32)
    b_scale = tl.load(p_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_inverse = inverse_norm(b_wide)
    b_unit = b_wide * b_inverse[:, None]
    b_du = b_dn * b_scale[None, :]
    # Below the smallest norm the divisor is constant.
    b_along = tl.where(b_inverse < 1e12, tl.sum(b_du * b_unit, axis=1), 0.0)
    return b_inverse[:, None] * (b_du - b_unit * b_along[:, None]), b_dn * b_unit


@triton.jit
def query_factor(b_q, scale, NORMALISED: tl.constexpr):
    """What the products of a query with all keys are multiplied by. [M]"""
    if NORMALISED:
        return scale * inverse_norm(b_q.to(tl.float32))
    else:
        return tl.sum(b_q.to(tl.float32) * 0.0, axis=1) + scale


@triton.jit
def key_parts(b_k, p_q_scale, p_k_scale, o_d, D: tl.constexpr, NORMALISED: tl.constexpr):
    """The key that a query is multiplied with as it is, in two parts of k's dtype. [N, D] each

    Normalised keys times both scales would lose half their digits in 16 bits, and imagen-pytorch multiplies scores by
    8: what the first part rounds off is the second.
    """
    if NORMALISED:
        b_wide = b_k.to(tl.float32)
        b_scale = tl.load(p_q_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_scale *= tl.load(p_k_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_wide = b_wide * inverse_norm(b_wide)[:, None] * b_scale[None, :]
        b_first = b_wide.to(b_k.dtype)
        return b_first, (b_wide - b_first.to(tl.float32)).to(b_k.dtype)
    else:
        return b_k, b_k


@triton.jit
def scores(
    b_q,  # [M, D], as it is in memory
    b_first,  # [N, D], of `key_parts`
    b_second,
    b_factor,  # [M], of `query_factor`
    i_m,  # the first query
    o_m,
    m_m,
    i_n,  # the first key, counted in its segment
    o_n,
    m_n,
    p_bias,  # of this sample and head, at the segment's first key
    stride_bias_l,
    stride_bias_n,
    p_diagonal,  # of this head: the bias of diagonal j - i + queries - 1
    queries,
    p_mask,  # of this sample, at the segment's first key
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALISED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """scale * q k^T + bias, -inf where a key is not attended to. [M, N]"""
    b_s = product(b_q, tl.trans(b_first), INTERPRETED)
    if NORMALISED and b_q.dtype != tl.float32:
        b_s += product(b_q, tl.trans(b_second), INTERPRETED)
    b_s = b_s * b_factor[:, None]
    if HAS_BIAS:
        p_tile = p_bias + (i_m.to(tl.int64) * stride_bias_l + i_n * stride_bias_n)
        p_tile += o_m[:, None] * stride_bias_l + o_n[None, :] * stride_bias_n
        b_s += tl.load(p_tile, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    if HAS_TABLE:
        o_diagonal = (i_n - i_m + queries - 1) + (o_n[None, :] - o_m[:, None])
        b_s += tl.load(p_diagonal + o_diagonal, mask=m_m[:, None] & m_n[None, :], other=0.0)
    if HAS_MASK:
        m_n = m_n & (tl.load(p_mask + i_n + o_n, mask=m_n, other=0) != 0)
    return tl.where(m_n[None, :], b_s, MINUS_INFINITY)


@triton.jit
def finite_or_zero(b_x):
    """x, and 0 in the place of -inf: what may be subtracted from scores of which all are -inf."""
    return tl.where(b_x == MINUS_INFINITY, 0.0, b_x)


@triton.jit
def probabilities(b_s, p_lse, i_m, o_m, m_m):
    """exp(s - lse), 0 where there is nothing to attend to. [M, N]"""
    b_lse = tl.load(p_lse + i_m + o_m, mask=m_m, other=0.0)
    b_p = tl.exp(b_s - tl.where(b_lse == MINUS_INFINITY, 0.0, b_lse)[:, None])
    return tl.where(m_m[:, None], b_p, 0.0)
