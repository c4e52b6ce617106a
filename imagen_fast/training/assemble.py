"""Trained stages to a cascade that can be sampled and shipped."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..config import from_dict, read_json
from ..errors import UserError
from ..models import EfficientUNet, Imagen, ImagenConfig, StageConfig, T5Encoder, UNet
from .config import TrainConfig
from .state_file import open_state
from .trainer import CHECKPOINT

# How the stages are sampled unless the caller says otherwise; what was chosen by looking at pictures.
# A model that has seen one picture of each thing is certain of it: guidance and dynamic thresholding only distort.
BASE_SAMPLING = {"solver": "ddim", "steps": 25, "guidance": 1.0, "threshold": "none"}
SUPER_RESOLUTION_SAMPLING = {"solver": "ddim", "steps": 16, "augmentation": 0.0, "threshold": "static"}


def assemble(base: str | os.PathLike[str], *super_resolution: str | os.PathLike[str]) -> Imagen:
    """A cascade of the averaged weights of training runs.

    Args:
        base: the directory of a run with stage "base".
        super_resolution: directories of runs with stage "super_resolution", in the order of their sizes.

    Raises:
        CheckpointError: a directory holds no checkpoint, or a damaged one.
        UserError: the stages do not follow one another.
    """
    config, path = _read(base)
    if config.stage != "base" or config.text_encoder is None or config.unet is None:
        raise UserError(f"{base} is not a run of stage 'base'")
    text_encoder, unet = T5Encoder(config.text_encoder), UNet(config.unet)
    _load_average(torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}), path)
    stages = [_stage("base", config, BASE_SAMPLING)]
    unets: list[torch.nn.Module] = [unet]
    for directory in super_resolution:
        larger, path = _read(directory)
        if larger.stage != "super_resolution" or larger.efficient_unet is None:
            raise UserError(f"{directory} is not a run of stage 'super_resolution'")
        if larger.low_resolution != stages[-1].size:
            before, needed = stages[-1].size, larger.low_resolution
            raise UserError(f"{directory} starts from {needed}², but the stage before gives {before}²")
        efficient = EfficientUNet(larger.efficient_unet)
        _load_average(torch.nn.ModuleDict({"unet": efficient}), path)
        stages.append(_stage(f"super_{larger.size}", larger, SUPER_RESOLUTION_SAMPLING))
        unets.append(efficient)
    model = Imagen(ImagenConfig(tuple(stages), max_text_length=config.max_text_length), text_encoder)
    for stage, trained in zip(stages, unets, strict=True):
        model.unets[stage.name] = trained
    return model.eval().requires_grad_(False)


def _read(directory: str | os.PathLike[str]) -> tuple[TrainConfig, Path]:
    path = Path(directory) / CHECKPOINT
    values = read_json(path / "state.json")
    return from_dict(TrainConfig, values.get("config", {}), str(path / "state.json")), path


def _stage(name: str, config: TrainConfig, sampling: dict) -> StageConfig:
    return StageConfig(
        name,
        config.size,
        unet=config.unet,
        efficient_unet=config.efficient_unet,
        prediction=config.prediction,
        train_timesteps=config.train_timesteps,
        **sampling,
    )


def _load_average(modules: torch.nn.ModuleDict, path: Path) -> None:
    with open_state(path, "read") as file:
        for name, parameter in modules.named_parameters():
            file.copy(f"average.{name}", parameter)
