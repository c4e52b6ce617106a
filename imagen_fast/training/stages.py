"""What each kind of stage trains on: its modules, its batches and its loss.

A batch depends on nothing but the run's seed and the step, so that a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.schedules import squaredcos_cap_v2
from ..errors import ConfigError
from ..models.efficient_unet import EfficientUNet
from ..models.t5 import T5Encoder, Tokenizer
from ..models.unet import UNet
from .config import TrainConfig
from .emoji.dataset import EmojiDataset


class Batch(NamedTuple):
    """Clean pictures (B, 3, H, W) in [−1, 1], and what the model is told about them."""

    x0: Tensor
    timestep: Tensor  # (B,) int64
    noise: Tensor  # like x0
    condition: dict[str, Tensor]


class Stage(ABC):
    """Modules, batches and loss of one stage."""

    def __init__(self, config: TrainConfig, dataset: EmojiDataset) -> None:
        self.config, self.dataset = config, dataset
        self.device = _device(config.device)
        self.modules = self._build().to(self.device)

    @abstractmethod
    def _build(self) -> nn.ModuleDict:
        """The modules that are trained."""

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of a step, on its batch."""

    def _drawn(self, step: int) -> tuple[torch.Generator, list[int]]:
        """What a step draws from, and which pictures it draws first."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return generator, torch.randint(len(self.dataset), (self.config.batch_size,), generator=generator).tolist()


def _device(name: str) -> torch.device:
    """The device of that name, on which a tensor could be made; raises ConfigError if none could."""
    if name.partition(":")[0] == "meta":
        raise ConfigError(f"device {name!r} cannot be used: its tensors hold no data")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch raises all of them
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error


class Captions:
    """Captions of pictures as tokens, English and Chinese alike often."""

    def __init__(self, config: TrainConfig, dataset: EmojiDataset, tokenizer: Tokenizer | None) -> None:
        assert tokenizer is not None, "a text encoder with ByT5's vocabulary reads bytes"
        self.dataset, self.tokenizer, self.max_length = dataset, tokenizer, config.max_text_length

    def __call__(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """input_ids and mask (B, L) of one caption for each picture."""
        captions = []
        for index in indices:
            language = ("en", "zh")[int(torch.randint(2, (), generator=generator))]
            choices = self.dataset.captions(index, "train", language)
            captions.append(choices[int(torch.randint(len(choices), (), generator=generator))])
        return self.tokenizer(captions, max_length=self.max_length)


class TextStage(Stage):
    """Captions to the picture they name, a start for a text encoder where no pretrained one can be had."""

    def _build(self) -> nn.ModuleDict:
        assert self.config.text_encoder is not None
        encoder = T5Encoder(self.config.text_encoder)
        self.captions = Captions(self.config, self.dataset, encoder.tokenizer)
        head = nn.Linear(self.config.text_encoder.d_model, len(self.dataset))
        return nn.ModuleDict({"text_encoder": encoder, "head": head})

    def loss(self, step: int) -> Tensor:
        """Cross entropy of naming the picture, from the mean of the features."""
        generator, indices = self._drawn(step)
        input_ids, mask = (tensor.to(self.device) for tensor in self.captions(indices, generator))
        features = self.modules["text_encoder"](input_ids, mask)
        weights = mask[:, :, None].to(features.dtype)
        logits = self.modules["head"]((features * weights).sum(1) / weights.sum(1))
        return F.cross_entropy(logits.float(), torch.tensor(indices, device=self.device))


class DiffusionStage(Stage):
    """What the base and super-resolution have in common: noise in, a prediction out."""

    def __init__(self, config: TrainConfig, dataset: EmojiDataset) -> None:
        self.alphas_cumprod = squaredcos_cap_v2(config.train_timesteps).float()
        super().__init__(config, dataset)

    @abstractmethod
    def _pictures(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean pictures (B, 3, H, W) in [−1, 1], and what the model is told about them."""

    @abstractmethod
    def _predict(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The model's output for noisy pictures x."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the stage's device."""
        generator, indices = self._drawn(step)
        x0, condition = self._pictures(indices, generator)
        # One timestep from each of B equal strata: less variance in the loss than B independent ones.
        count = len(indices)
        offset = torch.rand(count, generator=generator)
        timestep = ((torch.arange(count) + offset) / count * self.config.train_timesteps).long()
        noise = torch.randn(x0.shape, generator=generator)
        moved = {name: tensor.to(self.device) for name, tensor in condition.items()}
        return Batch(x0.to(self.device), timestep.to(self.device), noise.to(self.device), moved)

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the prediction."""
        batch = self.batch(step)
        alpha = self.alphas_cumprod.to(self.device)[batch.timestep].view(-1, 1, 1, 1)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * batch.x0 + sigma * batch.noise
        targets = {"epsilon": batch.noise, "x0": batch.x0, "v": signal * batch.noise - sigma * batch.x0}
        output = self._predict(noisy.contiguous(memory_format=torch.channels_last), batch.timestep, batch.condition)
        return F.mse_loss(output.float(), targets[self.config.prediction])


class BaseStage(DiffusionStage):
    """Captions to small pictures; the text encoder is trained along."""

    def _build(self) -> nn.ModuleDict:
        assert self.config.text_encoder is not None
        assert self.config.unet is not None
        encoder = T5Encoder(self.config.text_encoder)
        self.captions = Captions(self.config, self.dataset, encoder.tokenizer)
        self.small = resized(self.dataset.images, self.config.size)
        encoder.requires_grad_(self.config.train_text_encoder)
        return nn.ModuleDict({"text_encoder": encoder, "unet": UNet(self.config.unet)})

    def _pictures(self, indices: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        input_ids, mask = self.captions(indices, generator)
        dropped = torch.rand(len(indices), generator=generator) < self.config.text_dropout
        return self.small[indices], {"input_ids": input_ids, "mask": mask, "dropped": dropped}

    def _predict(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        text = self.modules["text_encoder"](condition["input_ids"], condition["mask"])
        return self.modules["unet"](x, timestep, text, condition["mask"] & ~condition["dropped"][:, None])


class SuperResolutionStage(DiffusionStage):
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


STAGES: dict[str, type[Stage]] = {"text": TextStage, "base": BaseStage, "super_resolution": SuperResolutionStage}
