"""Noise schedules, guidance and thresholding, and the solvers as tables of coefficients."""

from ..reference.guidance import DynamicThreshold, Guidance
from .if_timesteps import IF_TIMESTEPS
from .noise import Noise
from .sampling import sample_loop
from .schedules import (
    cosine,
    cosine_start,
    karras_sigmas,
    linear_betas,
    shift_log_snr,
    spaced_timesteps,
    squaredcos_cap_v2,
)
from .step_table import StepTable

__all__ = [
    "IF_TIMESTEPS",
    "DynamicThreshold",
    "Guidance",
    "Noise",
    "StepTable",
    "cosine",
    "cosine_start",
    "karras_sigmas",
    "linear_betas",
    "sample_loop",
    "shift_log_snr",
    "spaced_timesteps",
    "squaredcos_cap_v2",
]
