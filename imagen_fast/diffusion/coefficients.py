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
)

Row = dict[str, float]


def empty_row(timestep: float, input_scale: float = 1.0) -> Row:
    """A row of zeros for the model's evaluation at `timestep`."""
    return {**dict.fromkeys(COLUMNS, 0.0), "timestep": float(timestep), "input_scale": float(input_scale)}


def x0_coefficients(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """x0 from the sample and from the output, for a sample alpha · x0 + sigma · ε of a variance-preserving process."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    if prediction == "x0":
        return 0.0, 1.0
    raise ValueError(f"prediction must be 'epsilon', 'v' or 'x0', got {prediction!r}")


def log(value: float) -> float:
    """ln, and -inf of 0."""
    return math.log(value) if value > 0 else -math.inf
