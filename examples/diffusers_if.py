"""A DeepFloyd IF pipeline of diffusers, accelerated: the same picture, sooner.

    python examples/diffusers_if.py                              a small pipeline of random weights
    python examples/diffusers_if.py --model DIR --dtype bf16     a pipeline that was saved or downloaded

Needs diffusers and transformers. With random weights the picture is noise; what counts is that it is the same noise.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

import imagen_fast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def small_pipeline() -> IFPipeline:
    """The blocks of IF's first stage and a byte-level T5, both small and with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        act_fn="gelu",
        attention_head_dim=32,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        cross_attention_dim=64,
        cross_attention_norm="group_norm",
        encoder_hid_dim=48,
        resnet_time_scale_shift="scale_shift",
        time_embedding_act_fn="gelu",
    )
    config = T5Config(vocab_size=384, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3)
    config.feed_forward_proj, config.dense_act_fn, config.is_gated_act = "gated-gelu", "gelu_new", True
    return IFPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=T5EncoderModel(config).eval(),
        unet=unet.eval(),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def draw(pipeline: IFPipeline, prompt: str, steps: int) -> tuple[torch.Tensor, float]:
    """The picture (1, 3, H, W) in [-1, 1], and the seconds it took."""
    start = time.perf_counter()
    pictures = pipeline(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        clean_caption=False,
    ).images
    return pictures, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the directory of a saved pipeline (default: a small random one)")
    parser.add_argument("--prompt", default="a cat in the snow, 雪中的猫")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args()

    pipeline = IFPipeline.from_pretrained(options.model) if options.model else small_pipeline()
    pipeline.to(dtype=DTYPES[options.dtype])
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)

    draw(pipeline, options.prompt, 1)
    plain, plain_seconds = draw(pipeline, options.prompt, options.steps)

    print(imagen_fast.accelerate(pipeline))
    draw(pipeline, options.prompt, 1)  # weights are packed at the first call
    fast, fast_seconds = draw(pipeline, options.prompt, options.steps)

    imagen_fast.restore(pipeline)
    back, _ = draw(pipeline, options.prompt, options.steps)

    print(f"\nplain {plain_seconds:.2f} s, accelerated {fast_seconds:.2f} s: {plain_seconds / fast_seconds:.2f} times")
    print(f"largest difference between the pictures: {(plain - fast).abs().max().item():.1e}")
    print(f"restored, bit for bit the same: {torch.equal(plain, back)}")


if __name__ == "__main__":
    main()
