"""Forward noising in plain PyTorch; `imagen_fast.ops.add_noise` explains it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import dense, dense_like


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """`sqrt(alpha) * x0 + sqrt(1 - alpha) * noise` with timesteps (B,); see `imagen_fast.ops.add_noise`."""
    x0 = dense(x0)
    n = alphas_cumprod.shape[0]
    alpha = alphas_cumprod.double()[timesteps.clamp(0, n - 1)]
    alpha = torch.where((timesteps >= 0) & (timesteps < n), alpha, torch.nan)
    signal, deviation = (factor.sqrt().to(x0.dtype).reshape(-1, *[1] * (x0.dim() - 1)) for factor in (alpha, 1 - alpha))
    return signal * x0 + deviation * dense_like(noise, x0)
