"""The gradients of a norm's parameters, from the sums over positions of every (sample, channel), S = sum dt and
T = sum dt xhat; and how launchers pass a norm's parameters to kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import triton
import triton.language as tl

from .._triton import ceil_div, power_of_two_at_least, wrap_triton


@triton.jit
def norm_parameters_kernel(
    p_sum_dt,  # (B, C)
    p_sum_dt_xhat,
    p_weight,  # (C,)
    p_bias,
    p_scale,  # (B, C)
    p_dweight,  # (C,)
    p_dbias,
    p_dscale,  # (B, C)
    p_dshift,
    batch,
    channels,
    stride_weight,
    stride_bias,
    stride_scale_b,
    stride_scale_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    NEEDS_SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parameters' gradients, of BLOCK_C channels:

    dshift = S      dscale = weight T + bias S      dweight = sum_B (1 + scale) T      dbias = sum_B (1 + scale) S
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_weight = tl.full([BLOCK_C], 1.0, tl.float32)
    b_bias = tl.full([BLOCK_C], 0.0, tl.float32)
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + o_c * stride_weight, mask=m_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_c * stride_bias, mask=m_c, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for b in range(0, batch, BLOCK_B):
        o_b = (b + tl.arange(0, BLOCK_B)).to(tl.int64)
        m_bc = (o_b < batch)[:, None] & m_c[None, :]
        o_bc = o_b[:, None] * channels + o_c[None, :]
        b_s = tl.load(p_sum_dt + o_bc, mask=m_bc, other=0.0)
        b_t = tl.load(p_sum_dt_xhat + o_bc, mask=m_bc, other=0.0)
        if NEEDS_SHIFT:
            tl.store(p_dshift + o_bc, b_s.to(p_dshift.dtype.element_ty), mask=m_bc)
        if NEEDS_SCALE:
            b_dscale = b_weight[None, :] * b_t
            if HAS_BIAS:  # 0 times an infinite sum would be NaN
                b_dscale += b_bias[None, :] * b_s
            tl.store(p_dscale + o_bc, b_dscale.to(p_dscale.dtype.element_ty), mask=m_bc)
        if HAS_SCALE:
            o_scale = o_b[:, None] * stride_scale_b + o_c[None, :] * stride_scale_c
            b_scale = 1.0 + tl.load(p_scale + o_scale, mask=m_bc, other=0.0).to(tl.float32)
            b_s = b_s * b_scale
            b_t = b_t * b_scale
        b_dweight += b_t
        b_dbias += b_s
    if NEEDS_WEIGHT:
        tl.store(p_dweight + o_c, tl.sum(b_dweight, axis=0).to(p_dweight.dtype.element_ty), mask=m_c)
    if NEEDS_BIAS:
        tl.store(p_dbias + o_c, tl.sum(b_dbias, axis=0).to(p_dbias.dtype.element_ty), mask=m_c)


def modulation_arguments(x: Tensor, **parameters: Tensor | None) -> dict[str, Any]:
    """The arguments that stand for weight (C,), bias (C,), scale (B, C) and shift (B, C), of any strides, or None."""
    arguments: dict[str, Any] = {}
    for name, p in parameters.items():
        arguments[f"HAS_{name.upper()}"] = p is not None
        arguments[f"p_{name}"] = x if p is None else p  # a pointer that is not followed
        if name in ("weight", "bias"):
            arguments[f"stride_{name}"] = 0 if p is None else p.stride(0)
        else:
            arguments[f"stride_{name}_b"], arguments[f"stride_{name}_c"] = (0, 0) if p is None else p.stride()
    return arguments


def parameter_gradients(
    row: dict[str, Any],
    sum_dt: Tensor,
    sum_dt_xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of weight, bias, scale and shift from S and T, (B, C) in float32; those not asked for are empty.

    `row` says how the kernel is launched; bit i of `needs`, whether the i-th of the four is asked for.
    """
    batch, channels = sum_dt.shape
    parameters = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    wanted = {name: bool(needs >> i & 1) for i, name in enumerate(parameters)}
    gradients = {
        name: p.new_empty(p.shape) if p is not None and wanted[name] else sum_dt.new_empty(0)
        for name, p in parameters.items()
    }
    if any(wanted.values()):
        wrap_triton(norm_parameters_kernel)[(ceil_div(channels, row["channels"]),)](
            p_sum_dt=sum_dt,
            p_sum_dt_xhat=sum_dt_xhat,
            **modulation_arguments(sum_dt, weight=weight, bias=bias, scale=scale),
            **{f"p_d{name}": gradient for name, gradient in gradients.items()},
            **{f"NEEDS_{name.upper()}": want for name, want in wanted.items()},
            batch=batch,
            channels=channels,
            BLOCK_B=min(power_of_two_at_least(batch), row["samples"]),
            BLOCK_C=row["channels"],
            num_warps=row["num_warps"],
        )
    return tuple(gradients.values())  # type: ignore[return-value]
