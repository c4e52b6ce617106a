"""A U-Net of diffusers in the manner of DeepFloyd IF's first stage: 114 M parameters, 64x64 pixels, 77 tokens of text.
Random weights.

Every call gets a new sample and new time steps, and the text stays, as in a pipeline's loop. The batch is that of
guidance: two for a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models import MEMORY_FORMATS, model_case
from ..registry import Case

OP = "model_if_unet"
BF16, FP32 = torch.bfloat16, torch.float32
SIZE, TOKENS, TEXT_WIDTH = 64, 77, 768
PARAMETERS = 114_000_000
FLOPS_PER_SAMPLE = 74_000_000_000  # of the convolutions and matrix products

CONFIG: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "block_out_channels": (128, 256, 384, 512),
    "layers_per_block": 2,
    "act_fn": "gelu",
    "attention_head_dim": 64,
    "addition_embed_type": "text",
    "cross_attention_dim": TEXT_WIDTH,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": TEXT_WIDTH,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
}


class UNet(nn.Module):
    """The U-Net as a function of tensors."""

    def __init__(self, config: dict[str, Any] = CONFIG) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.model = UNet2DConditionModel(**config)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states=text).sample


def build() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return UNet().eval()


def cases() -> Iterator[Case]:
    """All of them; the name is batch-dtype."""
    for dtype in (BF16, FP32):
        yield _case(2, dtype, tags={"headline"})
    for batch in (1, 4, 8):
        yield _case(batch, BF16)


def _case(batch: int, dtype: torch.dtype, tags: set[str] | None = None) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(batch, 3, SIZE, SIZE, generator=generator),
            "timestep": torch.randint(1000, (1,), generator=generator).expand(batch).contiguous(),
            "text": torch.randn(batch, TOKENS, TEXT_WIDTH, generator=generator),
        }

    return model_case(
        op=OP,
        name=f"{batch}x3x{SIZE}x{SIZE}",
        title=f"{batch}×3×{SIZE}×{SIZE}, {TOKENS} tokens",
        build=build,
        inputs=inputs,
        shape=(batch, 3, SIZE, SIZE),
        dtype=dtype,
        renewed=("sample", "timestep"),
        flops=FLOPS_PER_SAMPLE * batch,
        moved=PARAMETERS * dtype.itemsize,
        variants=MEMORY_FORMATS,
        tags=tags or (),
    )
