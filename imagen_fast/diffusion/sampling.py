"""The loop that all samplers share: the model, then one step of the table, until the picture is clean."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from ..reference.guidance import DynamicThreshold, Guidance
from .noise import Noise
from .step_table import StepTable

# Called with the noisy pictures (B, C, H, W), scaled as the table says, the timesteps (B,), and whether to guide;
# returns the output with the text, and the one without it or None.
Model = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | None"]]


class State(NamedTuple):
    """What one step hands to the next. All of it is on the device, so that steps follow each other there."""

    sample: Tensor  # (B, C, H, W)
    previous_x0: Tensor  # like sample
    row: Tensor  # 0-d int64, of the table, the one that comes next


# From a model's own tensors, the noisy pictures and the timesteps to the output with the text, and the one without.
Evaluation = Callable[[dict[str, Any], Tensor, Tensor], tuple[Tensor, "Tensor | None"]]


@dataclass(frozen=True)
class Step:
    """One step of a loop, as a function of tensors alone, which counts its rows itself: `state = step(state, inputs)`.

    The same function serves every step, so one recording of it serves the whole loop.

    Attributes:
        evaluation: the model; two that compute the same are equal.
        table, guidance, threshold: as of `sample_loop`.
    """

    evaluation: Evaluation
    table: StepTable
    guidance: float | Guidance
    threshold: str | DynamicThreshold | None

    @property
    def kind(self) -> Hashable:
        """What tells it from other steps, besides its inputs."""
        return self.evaluation, self.table.content, self.guidance, self.threshold

    def __call__(self, state: State, inputs: dict[str, Any]) -> State:
        """
        Args:
            state: before the step.
            inputs: "seeds" (B,) or None, and the model's own tensors under "model".
        """
        sample, previous_x0, row = state
        device = sample.device
        told = self.table.told(device).gather(0, row.expand(len(sample)))
        scales = self.table.input_scales(device, sample.dtype)
        scaled = sample if scales is None else sample * scales.gather(0, row.view(1))
        output, unconditional = self.evaluation(inputs["model"], scaled, told)
        following, x0 = ops.sampler_step(
            sample,
            output.to(sample.dtype),
            self.table,
            row,
            unconditional_output=None if unconditional is None else unconditional.to(sample.dtype),
            guidance=self.guidance,
            threshold=self.threshold,
            previous_x0=previous_x0,
            seed=inputs["seeds"],
        )
        return State(following, previous_x0 if x0 is None else x0, row + 1)


class Repeat(Protocol):
    """Takes a step again and again without the host, as CUDA graphs can."""

    def __call__(
        self, step: Step, state: State, inputs: dict[str, Any], times: int, after: Callable[[], object] | None
    ) -> State | None:
        """The state after `times` steps, or None where they cannot be repeated this way, and none was taken.

        Args:
            step, state, inputs: see `Step`.
            times: 1 or more.
            after: called after every step.
        """


class Repeatable(Protocol):
    """What a `Model` has besides, if a device may repeat its steps.

    Attributes:
        repeat: what repeats them, or None.
    """

    repeat: Repeat | None

    def parts(self, guided: bool) -> tuple[Evaluation, dict[str, Any]]:
        """The model as a function of tensors, and these tensors."""


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

    Nothing is read back from the device: on one that works asynchronously the loop runs ahead of it, and where the
    model can be repeated (`Repeatable`) the device takes its steps by itself.

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
    low, high = (0.0, float("inf")) if guidance_interval is None else guidance_interval
    sample = noise(*shape) * table.initial_sigma
    loop = _Loop(model, table, guidance, threshold, _seeds(noise, table), _Progress(on_step, sample.device))
    previous_x0 = sample  # which no first row reads
    for guided, rows in groupby(range(len(table)), lambda index: low <= table.row(index)["sigma"] <= high):
        sample, previous_x0 = loop.run(list(rows), guided, sample, previous_x0)
    loop.progress.finish()
    return sample.clamp(-1, 1) if threshold is not None else sample


def _seeds(noise: Noise, table: StepTable) -> Tensor | None:
    return noise.seeds if table.uses("noise_scale") or table.uses("x0_from_noise") else None


@dataclass
class _Loop:
    model: Any
    table: StepTable
    guidance: float | Guidance
    threshold: str | DynamicThreshold | None
    seeds: Tensor | None
    progress: _Progress

    def run(self, rows: list[int], guided: bool, sample: Tensor, previous_x0: Tensor) -> tuple[Tensor, Tensor]:
        """The sample and x0 after rows that follow each other, all of them guided or none."""
        repeat: Repeat | None = getattr(self.model, "repeat", None)
        if repeat is not None:
            evaluation, tensors = self.model.parts(guided)
            step = Step(evaluation, self.table, self.guidance, self.threshold)
            row = self.table.index(rows[0], sample.device).clone()  # as the steps' own, in inference mode or not
            state = State(sample, previous_x0, row)
            inputs = {"seeds": self.seeds, "model": tensors}
            after = self.progress.queued if self.progress.on_step is not None else None
            end = repeat(step, state, inputs, len(rows), after)
            if end is not None:
                return end.sample, end.previous_x0
        for index in rows:
            sample, previous_x0 = self._step(index, guided, sample, previous_x0)
            self.progress.queued()
        return sample, previous_x0

    def _step(self, index: int, guided: bool, sample: Tensor, previous_x0: Tensor) -> tuple[Tensor, Tensor]:
        """One step whose row the host knows, so that it computes what this row needs alone."""
        timestep, dtype = self.table.timesteps[index], self.table.told_dtype
        told = torch.full((len(sample),), timestep, dtype=dtype, device=sample.device)
        scale = self.table.row(index)["input_scale"]
        output, unconditional = self.model(sample if scale == 1 else sample * scale, told, guided)
        sample, x0 = ops.sampler_step(
            sample,
            output.to(sample.dtype),
            self.table,
            index,
            unconditional_output=None if unconditional is None else unconditional.to(sample.dtype),
            guidance=self.guidance,
            threshold=self.threshold,
            previous_x0=previous_x0,
            seed=self.seeds,
        )
        return sample, previous_x0 if x0 is None else x0


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
        event.record(torch.accelerator.current_stream(self.device))  # not that of the current device
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
