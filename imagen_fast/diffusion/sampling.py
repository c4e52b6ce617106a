"""The loop that all samplers share: the model, then one step of the table, until the picture is clean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..reference.guidance import DynamicThreshold, Guidance
from ..reference.sampler_step import sampler_step
from .step_table import StepTable

# Called with the noisy pictures (B, C, H, W) and the timesteps (B,); returns the output with the text, and without.
Model = Callable[[Tensor, Tensor], tuple[Tensor, "Tensor | None"]]


class Noise:
    """Normal noise that depends on each sample's own seed, so that a picture is the same alone or in a batch.

    Args:
        seeds: one per sample, any Python integers.
        device, dtype: of the noise; it is drawn in fp32 on the CPU, so that every device sees the same.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self.device, self.dtype = torch.device(device), dtype

    def __call__(self, *shape: int) -> Tensor:
        """The next noise (samples, *shape)."""
        drawn = [torch.randn(shape, generator=generator) for generator in self.generators]
        noise = torch.stack(drawn) if drawn else torch.empty(0, *shape)
        return noise.to(self.device, self.dtype)


def sample_loop(
    model: Model,
    table: StepTable,
    noise: Noise,
    shape: tuple[int, int, int],
    *,
    guidance: float | Guidance = 1.0,
    threshold: str | DynamicThreshold | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Sample pictures from noise.

    Args:
        model: predicts from noisy pictures and timesteps, see `Model`.
        table: the solver.
        noise: where initial and added noise come from; its seeds say how many samples.
        shape: (C, H, W) of one sample.
        guidance, threshold: see `sampler_step`.
        on_step: called after each step, for a progress bar.

    Returns:
        (B, C, H, W), clean pictures in about [−1, 1], clipped to it if there is a threshold.
    """
    sample = noise(*shape) * table.initial_sigma
    adds_noise = table.uses("noise_scale")
    for index, timestep in enumerate(table.timesteps):
        timesteps = torch.full((sample.shape[0],), timestep, dtype=torch.long, device=sample.device)
        output, unconditional = model(sample, timesteps)
        sample, _ = sampler_step(
            sample,
            output.to(sample.dtype),
            table,
            index,
            unconditional_output=None if unconditional is None else unconditional.to(sample.dtype),
            guidance=guidance,
            threshold=threshold,
            noise=noise(*shape) if adds_noise else None,
        )
        if on_step is not None:
            on_step()
    return sample.clamp(-1, 1) if threshold is not None else sample
