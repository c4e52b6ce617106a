"""The columns of a step table, and what the builders of its rows share."""

from __future__ import annotations

import math
from typing import Literal

Prediction = Literal["epsilon", "v", "x0"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

COLUMNS = (
    "x0_from_sample",
    "x0_from_output",
    "x0_from_noise",
    "next_from_sample",
    "next_from_output",
    "next_from_x0",
    "next_from_previous_x0",
    "noise_scale",
    "min_log_variance",
    "max_log_variance",
    "timestep",
    "input_scale",
    "sigma",
)

Row = dict[str, float]


def empty_row(timestep: float, sigma: float, input_scale: float = 1.0) -> Row:
    """A row of zeros for the model's evaluation at `timestep`, where the noise is `sigma` times the signal."""
    loop = {"timestep": float(timestep), "input_scale": float(input_scale), "sigma": float(sigma)}
    return {**dict.fromkeys(COLUMNS, 0.0), **loop}


def x0_coefficients(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """x0 from the sample and from the output, for a sample alpha · x0 + sigma · ε of a variance-preserving process."""
    if prediction == "epsilon":
        if alpha == 0:
            raise ValueError("a model that predicts epsilon cannot start from pure noise: alphas_cumprod is 0 there")
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    if prediction == "x0":
        return 0.0, 1.0
    raise ValueError(f"prediction must be 'epsilon', 'v' or 'x0', got {prediction!r}")


def epsilon_coefficients(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """The noise ε from the sample and from the output, as `x0_coefficients`."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def log(value: float) -> float:
    """ln, and -inf of 0."""
    return math.log(value) if value > 0 else -math.inf
