"""Pictures of what a run has learned so far."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.noise import Noise
from ..diffusion.sampling import sample_loop
from ..diffusion.schedules import squaredcos_cap_v2
from ..diffusion.step_table import StepTable
from ..files import atomic_file
from ..models.guided import GuidedUNet
from ..models.imagen import to_pictures
from ..pictures import grid
from .stages import BaseStage, DiffusionStage, SuperResolutionStage


@torch.inference_mode()
def save_sample_grid(
    stage: DiffusionStage, modules: nn.ModuleDict, path: Path, *, steps: int = 25, guidance: float = 1.0
) -> None:
    """Sample with the averaged weights and save a grid: the prompts' pictures, or low resolution above high."""
    config = stage.config
    steps = min(steps, config.train_timesteps)
    table = StepTable.ddim(
        squaredcos_cap_v2(config.train_timesteps), steps=steps, prediction=config.prediction, spacing="trailing"
    )
    if isinstance(stage, BaseStage):
        pictures = _base_samples(stage, modules, table, guidance)
    else:
        assert isinstance(stage, SuperResolutionStage)
        pictures = _super_resolution_samples(stage, modules, table)
    images = [image.resize((128, 128), 0) for image in to_pictures(pictures)]  # 0: nearest, to show pixels as they are
    with atomic_file(path) as temporary:
        grid(images, columns=8).save(temporary)


def _base_samples(stage: BaseStage, modules: nn.ModuleDict, table: StepTable, guidance: float) -> Tensor:
    config = stage.config
    prompts = config.sample_prompts or tuple(stage.dataset.name(i, "en") for i in range(min(16, len(stage.dataset))))
    tokens = stage.captions.tokenizer(list(prompts), max_length=config.max_text_length)
    input_ids, mask = (tensor.to(stage.device) for tensor in tokens)
    text = modules["text_encoder"](input_ids, mask)
    model = GuidedUNet(modules["unet"], text, mask, guidance)
    noise = Noise(range(len(prompts)), stage.device)
    return sample_loop(model, table, noise, (3, config.size, config.size), guidance=guidance, threshold="static")


def _super_resolution_samples(stage: SuperResolutionStage, modules: nn.ModuleDict, table: StepTable) -> Tensor:
    config = stage.config
    low = F.interpolate(stage.small[:64:8], size=(config.size, config.size), mode="bilinear", align_corners=False)
    low = low.to(stage.device)
    level = torch.zeros(len(low), dtype=torch.long, device=stage.device)

    def model(x: Tensor, timestep: Tensor, guided: bool) -> tuple[Tensor, None]:
        return modules["unet"](torch.cat((x, low), dim=1), timestep, augmentation=level), None

    noise = Noise(range(len(low)), stage.device)
    high = sample_loop(model, table, noise, (3, config.size, config.size), threshold="static")
    return torch.cat((low, high))
