"""What a cascade is made of: sizes, schedules and how each stage is sampled by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ..diffusion.schedules import linear_betas, squaredcos_cap_v2
from ..diffusion.step_table import StepTable
from ..ops._checks import integer, is_integer, is_number, number, one_of
from ..reference.guidance import DynamicThreshold
from .efficient_unet import EfficientUNet, EfficientUNetConfig
from .t5 import T5Config
from .unet import UNet, UNetConfig

SOLVERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": StepTable.ddpm,
    "ddim": StepTable.ddim,
    "dpm": StepTable.dpm_solver_pp,  # 2M
}
SCHEDULES: dict[str, Callable[[int], Tensor]] = {"squaredcos_cap_v2": squaredcos_cap_v2, "linear": linear_betas}
CHOICES: dict[str, tuple[str, ...]] = {
    "prediction": ("epsilon", "v", "x0"),
    "schedule": tuple(SCHEDULES),
    "solver": tuple(SOLVERS),
    "spacing": ("leading", "trailing", "linspace"),
    "threshold": ("none", "static", "dynamic"),
}
CHANNELS = 3  # of a picture


def default_solver(steps: int) -> str:
    """The one that looked best at a number of steps, of the pictures that `imagen-fast compare-solvers` draws."""
    return "ddim"


@dataclass(frozen=True)
class StageConfig:
    """One diffusion model of the cascade.

    Args:
        name: of the stage and of its files.
        size: side of its pictures in pixels.
        unet: the sizes of its U-Net, if it is the first stage.
        efficient_unet: the sizes of its U-Net, if it is a super-resolution stage.
        prediction, train_timesteps, schedule: how it was trained.
        solver, steps, spacing, guidance: how it is sampled by default.
        threshold: "none", "static" (clip to ±1) or "dynamic", with threshold_percentile and threshold_max as in
            `DynamicThreshold`.
        augmentation: noise-conditioning augmentation in sampling, as a share of the schedule.

    Raises:
        TypeError: a field is of another kind.
        ValueError: a field is out of range, or does not fit the others.
    """

    name: str
    size: int
    unet: UNetConfig | None = None
    efficient_unet: EfficientUNetConfig | None = None
    prediction: Literal["epsilon", "v", "x0"] = "v"
    train_timesteps: int = 1000
    schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"
    solver: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    steps: int = 100
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    guidance: float = 1.0
    threshold: Literal["none", "static", "dynamic"] = "dynamic"
    threshold_percentile: float = 0.995
    threshold_max: float | None = None
    augmentation: float = 0.0

    def __post_init__(self) -> None:
        if (self.unet is None) == (self.efficient_unet is None):
            raise ValueError(f"stage {self.name!r} needs either unet or efficient_unet")
        kinds = (("unet", self.unet, UNetConfig), ("efficient_unet", self.efficient_unet, EfficientUNetConfig))
        for field, value, kind in kinds:
            if not isinstance(value, kind | None):
                raise TypeError(f"{field} must be a {kind.__name__} or None, got {type(value).__name__}")
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name must be a word of letters, digits and underscores, got {self.name!r}")
        if hasattr(nn.ModuleDict(), self.name):  # which the cascade holds its U-Nets in
            raise ValueError(f"name must not be one that torch.nn.ModuleDict uses itself, got name {self.name!r}")
        for field, known in CHOICES.items():
            one_of(field, getattr(self, field), known)
        for field in ("size", "train_timesteps", "steps"):
            object.__setattr__(self, field, integer(field, getattr(self, field), 1))
        for field in ("guidance", "augmentation"):
            object.__setattr__(self, field, number(field, getattr(self, field)))
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not 0 <= self.augmentation < 1:
            raise ValueError(f"augmentation must be at least 0 and below 1, got {self.augmentation}")
        if self.steps > self.train_timesteps:
            raise ValueError(f"steps must be between 1 and train_timesteps {self.train_timesteps}, got {self.steps}")
        DynamicThreshold(self.threshold_percentile, max_value=self.threshold_max)  # its own checks
        check_pictures(self.unet or self.efficient_unet, self.size, CHANNELS)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        """Of the sampled picture."""
        return CHANNELS

    @property
    def text_dim(self) -> int | None:
        """Width of the text features that its U-Net reads, or None."""
        config = self.unet or self.efficient_unet
        return config.text_dim  # type: ignore[union-attr]

    @property
    def thresholding(self) -> str | DynamicThreshold | None:
        """The threshold as the sampler takes it."""
        if self.threshold == "dynamic":
            return DynamicThreshold(self.threshold_percentile, max_value=self.threshold_max)
        return None if self.threshold == "none" else self.threshold

    def alphas_cumprod(self) -> Tensor:
        """The stage's noise schedule."""
        return SCHEDULES[self.schedule](self.train_timesteps)

    def build(self) -> nn.Module:
        """Its U-Net with random weights."""
        if self.unet is not None:
            return UNet(self.unet)
        assert self.efficient_unet is not None
        return EfficientUNet(self.efficient_unet)


class StagePlan(NamedTuple):
    """How one stage is sampled in one call."""

    stage: StageConfig
    table: StepTable
    guidance: float
    threshold: str | DynamicThreshold | None


