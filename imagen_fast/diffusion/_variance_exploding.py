"""Rows of the solvers whose sample is x0 + σ ε: Euler, Heun, EDM."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .coefficients import Row, empty_row
from .schedules import (
    check_count,
    check_offset,
    given_timesteps,
    karras_sigmas,
    relative_sigmas,
    spaced_timesteps,
    trailing_timesteps,
)


class Levels(NamedTuple):
    """The visited timesteps, which may lie between those of training; σ at each and, one more, where the last ends."""

    timesteps: Sequence[float]
    sigmas: Sequence[float]
    initial_sigma: float


def levels(
    alphas_cumprod: Tensor,
    steps: int | str | Sequence[float],
    spacing: str,
    offset: int,
    karras: bool,
    final_sigma: str,
) -> Levels:
    """The levels that diffusers' solvers in σ visit."""
    if final_sigma not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigma must be 'zero' or 'sigma_min', got {final_sigma!r}")
    every = relative_sigmas(alphas_cumprod)
    timesteps = _timesteps(len(every), steps, spacing, offset)
    sigmas = np.interp(timesteps, np.arange(len(every)), every)
    if karras:
        sigmas = karras_sigmas(len(sigmas), float(sigmas[-1]), float(sigmas[0])).numpy()
        timesteps = np.interp(np.log(sigmas), np.log(every), np.arange(len(every)))
    largest = float(sigmas.max())
    initial = largest if spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5
    end = 0.0 if final_sigma == "zero" else float(every[0])
    return Levels(timesteps.tolist(), [*sigmas.tolist(), end], initial)


