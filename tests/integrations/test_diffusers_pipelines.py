"""DeepFloyd IF's pipelines, with small random weights: the same pictures accelerated, and the same bits afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import imagen_fast

from .unet_configs import IF

diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

SUPER_RESOLUTION = {
    **IF,
    "sample_size": 16,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "mid_block_only_cross_attention": True,
    "only_cross_attention": True,
    "resnet_out_scale_factor": 1.414,
    "resnet_skip_time_act": True,
}
NAMES = [
    "IFPipeline",
    "IFImg2ImgPipeline",
    "IFInpaintingPipeline",
    "IFSuperResolutionPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingSuperResolutionPipeline",
]


def build(name: str) -> Any:
    torch.manual_seed(0)
    larger = "SuperResolution" in name
    scheduler: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.0 if larger else 1.5,
        "variance_type": "learned_range",
    }
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**(SUPER_RESOLUTION if larger else IF)).eval(),
        "scheduler": diffusers.DDPMScheduler(**scheduler),
    }
    if larger:
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    absent = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    pipe = getattr(diffusers, name)(**parts, **dict.fromkeys(absent), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, seed: int = 1) -> Tensor:
    """Three steps with guidance, from embeddings of a prompt and of none."""
    name = type(pipe).__name__
    arguments: dict[str, Any] = {
        "prompt_embeds": random(1, 9, 24, seed=seed),
        "negative_prompt_embeds": random(1, 9, 24, seed=seed + 1),
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "pt",
    }
    if name != "IFPipeline":
        side = 16 if "SuperResolution" in name and name != "IFSuperResolutionPipeline" else 8
        arguments["image"] = random(1, 3, side, side).clamp(-1, 1)
    if name == "IFPipeline":
        arguments |= {"height": 8, "width": 8}
    if name.endswith("SuperResolutionPipeline"):
        arguments["noise_level"] = 50
        if name == "IFSuperResolutionPipeline":
            arguments |= {"height": 16, "width": 16}
        else:
            arguments["original_image"] = arguments["image"]
            arguments["image"] = random(1, 3, 8, 8).clamp(-1, 1)
    if "Inpainting" in name:
        side = 16 if "SuperResolution" in name else 8
        arguments["mask_image"] = (random(1, 1, side, side, seed=3) > 0).float()
    if "Img2Img" in name or "Inpainting" in name:
        arguments["strength"] = 0.8
        arguments["num_inference_steps"] = 4
    return torch.as_tensor(pipe(**arguments).images)


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline(name: str) -> None:
    pipe = build(name)
    expected = draw(pipe)
    report = imagen_fast.accelerate(pipe)
    assert {swapped.name for swapped in report.swapped} >= {"scheduler", "unet.conv_in"}
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-3, atol=1e-3)
    other = draw(pipe, seed=7)
    assert not torch.allclose(other, expected, atol=0.05)
    imagen_fast.restore(pipe)
    assert torch.equal(draw(pipe), expected)
    torch.testing.assert_close(draw(pipe, seed=7), other, rtol=1e-3, atol=1e-3)


def hook(pipe: Any) -> Any:
    block = pipe.unet.mid_block.resnets[0]
    block.conv1.register_forward_hook(lambda module, args, output: 1.2 * output)
    pipe.unet.mid_block.attentions[0].register_forward_pre_hook(lambda module, args: (1.1 * args[0], *args[1:]))
    return pipe


def adapt(pipe: Any) -> Any:
    peft = pytest.importorskip("peft", reason="LoRA layers are peft's")
    targets = ["to_q", "add_k_proj", "add_v_proj", "conv2", "to_out.0", "time_emb_proj"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "one")
    with torch.no_grad():
        for i, (name, parameter) in enumerate(pipe.unet.named_parameters()):
            if "lora" in name:
                parameter.copy_(0.2 * random(*parameter.shape, seed=i))
    return pipe


def offload(pipe: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="offloading is Hugging Face accelerate's")
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    return pipe


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", [hook, adapt, offload, copy.deepcopy])
def test_what_happens_in_between(change: Callable[[Any], Any], order: str) -> None:
    """accelerate, run, change, run, restore, run: the bits of a pipeline that was never touched but for the change."""
    plain, pipe = build("IFPipeline"), build("IFPipeline")
    before = draw(plain)
    plain = change(plain)
    expected = draw(plain)
    if order == "before":
        pipe = change(pipe)
    imagen_fast.accelerate(pipe)
    draw(pipe)
    if order == "after":
        pipe = change(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-3, atol=1e-3)
    imagen_fast.accelerate(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-3, atol=1e-3)
    imagen_fast.restore(pipe)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(expected, before) == (change not in (hook, adapt))


def test_in_bfloat16_beside_weights_of_float32() -> None:
    pipe = build("IFPipeline")
    expected = draw(pipe)
    imagen_fast.accelerate(pipe, dtype=torch.bfloat16, memory_format=torch.channels_last)
    picture = draw(pipe)
    assert picture.dtype == torch.float32
    assert not torch.equal(picture, expected)
    assert (picture - expected).abs().mean() < 0.05
    imagen_fast.restore(pipe)
    assert torch.equal(draw(pipe), expected)
