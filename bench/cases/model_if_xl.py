"""DeepFloyd IF-I-XL's U-Net: 4.3 B parameters, 64x64 pixels, 77 tokens of T5-XXL. Random weights, on a GPU alone.

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
from .model_if_unet import CONFIG as SMALL
from .model_if_unet import SIZE, TOKENS, UNet

OP = "model_if_xl"
TEXT_WIDTH = 4096
PARAMETERS = 4_300_000_000
FLOPS_PER_SAMPLE = 2_880_000_000_000  # of the convolutions and matrix products

CONFIG: dict[str, Any] = SMALL | {
    "block_out_channels": (704, 1408, 2112, 2816),
    "layers_per_block": 3,
    "cross_attention_dim": 2816,
    "encoder_hid_dim": TEXT_WIDTH,
}


def build() -> nn.Module:
    """The same weights every time, made on the device; in bfloat16, since five processes share its memory."""
    with torch.device("meta"):
        model = UNet(CONFIG).to(torch.bfloat16)
    model.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
                elif name == "weight":
                    parameter.fill_(1)  # of a norm
                else:
                    parameter.zero_()
    return model.eval()


def cases() -> Iterator[Case]:
    """All of them; the name is batch-dtype."""
    for batch in (2, 8):
        yield _case(batch)


def _case(batch: int) -> Case:
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
        dtype=torch.bfloat16,
        renewed=("sample", "timestep"),
        flops=FLOPS_PER_SAMPLE * batch,
        moved=PARAMETERS * 2,
        variants=MEMORY_FORMATS,
        without=("openvino",),
        needs_gpu="4.3 B parameters",
    )
