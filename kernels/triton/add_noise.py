"""Triton kernel of `imagen_fast.ops.add_noise`: sqrt(alpha) x0 + sqrt(1 - alpha) noise, one alpha for each sample."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from .._triton import Configurations, ceil_div, device_of, power_of_two_at_least, wrap_triton
from ._tiles import dense_strides, tile_origin

CONFIGURATIONS = Configurations("add_noise")


@triton.jit
def add_noise_kernel(
    p_x0,  # (B, C, L)
    p_noise,
    p_y,  # strides of x0
    p_alphas_cumprod,  # (n,)
    p_timesteps,  # (B,) int32 or int64
    channels,
    positions,
    n,
    stride_x0_c,
    stride_x0_l,
    stride_noise_c,
    stride_noise_l,
    stride_alphas,
    stride_timesteps,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One tile. A sample whose timestep is outside of [0, n) becomes NaN."""
    i_b, i_c, i_l = tile_origin(channels, positions, BLOCK_C, BLOCK_L)
    timestep = tl.load(p_timesteps + i_b * stride_timesteps).to(tl.int64)
    known = (timestep >= 0) & (timestep < n)
    alpha = tl.load(p_alphas_cumprod + timestep * stride_alphas, mask=known, other=float("nan")).to(tl.float64)
    signal, deviation = tl.sqrt(alpha).to(tl.float32), tl.sqrt(1.0 - alpha).to(tl.float32)

    o_c, o_l = i_c + tl.arange(0, BLOCK_C), i_l + tl.arange(0, BLOCK_L)
    m = (o_c < channels)[:, None] & (o_l < positions)[None, :]  # [C, L]
    o_sample = i_b * channels * positions
    o_x0 = o_sample + o_c[:, None] * stride_x0_c + o_l[None, :] * stride_x0_l
    o_noise = o_sample + o_c[:, None] * stride_noise_c + o_l[None, :] * stride_noise_l
    b_x0 = tl.load(p_x0 + o_x0, mask=m, other=0.0).to(tl.float32)
    b_noise = tl.load(p_noise + o_noise, mask=m, other=0.0).to(tl.float32)
    b_y = signal * b_x0 + deviation * b_noise
    tl.store(p_y + o_x0, b_y.to(p_y.dtype.element_ty), mask=m)


def forward(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """y like x0. x0 and noise are dense NCHW or NHWC; alphas_cumprod (n,) and timesteps (B,) have any strides."""
    y = x0.new_empty_strided(x0.shape, x0.stride())
    if x0.numel() == 0:
        return y
    row = CONFIGURATIONS["forward", device_of(x0)]
    batch, channels = x0.shape[:2]
    positions = x0.numel() // (batch * channels)
    strides = [dense_strides(tensor, channels, positions) for tensor in (x0, noise)]
    if strides[0] == strides[1]:  # in one order in memory, whichever
        channels, positions, strides = 1, channels * positions, [(0, 1), (0, 1)]
    block_c = min(power_of_two_at_least(channels), row["channels"])
    block_l = min(power_of_two_at_least(positions), row["tile"] // block_c)
    grid = (batch * ceil_div(channels, block_c) * ceil_div(positions, block_l),)
    wrap_triton(add_noise_kernel)[grid](
        p_x0=x0,
        p_noise=noise,
        p_y=y,
        p_alphas_cumprod=alphas_cumprod,
        p_timesteps=timesteps,
        channels=channels,
        positions=positions,
        n=alphas_cumprod.shape[0],
        stride_x0_c=strides[0][0],
        stride_x0_l=strides[0][1],
        stride_noise_c=strides[1][0],
        stride_noise_l=strides[1][1],
        stride_alphas=alphas_cumprod.stride(0),
        stride_timesteps=timesteps.stride(0),
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        num_warps=row["num_warps"],
    )
    return y
