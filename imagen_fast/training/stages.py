"""What the two kinds of stage train on: their modules, their batches and their loss.

A batch depends on nothing but the run's seed and the step, so that a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.schedules import squaredcos_cap_v2
from ..models.efficient_unet import EfficientUNet
from ..models.t5 import T5Encoder
from ..models.unet import UNet
from .config import TrainConfig
from .emoji.dataset import EmojiDataset


class Batch(NamedTuple):
    """Clean pictures (B, 3, H, W) in [−1, 1], and what the model is told about them."""

    x0: Tensor
    timestep: Tensor  # (B,) int64
    noise: Tensor  # like x0
    condition: dict[str, Tensor]


class Stage:
    """Modules, batches and loss of one stage."""

    def __init__(self, config: TrainConfig, dataset: EmojiDataset) -> None:
        self.config, self.dataset = config, dataset
        self.alphas_cumprod = squaredcos_cap_v2(config.train_timesteps).float()
        self.modules = self._build()

    def _build(self) -> nn.ModuleDict:
        raise NotImplementedError

    def _pictures(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def _predict(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        count = self.config.batch_size
        indices = torch.randint(len(self.dataset), (count,), generator=generator).tolist()
        x0, condition = self._pictures(indices, generator)
        # One timestep from each of B equal strata: less variance in the loss than B independent ones.
        offset = torch.rand(count, generator=generator)
        timestep = ((torch.arange(count) + offset) / count * self.config.train_timesteps).long()
        return Batch(x0, timestep, torch.randn(x0.shape, generator=generator), condition)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the prediction."""
        alpha = self.alphas_cumprod[batch.timestep].view(-1, 1, 1, 1)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * batch.x0 + sigma * batch.noise
        targets = {"epsilon": batch.noise, "x0": batch.x0, "v": signal * batch.noise - sigma * batch.x0}
        output = self._predict(noisy.contiguous(memory_format=torch.channels_last), batch.timestep, batch.condition)
        return F.mse_loss(output.float(), targets[self.config.prediction])


class BaseStage(Stage):
    """Captions to small pictures; the text encoder is trained along."""

    def _build(self) -> nn.ModuleDict:
        assert self.config.text_encoder is not None
        assert self.config.unet is not None
        encoder = T5Encoder(self.config.text_encoder)
        self.tokenizer = encoder.tokenizer
        self.small = resized(self.dataset.images, self.config.size)
        return nn.ModuleDict({"text_encoder": encoder, "unet": UNet(self.config.unet)})

    def _pictures(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        captions = []
        for index in indices:
            language = ("en", "zh")[int(torch.randint(2, (), generator=generator))]
            choices = self.dataset.captions(index, "train", language)
            captions.append(choices[int(torch.randint(len(choices), (), generator=generator))])
        assert self.tokenizer is not None
        input_ids, mask = self.tokenizer(captions, max_length=self.config.max_text_length)
        dropped = torch.rand(len(indices), generator=generator) < self.config.text_dropout
        return self.small[indices], {"input_ids": input_ids, "mask": mask, "dropped": dropped}

    def _predict(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        text = self.modules["text_encoder"](condition["input_ids"], condition["mask"])
        return self.modules["unet"](x, timestep, text, condition["mask"] & ~condition["dropped"][:, None])


class SuperResolutionStage(Stage):
    """Low-resolution pictures to large ones, on crops, with noise-conditioning augmentation."""

    def _build(self) -> nn.ModuleDict:
        assert self.config.efficient_unet is not None
        assert self.config.low_resolution is not None
        self.large = resized(self.dataset.images, self.config.size)
        self.small = resized(self.dataset.images, self.config.low_resolution)
        return nn.ModuleDict({"unet": EfficientUNet(self.config.efficient_unet)})

    def _pictures(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        large, small = self.large[indices], self.small[indices]
        # Augmentation happens at low resolution, as in sampling, so it comes before upsampling and cropping.
        level = torch.rand(len(indices), generator=generator) * config.max_augmentation
        augmentation = (level * config.train_timesteps).long()
        alpha = self.alphas_cumprod[augmentation].view(-1, 1, 1, 1)
        small = alpha.sqrt() * small + (1 - alpha).sqrt() * torch.randn(small.shape, generator=generator)
        upsampled = F.interpolate(small, size=(config.size, config.size), mode="bilinear", align_corners=False)
        crop = config.crop or config.size
        crops = []
        for picture in torch.cat((large, upsampled), dim=1):
            top, left = torch.randint(config.size - crop + 1, (2,), generator=generator).tolist()
            crops.append(picture[:, top : top + crop, left : left + crop])
        x0, low = torch.stack(crops).chunk(2, dim=1)
        return x0, {"low": low, "augmentation": augmentation}

    def _predict(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        x = torch.cat((x, condition["low"]), dim=1).contiguous(memory_format=torch.channels_last)
        return self.modules["unet"](x, timestep, augmentation=condition["augmentation"])


def resized(images: Any, size: int) -> Tensor:
    """uint8 (N, H, W, 3) → fp32 (N, 3, size, size) in [−1, 1], averaged down with antialiasing."""
    x = torch.from_numpy(images[:].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.clamp(-1, 1)


STAGES: dict[str, type[Stage]] = {"base": BaseStage, "super_resolution": SuperResolutionStage}
