"""diffusers' schedulers on `ops.sampler_step`: their `step`, one instance at a time.

A scheduler keeps its class, its configuration and its state; timesteps, noise levels and history are read from it at
every step and left as its own step leaves them, so that the two can take turns. Noise is drawn from the generator that
the caller gives, as before. A step that does not fit (other dtypes, other shapes, a timestep that is not among the
scheduler's) is the scheduler's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_dpmsolver_multistep import SchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from .. import ops
from ..diffusion import StepTable
from ..diffusion import _variance_exploding as exploding
from ..diffusion import _variance_preserving as preserving
from ._diffusers_step import PREDICTIONS, FusedStep, noise_like
from ._fused import is_plain

_LEARNED = ("learned", "learned_range")


class FusedDDPMStep(FusedStep):
    """DDPMScheduler, of fixed and learned-range variances."""

    original = DDPMScheduler
    made_of = ("timesteps", "alphas_cumprod", "num_inference_steps", "custom_timesteps")
    limits = ("thresholding", "clip_sample")

    _VARIANCES: ClassVar[dict[str, str]] = {
        "fixed_small": "fixed_small",
        "fixed_small_log": "fixed_small",
        "fixed_large": "fixed_large",
        "learned_range": "learned_range",
    }

    @classmethod
    def why_left(cls, owner: Any) -> str | None:
        if owner.variance_type not in cls._VARIANCES:
            return f"its variance_type {owner.variance_type!r} is not served"
        return super().why_left(owner)

    def _make(self) -> StepTable:
        owner = self.owner
        timesteps = owner.timesteps.tolist()
        if not (owner.num_inference_steps or owner.custom_timesteps) and timesteps != list(range(len(timesteps)))[::-1]:
            raise ValueError("before set_timesteps the scheduler goes down by 1, whatever its timesteps are")
        return StepTable.ddpm(
            owner.alphas_cumprod,
            steps=timesteps,
            prediction=PREDICTIONS[owner.config.prediction_type],  # type: ignore[arg-type]
            variance=self._VARIANCES[owner.variance_type],  # type: ignore[arg-type]
        )

    def __call__(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        table, index = self._table(self.owner.variance_type, self._make), self._index(timestep)
        if table is None or index is None or not self._fits(model_output, sample, table.learned_variance):
            return self._theirs(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        noise = noise_like(sample, generator) if table.row(index)["noise_scale"] else None
        threshold = self._threshold()
        following, x0 = ops.sampler_step(
            sample, model_output, table, index, threshold=threshold, noise=noise, return_x0=True
        )
        return DDPMSchedulerOutput(following, x0) if return_dict else (following, x0)


class FusedDDIMStep(FusedStep):
    """DDIMScheduler, with any eta."""

    original = DDIMScheduler
    made_of = ("timesteps", "alphas_cumprod", "final_alpha_cumprod", "num_inference_steps")
    limits = ("thresholding", "clip_sample")

    def _make(self, eta: float, clipped: bool) -> StepTable:
        owner = self.owner
        values = owner.alphas_cumprod.double().tolist()
        timesteps = owner.timesteps.tolist()
        stride = owner.config.num_train_timesteps // owner.num_inference_steps
        ends = [timestep - stride for timestep in timesteps]
        final = float(owner.final_alpha_cumprod)
        levels = preserving.Levels(
            timesteps,
            [values[t] for t in timesteps],
            [values[t] if t >= 0 else final for t in ends],
            owner.alphas_cumprod.dtype == torch.float32,
        )
        prediction = PREDICTIONS[owner.config.prediction_type]
        return StepTable.of_rows(preserving.ddim(levels, prediction, eta, clipped))

    def __call__(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Any = None,
        return_dict: bool = True,
    ) -> Any:
        table = index = None
        if self.owner.num_inference_steps is not None and (generator is None or variance_noise is None):
            key = (eta, use_clipped_model_output)
            table = self._table(key, lambda: self._make(float(eta), bool(use_clipped_model_output)))
            index = self._index(timestep)
        if table is None or index is None or not self._fits(model_output, sample, False, variance_noise):
            return self._theirs(
                model_output,
                timestep,
                sample,
                eta=eta,
                use_clipped_model_output=use_clipped_model_output,
                generator=generator,
                variance_noise=variance_noise,
                return_dict=return_dict,
            )
        noise = None
        if eta > 0:
            noise = noise_like(sample, generator) if variance_noise is None else variance_noise
        threshold = self._threshold()
        following, x0 = ops.sampler_step(
            sample, model_output, table, index, threshold=threshold, noise=noise, return_x0=True
        )
        return DDIMSchedulerOutput(following, x0) if return_dict else (following, x0)


class FusedDPMSolverStep(FusedStep):
    """DPMSolverMultistepScheduler: dpmsolver++ and sde-dpmsolver++ of order 1 and 2.

    Its table has the rows twice: as the solver steps through them, and, after that, in order 1, which the first step
    has wherever it starts.
    """

    original = DPMSolverMultistepScheduler
    made_of = ("timesteps", "sigmas")
    limits = ("thresholding",)

    @classmethod
    def why_left(cls, owner: Any) -> str | None:
        config = owner.config
        if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
            return f"its algorithm_type {config.algorithm_type!r} is not served"
        if config.solver_order not in (1, 2):
            return f"its solver_order {config.solver_order} is not served"
        if config.use_flow_sigmas:
            return "its noise levels are those of flow matching"
        return super().why_left(owner)

    def _make(self) -> StepTable:
        owner, config = self.owner, self.owner.config
        timesteps, sigmas = owner.timesteps.tolist(), owner.sigmas.tolist()
        few = config.lower_order_final and len(timesteps) < preserving.FEW_STEPS
        ends_low = few or config.euler_at_final or config.final_sigmas_type == "zero"

        def rows(order: int) -> list[Any]:
            return preserving.multistep(
                timesteps,
                sigmas,
                PREDICTIONS[config.prediction_type],
                order=order,
                sde=config.algorithm_type == "sde-dpmsolver++",
                solver_type=config.solver_type,
                ends_low=bool(ends_low),
            )

        return StepTable.of_rows([*rows(config.solver_order), *rows(1)])

    def _fits_previous(self, sample: Tensor) -> bool:
        previous = self.owner.model_outputs[-1]
        return self.owner.lower_order_nums < 1 or (
            isinstance(previous, Tensor)
            and is_plain(previous)
            and previous.shape == sample.shape
            and previous.dtype == sample.dtype
            and previous.device == sample.device
        )

    def _fits_noise(self, noise: Any, sample: Tensor) -> bool:
        """Whether the scheduler would draw noise of this shape itself; it multiplies by whatever it is given."""
        if noise is None or self.owner.config.algorithm_type != "sde-dpmsolver++":
            return True
        return isinstance(noise, Tensor) and is_plain(noise) and noise.shape == sample.shape

    def __call__(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        generator: Any = None,
        variance_noise: Any = None,
        return_dict: bool = True,
    ) -> Any:
        owner, config = self.owner, self.owner.config
        table = None if owner.num_inference_steps is None else self._table(None, self._make)
        # A model with variance channels: diffusers leaves out all but the first three.
        learned = config.variance_type in _LEARNED and config.prediction_type == "epsilon"
        learned = learned and isinstance(model_output, Tensor) and model_output.shape[1:2] == (6,)
        fits = self._fits(model_output, sample, learned) and self._fits_noise(variance_noise, sample)
        if table is None or not fits or not self._fits_previous(sample) or self._is_over(timestep):
            return self._theirs(
                model_output,
                timestep,
                sample,
                generator=generator,
                variance_noise=variance_noise,
                return_dict=return_dict,
            )
        noise = None
        if config.algorithm_type == "sde-dpmsolver++":
            if variance_noise is None:
                noise = noise_like(sample, generator, torch.float32)
            else:
                noise = variance_noise.to(device=sample.device, dtype=torch.float32)
        starts = owner.lower_order_nums < 1
        following, x0 = ops.sampler_step(
            sample,
            model_output,
            table,
            owner.step_index + (len(owner.timesteps) if starts else 0),
            threshold=self._threshold(),
            previous_x0=sample if starts else owner.model_outputs[-1],
            noise=noise,
            return_x0=True,
        )
        owner.model_outputs = [*owner.model_outputs[1:], x0]
        owner.lower_order_nums = min(owner.lower_order_nums + 1, config.solver_order)
        owner._step_index += 1
        return SchedulerOutput(following) if return_dict else (following,)


class FusedEulerStep(FusedStep):
    """EulerDiscreteScheduler, with churn."""

    original = EulerDiscreteScheduler
    made_of = ("timesteps", "sigmas")

    def _make(self, churn: float, low: float, high: float, noise: float) -> StepTable:
        sigmas: Sequence[float] = self.owner.sigmas.tolist()
        levels = exploding.Levels(self.owner.timesteps.tolist(), sigmas, 1.0)
        prediction = PREDICTIONS[self.owner.config.prediction_type]
        return StepTable.of_rows(exploding.euler(levels, prediction, churn, low, high, noise))

    def __call__(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        owner = self.owner
        churn = (float(s_churn), float(s_tmin), float(s_tmax), float(s_noise))
        table = self._table(churn, lambda: self._make(*churn))
        refused = isinstance(timestep, int | torch.IntTensor | torch.LongTensor) or not owner.is_scale_input_called
        if table is None or refused or not self._fits(model_output, sample, False) or self._is_over(timestep):
            return self._theirs(
                model_output,
                timestep,
                sample,
                s_churn=s_churn,
                s_tmin=s_tmin,
                s_tmax=s_tmax,
                s_noise=s_noise,
                generator=generator,
                return_dict=return_dict,
            )
        sigma = float(owner.sigmas[owner.step_index])
        noise = noise_like(sample, generator) if churn[0] > 0 and churn[1] <= sigma <= churn[2] else None
        # The scheduler's x0 is float32, whatever the model's dtype, unless the model gives it
        following, x0 = ops.sampler_step(
            sample.float(), model_output, table, owner.step_index, noise=noise, return_x0=True
        )
        owner._step_index += 1
        following = following.to(model_output.dtype)
        x0 = model_output if owner.config.prediction_type == "sample" else x0
        return EulerDiscreteSchedulerOutput(following, x0) if return_dict else (following, x0)


FUSED_STEPS = (FusedDDPMStep, FusedDDIMStep, FusedDPMSolverStep, FusedEulerStep)
