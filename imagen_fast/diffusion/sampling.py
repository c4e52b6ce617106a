"""The loop that all samplers share: the model, then one step of the table, until the picture is clean."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference.guidance import DynamicThreshold, Guidance
from .noise import Noise
from .step_table import StepTable

# Called with the noisy pictures (B, C, H, W), scaled as the table says, the timesteps (B,), and whether to guide;
# returns the output with the text, and the one without it or None.
Model = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | None"]]


def sample_loop(
    model: Model,
    table: StepTable,
    noise: Noise,
    shape: tuple[int, int, int],
    *,
    guidance: float | Guidance = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    threshold: str | DynamicThreshold | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Sample pictures from noise.

    Nothing is read back from the device: on one that works asynchronously the loop runs ahead of it.

    Args:
        model: predicts from noisy pictures and timesteps, see `Model`.
        table: the solver.
        noise: where initial and added noise come from; its seeds say how many samples.
        shape: (C, H, W) of one sample.
        guidance, threshold: see `ops.sampler_step`.
        guidance_interval: the lowest and highest noise level σ, noise over signal, at which to guide; None for all. In
            steps outside of it the model is evaluated with the text alone (Kynkäänniemi et al., "Applying Guidance in a
            Limited Interval Improves Sample and Distribution Quality in Diffusion Models", 2024).
        on_step: called once for every step that the device has finished, for a progress bar.

    Returns:
        (B, C, H, W), clean pictures in about [−1, 1], clipped to it if there is a threshold.
    """
    sample = noise(*shape) * table.initial_sigma
    previous_x0 = sample  # which no first row reads
    draws = table.uses("noise_scale") or table.uses("x0_from_noise")
    whole = all(isinstance(timestep, int) for timestep in table.timesteps)
    progress = _Progress(on_step, sample.device)
    for index, timestep in enumerate(table.timesteps):
        row = table.row(index)
        guided = guidance_interval is None or guidance_interval[0] <= row["sigma"] <= guidance_interval[1]
        told = torch.full((len(sample),), timestep, dtype=torch.long if whole else torch.float32, device=sample.device)
        scaled = sample if row["input_scale"] == 1 else sample * row["input_scale"]
        output, unconditional = model(scaled, told, guided)
        sample, x0 = ops.sampler_step(
            sample,
            output.to(sample.dtype),
            table,
            index,
            unconditional_output=None if unconditional is None else unconditional.to(sample.dtype),
            guidance=guidance,
            threshold=threshold,
            previous_x0=previous_x0,
            seed=noise.seeds if draws else None,
        )
        previous_x0 = previous_x0 if x0 is None else x0
        progress.queued()
    progress.finish()
    return sample.clamp(-1, 1) if threshold is not None else sample


class _Progress:
    """Calls `on_step` for the steps that a device has finished, which may be later than they were queued."""

    def __init__(self, on_step: Callable[[], object] | None, device: torch.device) -> None:
        self.on_step, self.device = on_step, device
        self.running: deque[Any] = deque()

    def queued(self) -> None:
        """Another step is in the device's queue."""
        if self.on_step is None:
            return
        if self.device.type == "cpu":
            self.on_step()
            return
        event = torch.Event(self.device)
        event.record()
        self.running.append(event)
        while self.running and self.running[0].query():
            self._report()

    def finish(self) -> None:
        """Wait for the steps that are still running, and report each as it ends."""
        while self.running:
            self.running[0].synchronize()
            self._report()

    def _report(self) -> None:
        self.running.popleft()
        assert self.on_step is not None
        self.on_step()
