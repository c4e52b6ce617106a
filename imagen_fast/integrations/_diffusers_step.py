"""What the fused steps of diffusers' schedulers share: tables kept as long as what they were made of, what fits the op,
and which row a timestep means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..diffusion import DynamicThreshold, StepTable
from ._fused import FusedMethod, is_plain

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class FusedStep(FusedMethod):
    """What the fused steps share: tables, kept as long as what they were made of stays, and what fits."""

    method = "step"
    ops = ("sampler_step",)
    # Made of the scheduler's timesteps, noise levels and configuration
    made_of: ClassVar[tuple[str, ...]]
    # What of the configuration limits x0: one that was made for another scheduler holds keys that the step never reads
    limits: ClassVar[tuple[str, ...]] = ()

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self.forget()

    def forget(self) -> None:
        self._made_of: tuple[Any, ...] = ()
        self._tables: dict[Any, StepTable | None] = {}
        self._told: list[float] = []
        self._unfit: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["owner"])  # type: ignore[misc]

    @classmethod
    def why_left(cls, owner: Any) -> str | None:
        if owner.config.prediction_type not in PREDICTIONS:
            return f"its prediction_type {owner.config.prediction_type!r} is not served"
        return _why_threshold_left(owner.config, cls.limits)

    def _theirs(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.step(self.owner, *args, **kwargs)  # type: ignore[attr-defined]

    def _table(self, key: Any, make: Callable[[], StepTable]) -> StepTable | None:
        """The table for `key`; made anew after `set_timesteps` and the like; None where the scheduler must step."""
        made_of = [getattr(self.owner, name) for name in self.made_of] + [self.owner._internal_dict]
        same = len(made_of) == len(self._made_of) and all(
            a is b and _version(a) == version for a, (b, version) in zip(made_of, self._made_of, strict=True)
        )
        if not same:
            self.forget()
            self._made_of = tuple((value, _version(value)) for value in made_of)
            self._unfit = self.why_left(self.owner)
        if key not in self._tables:
            try:
                self._tables[key] = None if self._unfit else make()
            except (ValueError, ZeroDivisionError, IndexError):  # such as timesteps that do not fall
                self._tables[key] = None
        return self._tables[key]

    def _fits(self, output: Any, sample: Any, learned: bool, *noises: Any) -> bool:
        """Whether the op computes what the scheduler does with these."""
        tensors = [tensor for tensor in (output, sample, *noises) if tensor is not None]
        if not all(isinstance(tensor, Tensor) for tensor in tensors) or not is_plain(*tensors):
            return False
        if sample.dtype not in _DTYPES or output.dtype != sample.dtype or not 2 <= sample.dim() <= 5:
            return False
        if any(tensor.device != sample.device for tensor in tensors):
            return False
        if any(n is not None and (n.shape != sample.shape or n.dtype != sample.dtype) for n in noises):
            return False
        expected = list(sample.shape)
        expected[1] *= 2 if learned else 1
        return list(output.shape) == expected

    def _index(self, timestep: Any) -> int | None:
        """Which of the scheduler's timesteps it is.

        The pipelines pass elements of `scheduler.timesteps`; where they lie tells which, without reading the device.
        """
        timesteps = self.owner.timesteps
        if torch._C._are_functorch_transforms_active():  # within one, where a tensor lies is not to be seen
            return None
        if isinstance(timestep, Tensor):
            if timestep.dim() or timestep.dtype != timesteps.dtype:
                return None
            shared = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
            if shared and timesteps.stride(0) == 1:
                index = timestep.storage_offset() - timesteps.storage_offset()
                return index if 0 <= index < len(timesteps) else None
        elif not isinstance(timestep, int):
            return None
        if not self._told:
            self._told = timesteps.tolist()
        return self._told.index(int(timestep)) if int(timestep) in self._told else None

    def _is_over(self, timestep: Any) -> bool:
        """Whether a scheduler that counts its steps has none left, which its own step has to say; finds where it
        stands first, as that does."""
        if self.owner.step_index is None:
            self.owner._init_step_index(timestep)
        return not 0 <= self.owner.step_index < len(self.owner.timesteps)

    def _threshold(self) -> str | DynamicThreshold | None:
        config = self.owner.config
        if _has(config, "thresholding", self.limits):
            return DynamicThreshold(config.dynamic_thresholding_ratio, max_value=float(config.sample_max_value))
        return "static" if _has(config, "clip_sample", self.limits) else None


def _version(value: Any) -> int:
    """How often a tensor has been written to in place. Of one made in inference mode nobody knows."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _has(config: Any, limit: str, limits: Sequence[str]) -> bool:
    return limit in limits and bool(config.get(limit))


def _why_threshold_left(config: Any, limits: Sequence[str]) -> str | None:
    if _has(config, "thresholding", limits):
        if not 0 <= config.dynamic_thresholding_ratio <= 1 or config.sample_max_value < 1:
            return "its dynamic threshold is not served"
    elif _has(config, "clip_sample", limits) and config.clip_sample_range != 1:
        return f"it clips to {config.clip_sample_range}, and 1 alone is served"
    return None


def noise_like(sample: Tensor, generator: Any, dtype: torch.dtype | None = None) -> Tensor:
    return randn_tensor(
        sample.shape, generator=generator, device=sample.device, dtype=sample.dtype if dtype is None else dtype
    )