def _timesteps(n: int, steps: int | str | Sequence[float], spacing: str, offset: int) -> np.ndarray:
    if isinstance(steps, str):
        return np.asarray(spaced_timesteps(n, steps), dtype=np.float64)
    listed = given_timesteps(steps)
    if listed is not None:
        given = np.asarray(listed, dtype=np.float64)
        falling = given.ndim == 1 and len(given) > 0 and (np.diff(given) < 0).all()
        if not falling or not 0 <= given[-1] <= given[0] <= n - 1:
            raise ValueError(f"steps must fall strictly and lie in [0, {n - 1}], got {listed}")
        return given
    steps = check_count(n, steps)
    if spacing == "linspace":
        return np.linspace(0, n - 1, steps)[::-1].copy()
    if spacing == "leading":
        check_offset(n, (steps - 1) * (n // steps), offset)
        return np.arange(steps)[::-1] * float(n // steps) + offset
    if spacing == "trailing":
        return trailing_timesteps(n, steps)
    raise ValueError(f"spacing must be 'leading', 'trailing' or 'linspace', got {spacing!r}")


def _x0_coefficients(prediction: str, sigma: float) -> tuple[float, float]:
    if prediction == "epsilon":
        return 1.0, -sigma
    if prediction == "v":
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    if prediction == "x0":
        return 0.0, 1.0
    raise ValueError(f"prediction must be 'epsilon', 'v' or 'x0', got {prediction!r}")


def _gamma(churn: float, intervals: int, sigma: float, low: float, high: float) -> float:
    return min(churn / intervals, 2**0.5 - 1) if low <= sigma <= high else 0.0


def check_churn(churn: float, noise: float) -> None:
    """Raise ValueError unless they are S_churn and S_noise of a solver."""
    if not 0 <= churn < math.inf or not 0 <= noise < math.inf:
        raise ValueError(f"churn and churn_noise must be finite and not negative, got {churn} and {noise}")


def euler(visited: Levels, prediction: str, churn: float, low: float, high: float, noise: float) -> list[Row]:
    """See `StepTable.euler`. With k ε the noise of churn, x̂ = x + k ε and r = (σ_next − σ̂) / σ̂:

    next = x̂ + r (x̂ − x0)
    """
    check_churn(churn, noise)
    rows = []
    for i, timestep in enumerate(visited.timesteps):
        sigma, sigma_next = visited.sigmas[i], visited.sigmas[i + 1]
        churned = sigma * (1 + _gamma(churn, len(visited.sigmas) - 1, sigma, low, high))
        added = noise * max(churned**2 - sigma**2, 0.0) ** 0.5
        # diffusers takes x0 from ε at the churned level, and from v at the one before.
        from_sample, from_output = _x0_coefficients(prediction, churned if prediction == "epsilon" else sigma)
        ratio = (sigma_next - churned) / churned
        row = empty_row(timestep, sigma, (sigma**2 + 1) ** -0.5)
        row["x0_from_sample"], row["x0_from_output"], row["x0_from_noise"] = (
            from_sample,
            from_output,
            from_sample * added,
        )
        row["next_from_sample"], row["next_from_x0"], row["noise_scale"] = 1 + ratio, -ratio, (1 + ratio) * added
        rows.append(row)
    return rows


def heun(visited: Levels, prediction: str) -> list[Row]:
    """See `StepTable.heun`."""
    rows = []
    for i, timestep in enumerate(visited.timesteps):
        sigma, sigma_next = visited.sigmas[i], visited.sigmas[i + 1]
        row = empty_row(timestep, sigma, (sigma**2 + 1) ** -0.5)
        row["x0_from_sample"], row["x0_from_output"] = _x0_coefficients(prediction, sigma)
        row.update(_euler_step(sigma, sigma_next))
        rows.append(row)
        if sigma_next > 0:
            row = empty_row(visited.timesteps[i + 1], sigma_next, (sigma_next**2 + 1) ** -0.5)
            row["x0_from_sample"], row["x0_from_output"] = _x0_coefficients(prediction, sigma_next)
            row.update(_correction(sigma, sigma_next))
            rows.append(row)
    return rows


def _euler_step(sigma: float, sigma_next: float) -> Row:
    ratio = (sigma_next - sigma) / sigma
    return {"next_from_sample": 1 + ratio, "next_from_x0": -ratio}


def _correction(sigma: float, sigma_next: float) -> Row:
    """From the Euler iterate y, which went down the slope (x − x0') / σ, to where the mean of it and the slope there,
    (y − x0) / σ_next, leads. x, x0' and y lie on a line, so the first slope is (y − x0') / σ_next too, and

        next = y + ½ (σ_next − σ) / σ_next (x0' − x0)
    """
    half = 0.5 * (sigma_next - sigma) / sigma_next
    return {"next_from_sample": 1.0, "next_from_x0": -half, "next_from_previous_x0": half}


def edm(
    sigmas: Tensor, sigma_data: float, churn: float, low: float, high: float, noise: float
) -> tuple[list[Row], float]:
    """See `StepTable.edm`; the rows and the standard deviation of the first sample."""
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas must be a tensor, got {type(sigmas).__name__}")
    levels = [float(sigma) for sigma in sigmas.tolist()] if sigmas.dim() == 1 else []
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not falling or not 0 < levels[-1] <= levels[0] < math.inf:
        raise ValueError(f"sigmas must be positive and finite and fall strictly, got {sigmas.tolist()}")
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}")
    check_churn(churn, noise)
    churned = [sigma * (1 + _gamma(churn, len(levels), sigma, low, high)) for sigma in levels]
    added = [noise * max(b**2 - a**2, 0.0) ** 0.5 for a, b in zip(levels, churned, strict=True)]
    rows = []
    for i, sigma in enumerate(churned):
        sigma_next = levels[i + 1] if i + 1 < len(levels) else 0.0
        row = _preconditioned(sigma, sigma_data)
        row.update(_euler_step(sigma, sigma_next))
        rows.append(row)
        if sigma_next > 0:
            row = _preconditioned(sigma_next, sigma_data)
            row.update(_correction(sigma, sigma_next))
            row["noise_scale"] = added[i + 1]
            rows.append(row)
    return rows, math.hypot(levels[0], added[0])


def _preconditioned(sigma: float, sigma_data: float) -> Row:
    """x0 = c_skip x + c_out F(c_in x, c_noise)"""
    total = sigma**2 + sigma_data**2
    row = empty_row(0.25 * math.log(sigma), sigma, total**-0.5)
    row["x0_from_sample"] = sigma_data**2 / total
    row["x0_from_output"] = sigma * sigma_data * total**-0.5
    return row
