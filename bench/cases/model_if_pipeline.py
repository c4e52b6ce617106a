"""A whole pipeline of diffusers in the manner of DeepFloyd IF's first stage, small and with random weights: sentences
through a byte-level T5 encoder and guided steps of DDPM with a learned variance and dynamic thresholding, to pictures
of 64x64 pixels.

Every call gets new sentences of one length, padded to IF's 77 tokens, and new generators. Compilers and runtimes get
the encoder and the U-Net, and the pipeline around them is as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import imagen_fast

from ..models import MEMORY_FORMATS, model_case, random_sentences, sentences
from ..registry import Case
from .model_if_unet import CONFIG as LARGER_UNET
from .model_if_unet import SIZE

OP = "model_if_pipeline"
BF16, FP32 = torch.bfloat16, torch.float32
LETTERS, TEXT_WIDTH = 24, 384
STEPS = 4  # IF's own number is 100
GUIDANCE = 2.0  # IF's own is 7, which makes of these random weights' rounding in bfloat16 a tenth of the picture
PARTS = ("text_encoder", "unet")
PARAMETERS = 31_000_000
FLOPS_PER_SAMPLE = 111_000_000_000  # of the convolutions and matrix products

UNET: dict[str, Any] = LARGER_UNET | {
    "block_out_channels": (64, 128, 192, 256),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "encoder_hid_dim": TEXT_WIDTH,
}
TEXT: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": TEXT_WIDTH,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 6,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


class Pipeline(nn.Module):
    """The pipeline as a function of tensors.

    Args:
        noise: dtype in which the noise is drawn when the models are in float64. PyTorch's generators give other numbers
            in another dtype, and the truth must begin and go on with those of the case.
        unet, text: configurations.
        steps: of the scheduler.
    """

    def __init__(
        self,
        noise: torch.dtype,
        unet: dict[str, Any] = UNET,
        text: dict[str, Any] = TEXT,
        steps: int = STEPS,
    ) -> None:
        super().__init__()
        from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        self.noise, self.steps = noise, steps
        self.unet = UNet2DConditionModel(**unet)
        self.text_encoder = T5EncoderModel(T5Config(**text))
        self.pipeline = IFPipeline(
            tokenizer=ByT5Tokenizer(),
            text_encoder=self.text_encoder,
            unet=self.unet,
            scheduler=DDPMScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def forward(self, letters: Tensor, seeds: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], from `letters` (B, L) and one of the `seeds` (B,) each."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        with _NoiseOf(self.noise) if self.unet.dtype == torch.float64 else nullcontext():
            return self.pipeline(
                sentences(letters),
                generator=generators,
                num_inference_steps=self.steps,
                guidance_scale=GUIDANCE,
                output_type="pt",
                clean_caption=False,
            ).images


class _NoiseOf(TorchFunctionMode):
    """`torch.randn` draws in another dtype than it is asked for, and casts."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return func(*args, **{**kwargs, "dtype": self.dtype}).to(kwargs["dtype"])
        return func(*args, **kwargs)


def build(noise: torch.dtype) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return Pipeline(noise).eval()


def cases() -> Iterator[Case]:
    """All of them; the name is batch-dtype."""
    for dtype in (BF16, FP32):
        yield _case(1, dtype, tags={"headline"})
    for batch in (2, 4, 8):
        yield _case(batch, BF16)


def _case(batch: int, dtype: torch.dtype, tags: set[str] | None = None) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "letters": random_sentences(generator, batch, LETTERS),
            "seeds": torch.randint(2**31, (batch,), generator=generator),
        }

    return model_case(
        op=OP,
        name=f"{batch}x3x{SIZE}x{SIZE}",
        title=f"{batch}×3×{SIZE}×{SIZE}, {STEPS} steps",
        build=lambda: build(dtype),
        inputs=inputs,
        shape=(batch, 3, SIZE, SIZE),
        dtype=dtype,
        renewed=("letters", "seeds"),
        flops=FLOPS_PER_SAMPLE * batch,
        moved=PARAMETERS * dtype.itemsize,
        variants=MEMORY_FORMATS,
        parts=PARTS,
        accelerate=lambda model: imagen_fast.accelerate(model.pipeline),
        tags=tags or (),
    )
