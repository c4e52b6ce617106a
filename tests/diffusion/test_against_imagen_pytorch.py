"""Tables against imagen-pytorch 2.1's two samplers, step by step, on shared outputs and noise.

The package is not installed here (it needs torchvision), so its formulas are written out below in float64, in its own
terms, from `GaussianDiffusionContinuousTimes`, `Imagen.p_sample` and `ElucidatedImagen.one_unet_sample`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imagen_fast.diffusion import (
    DynamicThreshold,
    Guidance,
    StepTable,
    cosine,
    cosine_start,
    karras_sigmas,
)
from imagen_fast.reference.sampler_step import sampler_step

SHAPE = (2, 3, 6, 6)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def thresholded(x_start: Tensor, percentile: float = 0.95) -> Tensor:
    """`threshold_x_start`: the dynamic threshold of both samplers, without a maximum."""
    s = torch.quantile(x_start.flatten(1).abs(), percentile, dim=-1).clamp(min=1.0).view(-1, 1, 1, 1)
    return x_start.clamp(-s, s) / s


# ---- Imagen: GaussianDiffusionContinuousTimes


def alpha_cosine_log_snr(t: float, s: float = 0.008) -> float:
    return -math.log(max(math.cos((t + s) / (1 + s) * math.pi * 0.5) ** -2 - 1, 1e-5))


def alpha_sigma(log_snr: float) -> tuple[float, float]:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    return math.sqrt(sigmoid(log_snr)), math.sqrt(sigmoid(-log_snr))


def p_sample(x: Tensor, pred: Tensor, t: float, t_next: float, objective: str, noise: Tensor) -> tuple[Tensor, Tensor]:
    log_snr, log_snr_next = alpha_cosine_log_snr(t), alpha_cosine_log_snr(t_next)
    alpha, sigma = alpha_sigma(log_snr)
    alpha_next, sigma_next = alpha_sigma(log_snr_next)
    if objective == "noise":
        x_start = (x - sigma * pred) / max(alpha, 1e-8)
    elif objective == "v":
        x_start = alpha * x - sigma * pred
    else:
        x_start = pred
    x_start = thresholded(x_start)
    c = -math.expm1(log_snr - log_snr_next)
    mean = alpha_next * (x * (1 - c) / alpha + c * x_start)
    log_variance = math.log(max(sigma_next**2 * c, 1e-20))
    return mean + (t_next != 0) * math.exp(0.5 * log_variance) * noise, x_start


@pytest.mark.parametrize(("objective", "prediction"), [("noise", "epsilon"), ("v", "v"), ("x_start", "x0")])
def test_continuous_time_ddpm(objective: str, prediction: str) -> None:
    steps = 12
    schedule = cosine(steps)
    table = StepTable.ddpm(schedule, steps=steps, prediction=prediction, final_alpha_cumprod=cosine_start())
    table = table.with_timesteps(schedule.logit().flip(0).tolist())
    x = randn(0)
    for index in range(steps):
        t, t_next = 1 - index / steps, max(1 - (index + 1) / steps, 0.0)
        t_next = 0.0 if index == steps - 1 else t_next
        if index:  # at t = 1 the signal is no more than the rounding of π/2
            assert table.timesteps[index] == pytest.approx(alpha_cosine_log_snr(t), rel=1e-9)
        pred, noise = randn(100 + index), randn(200 + index)
        expected, x_start = p_sample(x, pred, t, t_next, objective, noise)
        ours, x0 = sampler_step(x, pred, table, index, noise=noise, threshold=DynamicThreshold(0.95))
        tolerance = TIGHT if index else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(x0, x_start, **tolerance)
        torch.testing.assert_close(ours, expected, **tolerance)
        x = expected


# ---- ElucidatedImagen


def heun_with_churn(
    sigmas: list[float], sigma_data: float, churn: float, low: float, high: float, s_noise: float, net: Callable
) -> list[Tensor]:
    """`one_unet_sample`: the pictures after every step. `net(c_in x, c_noise)` is called as the U-Net is."""

    def denoised(x: Tensor, sigma: float) -> Tensor:
        total = sigma**2 + sigma_data**2
        out = net(x / math.sqrt(total), math.log(sigma) * 0.25)
        return thresholded(sigma_data**2 / total * x + sigma * sigma_data / math.sqrt(total) * out)

    images = sigmas[0] * randn(0)
    followed = []
    for index, (sigma, sigma_next) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        gamma = min(churn / len(sigmas), math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        eps = s_noise * randn(500 + index)
        sigma_hat = sigma + gamma * sigma
        images_hat = images + math.sqrt(sigma_hat**2 - sigma**2) * eps
        over_sigma = (images_hat - denoised(images_hat, sigma_hat)) / sigma_hat
        images = images_hat + (sigma_next - sigma_hat) * over_sigma
        if sigma_next != 0:
            prime = (images - denoised(images, sigma_next)) / sigma_next
            images = images_hat + 0.5 * (sigma_next - sigma_hat) * (over_sigma + prime)
        followed.append(images)
    return followed


@pytest.mark.parametrize("churn", [0.0, 8.0, 80.0])
def test_elucidated_sampler(churn: float) -> None:
    settings = {"churn": churn, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
    sigmas = karras_sigmas(8)

    def net(x: Tensor, c_noise: float) -> Tensor:
        return torch.sin(3 * x) + 0.1 * c_noise * x.flip(-1)  # any function of both

    theirs = heun_with_churn(sigmas.tolist(), 0.5, churn, 0.05, 50.0, 1.003, net)
    table = StepTable.edm(sigmas, sigma_data=0.5, **settings)
    assert len(table) == 15
    # The noise that churn adds to the first picture is part of its standard deviation: here it is added apart.
    first_added = math.sqrt(max(table.initial_sigma**2 - sigmas[0].item() ** 2, 0.0))
    x = sigmas[0].item() * randn(0) + first_added * randn(500)
    previous = x
    for index in range(len(table)):
        row = table.row(index)
        corrects = index % 2 == 1
        step = (index + 1) // 2
        noise = randn(500 + step) if corrects else None
        output = net(x * row["input_scale"], row["timestep"])
        x, x0 = sampler_step(
            x, output, table, index, previous_x0=previous, noise=noise, threshold=DynamicThreshold(0.95)
        )
        previous = previous if x0 is None else x0
        if corrects or index == len(table) - 1:
            expected = theirs[step - 1] if corrects else theirs[-1]
            without_the_next_churn = x - row["noise_scale"] * noise if corrects else x
            torch.testing.assert_close(without_the_next_churn, expected, **TIGHT)


# ---- Guidance


def test_guidance_without_the_parallel_component() -> None:
    """`forward_with_cond_scale` and `project`, its default in 2.1."""
    logits, null_logits = randn(1), randn(2)
    update = (logits - null_logits).flatten(1)
    unit = torch.nn.functional.normalize(logits.flatten(1), dim=-1)
    orthogonal = update - (update * unit).sum(-1, keepdim=True) * unit
    expected = logits + orthogonal.view(SHAPE) * (5.0 - 1)
    table = StepTable.ddim(cosine(4), steps=4, prediction="x0")
    _, x0 = sampler_step(
        randn(3), logits, table, 0, unconditional_output=null_logits, guidance=Guidance(5.0, remove_parallel=True)
    )
    torch.testing.assert_close(x0, expected, **TIGHT)