@dataclass(frozen=True)
class ImagenConfig:
    """A cascade: its stages, smallest pictures first, and the text length in tokens that it was trained with."""

    stages: tuple[StageConfig, ...]
    max_text_length: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple | list) or not all(isinstance(one, StageConfig) for one in self.stages):
            raise TypeError(f"stages must be a tuple of StageConfigs, got {self.stages!r}")
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "max_text_length", integer("max_text_length", self.max_text_length, 1))
        if not self.stages:
            raise ValueError("a cascade needs at least one stage")
        for i, stage in enumerate(self.stages):
            if (stage.unet is None) != (i > 0):
                kind = "efficient_unet" if i else "unet"
                raise ValueError(f"stage {stage.name!r} is number {i + 1} of the cascade and needs {kind}")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("stages must have different names")

    @classmethod
    def paper(cls) -> ImagenConfig:
        """The paper's cascade on T5-XXL: 64², 256² and 1024² (appendix F; 2 B, 600 M and 400 M parameters)."""
        super_256 = EfficientUNetConfig()
        super_1024 = replace(super_256, self_attention_levels=())
        sr = {"steps": 50, "guidance": 4.0, "augmentation": 0.2}
        return cls(
            stages=(
                StageConfig("base", 64, unet=UNetConfig(), prediction="epsilon", steps=250, guidance=7.0),
                StageConfig("super_256", 256, efficient_unet=super_256, prediction="v", **sr),  # type: ignore[arg-type]
                StageConfig("super_1024", 1024, efficient_unet=super_1024, prediction="v", **sr),  # type: ignore[arg-type]
            )
        )

    @classmethod
    def small(cls, text_dim: int = 256) -> ImagenConfig:
        """A cascade of a few million parameters, 32² and 128²: the shape of the one that ships."""
        unet = UNetConfig(64, (1, 2, 3), 2, (1, 2), 64, text_dim, groups=16)
        super_resolution = EfficientUNetConfig(32, (1, 2, 4), (1, 2, 2), (), (), text_dim=None, groups=16)
        return cls(
            stages=(
                StageConfig("base", 32, unet=unet, solver="ddim", steps=25, guidance=1.5),
                StageConfig(
                    "super_128", 128, efficient_unet=super_resolution, solver="ddim", steps=10, augmentation=0.1
                ),
            ),
            max_text_length=64,
        )

    @staticmethod
    def paper_text_encoder() -> T5Config:
        """T5-XXL."""
        return T5Config.preset("xxl")

    def plan(
        self,
        *,
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        solver: str | None = None,
        threshold: str | DynamicThreshold | None = None,
        until: str | None = None,
    ) -> list[StagePlan]:
        """How every stage that runs is sampled; arguments as of `Imagen.sample`."""
        if solver not in (None, *SOLVERS):
            raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
        if threshold not in (None, "none", "static") and not isinstance(threshold, DynamicThreshold):
            raise ValueError(f"threshold must be 'none', 'static' or a DynamicThreshold, got {threshold!r}")
        names = [stage.name for stage in self.stages]
        if until not in (None, *names):
            raise ValueError(f"until must be one of {', '.join(map(repr, names))}, got {until!r}")
        plans = []
        for i, stage in enumerate(self.stages):
            given = _per_stage(steps, "steps", i, len(names))
            count = stage.steps if given is None else given
            if not is_integer(count) or not 1 <= count <= stage.train_timesteps:
                raise ValueError(f"steps must be a whole number from 1 to {stage.train_timesteps}, got {count!r}")
            count = int(count)
            build = SOLVERS[solver or (stage.solver if given is None else default_solver(count))]
            table = build(stage.alphas_cumprod(), steps=count, prediction=stage.prediction, spacing=stage.spacing)
            scale = _per_stage(guidance, "guidance", i, len(names))
            scale = stage.guidance if scale is None else scale
            if not is_number(scale) or not math.isfinite(scale):
                raise ValueError(f"guidance must be a finite number, or one per stage, got {scale!r}")
            clipping = stage.thresholding if threshold is None else None if threshold == "none" else threshold
            plans.append(StagePlan(stage, table, float(scale), clipping))
            if stage.name == until:
                break
        return plans


def check_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """A guidance interval as `Imagen.sample` takes it."""
    if interval is None:
        return None
    ends = list(interval) if isinstance(interval, Iterable) else []
    if len(ends) != 2 or not all(map(is_number, ends)):
        raise TypeError(f"guidance_interval must be two noise levels or None, got {interval!r}")
    low, high = map(float, ends)
    if not 0 <= low <= high:
        raise ValueError(f"guidance_interval must be two noise levels, 0 <= low <= high, got {interval}")
    return low, high


def check_pictures(config: UNetConfig | EfficientUNetConfig, size: int, channels: int, name: str = "size") -> None:
    """Raise ValueError unless a U-Net of this configuration takes and gives pictures of size²."""
    levels = len(config.multipliers)
    larger = isinstance(config, EfficientUNetConfig)
    factor = 2**levels if larger else 2 ** (levels - 1)
    if size % factor:
        raise ValueError(f"{name} must be divisible by {factor}, as its U-Net of {levels} levels needs, got {size}")
    needed = 2 * channels if larger else channels
    if config.in_channels != needed:
        raise ValueError(f"its U-Net's in_channels must be {needed}, got {config.in_channels}")
    if config.out_channels < channels:
        raise ValueError(f"its U-Net's out_channels must be at least {channels}, got {config.out_channels}")


def _per_stage(value, name: str, index: int, count: int):
    """The stage's value of an argument that is one number for all stages, or one per stage."""
    if value is None or is_number(value):
        return value
    if isinstance(value, str) or not hasattr(type(value), "__getitem__"):
        raise TypeError(f"{name} must be a number, or one per stage, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{name} must be one number, or one per stage: {count}, got {list(value)}")
    return value[index]
