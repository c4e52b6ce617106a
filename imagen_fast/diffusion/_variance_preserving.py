"""Rows of the solvers whose sample is √ᾱ x0 + √(1 − ᾱ) ε: DDPM, DDIM, DPM-Solver++."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .coefficients import Row, empty_row, epsilon_coefficients, log, x0_coefficients
from .schedules import (
    check_alphas_cumprod,
    check_count,
    check_offset,
    given_timesteps,
    karras_sigmas,
    relative_sigmas,
    spaced_timesteps,
)

_SMALLEST_VARIANCE = 1e-20  # diffusers clamps here before taking the logarithm
FEW_STEPS = 15  # below which diffusers' multistep solvers end in order 1


class Levels(NamedTuple):
    """The visited timesteps, ᾱ at each, and ᾱ where each step ends.

    Of a float32 schedule, as diffusers has them, quotients of ᾱ are rounded to float32, as diffusers does: 1 - quotient
    is small, and where it is smallest the rounding shows in the fourth digit of a step.
    """

    timesteps: Sequence[int]
    alphas: Sequence[float]
    alphas_next: Sequence[float]
    single: bool = False

    def step_alphas(self) -> list[float]:
        """The quotient of ᾱ at each timestep and where its step ends: α of the step."""
        quotients = (alpha / alpha_next for alpha, alpha_next in zip(self.alphas, self.alphas_next, strict=True))
        return [float(np.float32(quotient)) if self.single else quotient for quotient in quotients]

    def rows(self, prediction: str) -> list[Row]:
        """A row for each, of which only x0 has coefficients."""
        rows = []
        for timestep, alpha in zip(self.timesteps, self.alphas, strict=True):
            row = empty_row(timestep, math.sqrt((1 - alpha) / alpha) if alpha else math.inf)
            row["x0_from_sample"], row["x0_from_output"] = x0_coefficients(prediction, alpha**0.5, (1 - alpha) ** 0.5)
            rows.append(row)
        return rows


def visited(
    alphas_cumprod: Tensor,
    steps: int | str | Sequence[int],
    spacing: str,
    offset: int,
    final: float,
    strided: bool = False,
) -> Levels:
    """The levels of a solver. A step goes to the next visited timestep or, strided, n // steps timesteps down."""
    check_alphas_cumprod(alphas_cumprod)
    if not 0 < final <= 1:
        raise ValueError(f"final_alpha_cumprod must be above 0 and at most 1, got {final}")
    timesteps = spaced_timesteps(len(alphas_cumprod), steps, spacing, offset)
    values = alphas_cumprod.double().tolist()
    ends = [*timesteps[1:], -1]
    if strided and isinstance(steps, int | np.integer):
        ends = [t - len(values) // int(steps) for t in timesteps]
    alphas_next = [values[t] if t >= 0 else float(final) for t in ends]
    if not all(alphas_next):
        raise ValueError("alphas_cumprod must be above 0 but at the first timestep: no step ends in pure noise")
    return Levels(timesteps, [values[t] for t in timesteps], alphas_next, alphas_cumprod.dtype == torch.float32)


def ddpm(levels: Levels, prediction: str, variance: str) -> list[Row]:
    """See `StepTable.ddpm`."""
    if variance not in ("fixed_small", "fixed_large", "learned_range"):
        raise ValueError(f"variance must be 'fixed_small', 'fixed_large' or 'learned_range', got {variance!r}")
    rows = levels.rows(prediction)
    for row, timestep, alpha, alpha_next, step_alpha in zip(rows, *levels[:3], levels.step_alphas(), strict=True):
        step_beta = 1 - step_alpha
        small = max((1 - alpha_next) / (1 - alpha) * step_beta, _SMALLEST_VARIANCE)
        large = max(step_beta, _SMALLEST_VARIANCE)
        row["next_from_sample"] = step_alpha**0.5 * (1 - alpha_next) / (1 - alpha)
        row["next_from_x0"] = alpha_next**0.5 * step_beta / (1 - alpha)
        row["min_log_variance"], row["max_log_variance"] = log(small), log(large)
        if timestep > 0:
            row["noise_scale"] = {"fixed_small": small, "fixed_large": large, "learned_range": 1.0}[variance] ** 0.5
    return rows


def ddim(levels: Levels, prediction: str, eta: float, clipped_epsilon: bool) -> list[Row]:
    """See `StepTable.ddim`."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    rows = levels.rows(prediction)
    for row, alpha, alpha_next, step_alpha in zip(rows, *levels[1:3], levels.step_alphas(), strict=True):
        sigma = eta * max((1 - alpha_next) / (1 - alpha) * (1 - step_alpha), 0.0) ** 0.5
        direction = max(1 - alpha_next - sigma**2, 0.0) ** 0.5
        row["next_from_x0"], row["noise_scale"] = alpha_next**0.5, sigma
        if clipped_epsilon:  # of the thresholded x0, as if that were the output
            from_sample, from_x0 = epsilon_coefficients("x0", alpha**0.5, (1 - alpha) ** 0.5)
            row["next_from_sample"] = direction * from_sample
            row["next_from_x0"] += direction * from_x0
        else:
            from_sample, from_output = epsilon_coefficients(prediction, alpha**0.5, (1 - alpha) ** 0.5)
            row["next_from_sample"], row["next_from_output"] = direction * from_sample, direction * from_output
    return rows


def dpm_solver_pp(
    alphas_cumprod: Tensor,
    steps: int | str | Sequence[int],
    prediction: str,
    *,
    order: int,
    sde: bool,
    spacing: str,
    offset: int,
    solver_type: str,
    karras: bool,
    rounding: str,
    lower_order_final: bool,
    euler_at_final: bool,
    final_sigma: str,
) -> list[Row]:
    """See `StepTable.dpm_solver_pp`."""
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    if final_sigma not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigma must be 'zero' or 'sigma_min', got {final_sigma!r}")
    if rounding not in ("nearest", "down"):
        raise ValueError(f"rounding must be 'nearest' or 'down', got {rounding!r}")
    every = relative_sigmas(alphas_cumprod)
    if karras:
        count = len(spaced_timesteps(len(every), steps, spacing))
        sigmas = karras_sigmas(count, float(every[0]), float(every[-1])).numpy()
        # diffusers looks levels up among logarithms in its schedule's float32, which decides what is rounded down.
        logs = np.log(every.astype(np.float32) if alphas_cumprod.dtype == torch.float32 else every)
        found = np.interp(np.log(sigmas), logs, np.arange(len(every)))
        timesteps = [round(t) if rounding == "nearest" else int(t) for t in found]
    else:
        timesteps = multistep_timesteps(len(every), steps, spacing, offset)
        sigmas = np.interp(timesteps, np.arange(len(every)), every)
    end = 0.0 if final_sigma == "zero" else float(every[0])
    few = lower_order_final and len(timesteps) < FEW_STEPS
    ends_low = few or euler_at_final or final_sigma == "zero"
    levels = [*sigmas.tolist(), end]
    return multistep(timesteps, levels, prediction, order=order, sde=sde, solver_type=solver_type, ends_low=ends_low)


def multistep(
    timesteps: Sequence[float],
    sigmas: Sequence[float],
    prediction: str,
    *,
    order: int,
    sde: bool,
    solver_type: str,
    ends_low: bool,
) -> list[Row]:
    """Rows of DPM-Solver++ for noise levels σ / α, one more than timesteps: that where the last step ends.

    With λ = ln(α / σ), h = λ_next − λ and D1 = (x0 − x0') h / (λ − λ'):

        next = σ_next / σ x − α_next (e^−h − 1) (x0 + ½ D1)                                  midpoint
        next = σ_next / σ e^−h x + α_next (1 − e^−2h) (x0 + ½ D1) + σ_next √(1 − e^−2h) ε    stochastic

    D1 is left out in order 1, in the first step, where h is 0 (and with it all that D1 adds) and, where it `ends_low`,
    in the last.
    """
    rows: list[Row] = []
    previous_log_snr = None
    for i, (timestep, (ratio, ratio_next)) in enumerate(zip(timesteps, itertools.pairwise(sigmas), strict=True)):
        alpha, alpha_next = (ratio**2 + 1) ** -0.5, (ratio_next**2 + 1) ** -0.5
        sigma, sigma_next = ratio * alpha, ratio_next * alpha_next
        log_snr, log_snr_next = -log(ratio), -log(ratio_next)
        h = log_snr_next - log_snr
        row = empty_row(timestep, ratio)
        row["x0_from_sample"], row["x0_from_output"] = x0_coefficients(prediction, alpha, sigma)
        exponent = 2 * h if sde else h
        gain = -math.expm1(-exponent)  # 1 - e^-h, or 1 - e^-2h
        from_x0 = alpha_next * gain
        row["next_from_sample"] = sigma_next / sigma * (math.exp(-h) if sde else 1.0)
        row["next_from_x0"] = from_x0
        if sde:
            row["noise_scale"] = sigma_next * max(gain, 0.0) ** 0.5  # rounding can let the noise rise by an ulp
        last = i == len(timesteps) - 1
        if order == 2 and previous_log_snr is not None and h != 0 and not (last and ends_low):
            correction = 0.5 * from_x0 if solver_type == "midpoint" else alpha_next * (1 - gain / exponent)
            correction *= h / (log_snr - previous_log_snr)
            row["next_from_x0"] += correction
            row["next_from_previous_x0"] = -correction
        previous_log_snr = log_snr
        rows.append(row)
    return rows


def multistep_timesteps(n: int, steps: int | str | Sequence[int], spacing: str, offset: int) -> list[int]:
    """Those of diffusers' multistep solvers: but for "trailing" they leave timestep 0 to the last step's end."""
    if isinstance(steps, str) or given_timesteps(steps) is not None:
        return spaced_timesteps(n, steps)
    if spacing == "trailing":
        return spaced_timesteps(n, steps, spacing)
    steps = check_count(n - 1, steps)
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, n - 1, steps + 1).round()[::-1][:-1]]
    if spacing == "leading":
        check_offset(n, steps * (n // (steps + 1)), offset)
        return [i * (n // (steps + 1)) + offset for i in range(steps, 0, -1)]
    raise ValueError(f"spacing must be 'leading', 'trailing' or 'linspace', got {spacing!r}")
