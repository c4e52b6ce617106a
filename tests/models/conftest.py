"""A tiny cascade with random weights."""

from __future__ import annotations

import pytest
import torch

from imagen_fast.models import EfficientUNetConfig, Imagen, ImagenConfig, StageConfig, T5Config, T5Encoder, UNetConfig

TEXT = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)


def tiny_imagen(seed: int = 0, *, super_resolution_text: bool = False) -> Imagen:
    """8² and 16² pictures; every weight random, so that every input matters."""
    text_dim = 16 if super_resolution_text else None
    levels = (1,) if super_resolution_text else ()
    unet = UNetConfig(16, (1, 2), 1, (1,), 8, text_dim=16, groups=4)
    efficient = EfficientUNetConfig(16, (1, 2), (1, 1), (), levels, heads=4, text_dim=text_dim, groups=4)
    config = ImagenConfig(
        stages=(
            StageConfig("base", 8, unet=unet, steps=3, guidance=2.0),
            StageConfig("super_16", 16, efficient_unet=efficient, solver="ddim", steps=2, augmentation=0.1),
        ),
        max_text_length=24,
    )
    model = Imagen(config, T5Encoder(TEXT))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * 1.5 / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


@pytest.fixture(scope="module")
def imagen() -> Imagen:
    return tiny_imagen()
