"""What a training run is: a TOML file, read into dataclasses; unknown keys are errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..config import from_dict
from ..errors import ConfigError
from ..models.cascade_config import CHANNELS, check_pictures
from ..models.efficient_unet import EfficientUNetConfig
from ..models.t5 import ByteTokenizer, T5Config
from ..models.unet import UNetConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_POSITIVE = (
    *("size", "low_resolution", "steps", "batch_size", "log_every", "sample_every", "checkpoint_every"),
    *("train_timesteps", "max_text_length", "threads"),
)
_SEEDS = 2**43  # a million times as many are seeds of batches, in 64 bits


@dataclass(frozen=True)
class TrainConfig:
    """One stage's training run.

    Args:
        stage: "text" trains the text encoder to tell from a caption which picture it names; "base" trains the text
            encoder and the base U-Net together on size² pictures; "super_resolution" trains the efficient U-Net from
            low_resolution² to size² on crops.
        data: directory of the data set.
        out: directory for checkpoints, the log and sample grids.
        initialize_from: directories of runs whose averaged weights this one starts from, where the names agree.
        size: side of the pictures in pixels; low_resolution: side of the low-resolution pictures.
        crop: side of the crops that super-resolution is trained on, in pixels of the large picture.
        prediction, train_timesteps: what the model predicts, over how many timesteps of the cosine schedule.
        steps, batch_size, learning_rate, warmup_steps, weight_decay, gradient_clip: AdamW's run; the learning rate
            rises over warmup_steps and falls by a cosine to final_learning_rate over all steps.
        ema_decay: of the exponential moving average of the weights, which is what is sampled and shipped.
        train_text_encoder: whether stage "base" trains the text encoder along, or leaves it as `initialize_from` gave
            it.
        text_dropout: share of captions dropped for classifier-free guidance.
        max_text_length: in tokens.
        max_augmentation: noise-conditioning augmentation is drawn up to this share of the schedule.
        precision: "bf16" is autocast with fp32 weights.
        log_every, sample_every, checkpoint_every: in steps.
        sample_prompts: what the sample grid shows.
        seed: of the first weights and of every batch; from -2^43 to 2^43 - 1.
        device: "auto" is a GPU if there is one. A batch is drawn on the CPU, so it is the same on every device.
        threads: of the CPU; None leaves PyTorch's number.
    """

    stage: Literal["text", "base", "super_resolution"]
    data: str
    out: str
    size: int = 32
    initialize_from: tuple[str, ...] = ()
    unet: UNetConfig | None = None
    efficient_unet: EfficientUNetConfig | None = None
    text_encoder: T5Config | None = None
    low_resolution: int | None = None
    crop: int | None = None
    prediction: Literal["epsilon", "v", "x0"] = "v"
    train_timesteps: int = 1000
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 5e-4
    final_learning_rate: float = 2e-5
    warmup_steps: int = 200
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    train_text_encoder: bool = True
    text_dropout: float = 0.1
    max_text_length: int = 64
    max_augmentation: float = 0.3
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: int = 200
    sample_prompts: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be above 0, got {self.gradient_clip}")
        if not -_SEEDS <= self.seed < _SEEDS:
            raise ValueError(f"seed must be from -2^43 to 2^43 - 1, got {self.seed}")
        for name in ("ema_decay", "text_dropout", "max_augmentation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.text_encoder is not None and self.text_encoder.vocab_size != ByteTokenizer.vocab_size:
            raise ValueError(f"text_encoder.vocab_size must be that of bytes, {ByteTokenizer.vocab_size}")
        if self.stage == "text" and self.text_encoder is None:
            raise ValueError("stage 'text' needs the table [text_encoder]")
        if self.stage == "base" and (self.unet is None or self.text_encoder is None):
            raise ValueError("stage 'base' needs the tables [unet] and [text_encoder]")
        if self.stage == "base" and self.unet.text_dim != self.text_encoder.d_model:  # type: ignore[union-attr]
            raise ValueError("unet.text_dim must be text_encoder.d_model")
        if self.stage == "base":
            self._check_pictures("unet", "size")
        if not self.train_text_encoder and not self.initialize_from:
            raise ValueError("train_text_encoder = false needs initialize_from: a run that trained the text encoder")
        if self.stage == "super_resolution":
            if self.efficient_unet is None or self.low_resolution is None:
                raise ValueError("stage 'super_resolution' needs the table [efficient_unet] and low_resolution")
            if self.efficient_unet.text_dim is not None:
                raise ValueError("super-resolution is trained without text for now: leave efficient_unet.text_dim out")
            if self.size % self.low_resolution:
                raise ValueError(f"low_resolution {self.low_resolution} must divide size {self.size}")
            if self.crop is not None and not 0 < self.crop <= self.size:
                raise ValueError(f"crop must be between 1 and size {self.size}, got {self.crop}")
            for name in ("size", "crop"):
                self._check_pictures("efficient_unet", name)

    def _check_pictures(self, unet: str, name: str) -> None:
        """Raise ValueError unless the U-Net takes pictures whose side the field `name` says, and gives such."""
        config = getattr(self, unet)
        check_pictures(config, getattr(self, name) or self.size, CHANNELS, name)
        if config.out_channels != CHANNELS:
            raise ValueError(f"{unet}.out_channels must be {CHANNELS} in training, got {config.out_channels}")

    @classmethod
    def load(cls, name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a TOML file, or a configuration that ships with the package by its name.

        Args:
            name_or_path: a path, or a name such as "emoji-base".
            overrides: "key=value" or "table.key=value" with a TOML value, applied last.

        Raises:
            ConfigError: no such configuration, invalid TOML, an unknown key or a value out of range.
        """
        shipped = resources.files(__package__) / "configs"
        path = Path(name_or_path)
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{name_or_path} is not valid TOML: it is no text in UTF-8") from error
        elif (shipped / f"{name_or_path}.toml").is_file():
            text = (shipped / f"{name_or_path}.toml").read_text(encoding="utf-8")
        else:
            known = ", ".join(
                sorted(f.name.removesuffix(".toml") for f in shipped.iterdir() if f.name.endswith(".toml"))
            )
            raise ConfigError(f"no training configuration {name_or_path!r}: not a file, and not one of {known}")
        values = _parse(text, name_or_path)
        for override in overrides:
            _override(values, override)
        # TOML has no null: what has no text says so by leaving the key out.
        if isinstance(values.get("efficient_unet"), dict):
            values["efficient_unet"].setdefault("text_dim", None)
        return from_dict(cls, values, name_or_path)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"expected key=value, got {override!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {table} is not a table")
    values[last] = parsed
