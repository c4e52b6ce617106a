"""Noise schedules, guidance and thresholding, and the solvers as tables of coefficients."""

from ..reference.guidance import DynamicThreshold, Guidance
from .sampling import Noise, sample_loop
from .schedules import linear_betas, spaced_timesteps, squaredcos_cap_v2
from .step_table import StepTable

__all__ = [
    "DynamicThreshold",
    "Guidance",
    "Noise",
    "StepTable",
    "linear_betas",
    "sample_loop",
    "spaced_timesteps",
    "squaredcos_cap_v2",
]
