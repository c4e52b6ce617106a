"""The shipped cascade: its base U-Net at 32x32 pixels, and its byte-level T5 encoder.

Every call of the U-Net gets a new sample and new time steps, and the text stays; every call of the encoder gets new
bytes. Small models: what a call costs besides arithmetic shows here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...models import Imagen
from ..models import MEMORY_FORMATS, model_case
from ..registry import Case

OP = "model_emoji"
BF16, FP32 = torch.bfloat16, torch.float32
SIZE, TOKENS, TEXT_WIDTH = 32, 24, 256
UNET_PARAMETERS, UNET_FLOPS_PER_SAMPLE = 5_160_000, 1_660_000_000  # of the convolutions and matrix products
TEXT_LAYERS = 3
TEXT_PARAMETERS = TEXT_LAYERS * (4 * 256 * 256 + 3 * 256 * 512)  # of the blocks' matrices


class UNet(nn.Module):
    """The base U-Net as a function of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Imagen.from_pretrained("emoji").unets["base"]

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return self.model(sample, timestep, text=text, text_mask=text_mask)


class Encoder(nn.Module):
    """The text encoder as a function of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Imagen.from_pretrained("emoji").text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask)


def cases() -> Iterator[Case]:
    """All of them; the name is part-batch-sizes-dtype."""
    for dtype in (BF16, FP32):
        yield _unet(2, dtype, tags={"headline"})
        yield _encoder(2, dtype, tags={"headline"})
    yield _unet(8, BF16)


def _lengths(batch: int) -> Tensor:
    """(B, 1): every second sentence is half as long."""
    return torch.tensor([[TOKENS], [TOKENS // 2]] * ((batch + 1) // 2))[:batch]


def _unet(batch: int, dtype: torch.dtype, tags: set[str] | None = None) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(batch, 3, SIZE, SIZE, generator=generator),
            "timestep": torch.randint(1000, (batch,), generator=generator),
            "text": torch.randn(batch, TOKENS, TEXT_WIDTH, generator=generator),
            "text_mask": torch.arange(TOKENS) < _lengths(batch),
        }

    return model_case(
        op=OP,
        name=f"unet-{batch}x3x{SIZE}x{SIZE}",
        title=f"base U-Net, {batch}×3×{SIZE}×{SIZE}, {TOKENS} bytes",
        build=lambda: UNet().eval().float(),
        inputs=inputs,
        shape=(batch, 3, SIZE, SIZE),
        dtype=dtype,
        renewed=("sample", "timestep"),
        flops=UNET_FLOPS_PER_SAMPLE * batch,
        moved=UNET_PARAMETERS * dtype.itemsize,
        variants=MEMORY_FORMATS,
        tags=tags or (),
    )


def _encoder(batch: int, dtype: torch.dtype, tags: set[str] | None = None) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_ids": torch.randint(3, 259, (batch, TOKENS), generator=generator),
            "attention_mask": torch.arange(TOKENS) < _lengths(batch),
        }

    return model_case(
        op=OP,
        name=f"text-{batch}x{TOKENS}",
        title=f"T5 encoder, {batch}×{TOKENS} bytes",
        build=lambda: Encoder().eval().float(),
        inputs=inputs,
        shape=(batch, TOKENS),
        dtype=dtype,
        renewed=("input_ids",),
        flops=2 * batch * TOKENS * (TEXT_PARAMETERS + 2 * TEXT_LAYERS * TOKENS * TEXT_WIDTH),
        moved=TEXT_PARAMETERS * dtype.itemsize,
        tags=tags or (),
    )
