"""A solver as a table: one row of coefficients per evaluation of the model.

With x the sample, o the guided output, and ε noise, every step of every solver here is

    x0   = threshold(x0_from_sample · x + x0_from_output · o)
    next = next_from_sample · x + next_from_output · o + next_from_x0 · x0 + noise_scale · ε

where a learned variance multiplies ε by exp(½ · logvar), logvar interpolated between min_log_variance and
max_log_variance by the output's variance channels (improved DDPM, arXiv 2102.09672, equation 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .schedules import spaced_timesteps

Prediction = Literal["epsilon", "v", "x0"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

COLUMNS = (
    "x0_from_sample",
    "x0_from_output",
    "next_from_sample",
    "next_from_output",
    "next_from_x0",
    "noise_scale",
    "min_log_variance",
    "max_log_variance",
)

_SMALLEST_VARIANCE = 1e-20  # diffusers clamps here before taking the logarithm


@dataclass(frozen=True)
class StepTable:
    """Coefficients of a solver.

    Attributes:
        rows: (steps, len(COLUMNS)) float64, in the order of `COLUMNS`.
        timesteps: the model's timestep of every row, noisiest first.
        learned_variance: whether the output carries variance channels that are used.
        initial_sigma: the standard deviation of the first sample.
    """

    rows: Tensor
    timesteps: tuple[int, ...]
    learned_variance: bool = False
    initial_sigma: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    def row(self, index: int) -> dict[str, float]:
        """Row `index` by column name. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be between 0 and {len(self) - 1}, got {index}")
        return dict(zip(COLUMNS, self.rows[index].tolist(), strict=True))

    def uses(self, column: str) -> bool:
        """Whether any row has a coefficient other than zero in this column."""
        return bool(self.rows[:, COLUMNS.index(column)].ne(0).any())

    @classmethod
    def ddpm(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | Sequence[int],
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        spacing: str = "leading",
    ) -> StepTable:
        """Ancestral sampling (DDPM, arXiv 2006.11239, equation 7); no noise in the last step.

        Args:
            alphas_cumprod: (n,), from a schedule.
            steps: how many of the n timesteps to visit, or the timesteps themselves, noisiest first.
            prediction: what the model's output is.
            variance: "fixed_small" (the posterior's), "fixed_large" (β) or "learned_range" (between the two).
            spacing: see `spaced_timesteps`.

        Raises:
            ValueError: an unknown prediction, variance or spacing, or steps out of range.

        Example:
            >>> len(StepTable.ddpm(squaredcos_cap_v2(1000), steps=50, prediction="v"))
            50
        """
        if variance not in ("fixed_small", "fixed_large", "learned_range"):
            raise ValueError(f"variance must be 'fixed_small', 'fixed_large' or 'learned_range', got {variance!r}")
        timesteps, alphas, alphas_next = _visited(alphas_cumprod, steps, spacing)
        rows = []
        for alpha, alpha_next in zip(alphas, alphas_next, strict=True):
            x0_from_sample, x0_from_output = _x0_coefficients(prediction, alpha)
            step_alpha = alpha / alpha_next
            step_beta = 1 - step_alpha
            small = max((1 - alpha_next) / (1 - alpha) * step_beta, _SMALLEST_VARIANCE)
            large = max(step_beta, _SMALLEST_VARIANCE)
            std = {"fixed_small": small, "fixed_large": large, "learned_range": 1.0}[variance] ** 0.5
            row = dict.fromkeys(COLUMNS, 0.0)
            row.update(
                x0_from_sample=x0_from_sample,
                x0_from_output=x0_from_output,
                next_from_sample=step_alpha**0.5 * (1 - alpha_next) / (1 - alpha),
                next_from_x0=alpha_next**0.5 * step_beta / (1 - alpha),
                noise_scale=std,
                min_log_variance=_log(small),
                max_log_variance=_log(large),
            )
            rows.append(row)
        rows[-1]["noise_scale"] = 0.0
        return cls(_stack(rows), timesteps, learned_variance=variance == "learned_range")

    @classmethod
    def ddim(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | Sequence[int],
        prediction: Prediction = "epsilon",
        eta: float = 0.0,
        spacing: str = "leading",
        clipped_epsilon: bool = False,
    ) -> StepTable:
        """Implicit sampling (DDIM, arXiv 2010.02502, equation 12); deterministic for eta 0.

        Args:
            alphas_cumprod, steps, prediction, spacing: as for `ddpm`.
            eta: 0 for the deterministic sampler, 1 for the noise of DDPM.
            clipped_epsilon: take the noise from the thresholded x0 (Imagen) instead of the raw output (diffusers).

        Raises:
            ValueError: as for `ddpm`, or eta outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {eta}")
        timesteps, alphas, alphas_next = _visited(alphas_cumprod, steps, spacing)
        rows = []
        for alpha, alpha_next in zip(alphas, alphas_next, strict=True):
            x0_from_sample, x0_from_output = _x0_coefficients(prediction, alpha)
            sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
            direction = max(1 - alpha_next - sigma**2, 0.0) ** 0.5
            # ε = (x − √ᾱ x0) / √(1 − ᾱ), with x0 as predicted or as thresholded.
            from_sample, from_x0 = 1 / (1 - alpha) ** 0.5, -((alpha / (1 - alpha)) ** 0.5)
            row = dict.fromkeys(COLUMNS, 0.0)
            row.update(x0_from_sample=x0_from_sample, x0_from_output=x0_from_output)
            row.update(next_from_x0=alpha_next**0.5, noise_scale=sigma)
            if clipped_epsilon:
                row["next_from_sample"] = direction * from_sample
                row["next_from_x0"] += direction * from_x0
            else:
                row["next_from_sample"] = direction * (from_sample + from_x0 * x0_from_sample)
                row["next_from_output"] = direction * from_x0 * x0_from_output
            rows.append(row)
        return cls(_stack(rows), timesteps)


def _visited(
    alphas_cumprod: Tensor, steps: int | Sequence[int], spacing: str
) -> tuple[tuple[int, ...], list[float], list[float]]:
    """The visited timesteps, ᾱ at each, and ᾱ where each step ends (1 after the last)."""
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 1:
        raise ValueError(f"alphas_cumprod must be (n,), got {tuple(alphas_cumprod.shape)}")
    timesteps = spaced_timesteps(len(alphas_cumprod), steps, spacing)
    values = alphas_cumprod.double().tolist()
    alphas = [values[t] for t in timesteps]
    return tuple(timesteps), alphas, [*alphas[1:], 1.0]


def _x0_coefficients(prediction: str, alpha: float) -> tuple[float, float]:
    """x0 from the sample and from the output."""
    if prediction == "epsilon":
        return alpha**-0.5, -(((1 - alpha) / alpha) ** 0.5)
    if prediction == "v":
        return alpha**0.5, -((1 - alpha) ** 0.5)
    if prediction == "x0":
        return 0.0, 1.0
    raise ValueError(f"prediction must be 'epsilon', 'v' or 'x0', got {prediction!r}")


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


def _stack(rows: list[dict[str, float]]) -> Tensor:
    return torch.tensor([[row[column] for column in COLUMNS] for row in rows], dtype=torch.float64)
