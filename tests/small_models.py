"""Small reference models with random weights, and inputs for them, for the tests of `accelerate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.models import (
    EfficientUNet,
    EfficientUNetConfig,
    Imagen,
    ImagenConfig,
    StageConfig,
    T5Config,
    T5Encoder,
    UNet,
    UNetConfig,
)
from imagen_fast.models.t5 import ByteTokenizer

UNET = UNetConfig(16, (1, 2), 1, (1,), 8, text_dim=16, groups=4)
EFFICIENT_UNET = EfficientUNetConfig(16, (1, 2), (1, 1), (1,), (1,), heads=4, text_dim=16, groups=4)
BLOCK = "down.0.resnet"  # of the base U-Net


def randomized(model: nn.Module) -> nn.Module:
    """Every weight random, also those that start at zero, so that every module changes the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def unet() -> UNet:
    return randomized(UNet(UNET))


def efficient_unet() -> EfficientUNet:
    return randomized(EfficientUNet(EFFICIENT_UNET))


def imagen() -> Imagen:
    text = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    stages = (
        StageConfig("base", 8, unet=UNET, steps=2, guidance=2.0),
        StageConfig("super", 16, efficient_unet=EFFICIENT_UNET, steps=2),
    )
    return randomized(Imagen(ImagenConfig(stages, max_text_length=24), T5Encoder(text, ByteTokenizer()))).eval()


def inputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One prompt with text, one without."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.config.in_channels, 16, 16, generator=generator).to(dtype)
    text = torch.randn(2, 5, 16, generator=generator).to(dtype)
    mask = torch.tensor([[True] * 4 + [False], [False] * 5])
    found = {"x": x, "timestep": torch.tensor([10, 900]), "text": text, "text_mask": mask}
    return found | ({"augmentation": torch.tensor([5, 300])} if isinstance(model, EfficientUNet) else {})


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model))


def accelerated(model: nn.Module) -> nn.Module:
    imagen_fast.accelerate(model)
    return model
