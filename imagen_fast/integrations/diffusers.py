"""diffusers: U-Nets (DeepFloyd IF's, Stable Diffusion's and others of the same blocks), schedulers and pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from . import Integration
from ._diffusers_blocks import (
    FusedAttention,
    FusedCrossAttnUpBlock2D,
    FusedGEGLU,
    FusedResnetBlock2D,
    FusedResnetUpsampleBlock2D,
    FusedSimpleCrossAttnUpBlock2D,
    FusedUpBlock2D,
    TextKeepingAttention,
    TextKeepingPooling,
)
from ._diffusers_schedulers import FUSED_STEPS
from ._graphed import Prepare, prepared_step
from ._packed import PackedConv2d, PackedLinear
from ._text import TextLinear


def _parts(obj: Any) -> Mapping[str, Any]:
    """A model or a scheduler is one piece; of a pipeline, its models and schedulers."""
    if isinstance(obj, nn.Module | SchedulerMixin):
        return {"": obj}
    return {name: part for name, part in obj.components.items() if isinstance(part, nn.Module | SchedulerMixin)}


def _runs(obj: Any, inputs: Any) -> Iterator[Callable[[], object]]:
    """A pipeline takes the keyword arguments of one call; a model the arguments of one call, or synthetic ones."""
    if isinstance(inputs, Mapping):
        yield partial(obj, **inputs)
    elif isinstance(inputs, tuple):
        yield partial(obj, *inputs)
    elif inputs is None:
        unets: list[Any] = [part for part in _parts(obj).values() if isinstance(part, UNet2DConditionModel)]
        for unet in unets:
            yield partial(unet, **_synthetic_inputs(unet))
    else:
        raise TypeError(
            "verify must be True, a tuple of positional arguments or a dict of keyword arguments of a call; "
            f"got {type(inputs).__name__}"
        )


def _synthetic_labels(unet: Any, random: Callable[..., Tensor]) -> Tensor | None:
    config = unet.config
    if config.class_embed_type == "identity":
        return random(2, config.time_embedding_dim or 4 * config.block_out_channels[0])
    if config.class_embed_type in ("projection", "simple_projection"):
        return random(2, config.projection_class_embeddings_input_dim)
    if config.class_embed_type == "timestep":
        return torch.tensor([0, 1], device=unet.device)
    if config.num_class_embeds is not None:
        return torch.tensor([0, config.num_class_embeds - 1], device=unet.device)
    return None


def _synthetic_inputs(unet: Any) -> dict[str, Any]:
    """Two random pictures, the smallest that keep 4 pixels a side everywhere, with a text of 7 tokens."""
    config = unet.config
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    size = 4 * 2 ** (len(config.block_out_channels) - 1)
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    inputs: dict[str, Any] = {
        "sample": random(2, config.in_channels, size, size),
        "timestep": torch.tensor([20, 700], device=unet.device),
        "encoder_hidden_states": random(2, 7, width),
    }
    labels = _synthetic_labels(unet, random)
    if labels is not None:
        inputs["class_labels"] = labels
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(2, pooled), "time_ids": random(2, 6)}
    elif config.addition_embed_type not in (None, "text"):
        raise ValueError(
            f"verify=True has no inputs for a U-Net with addition_embed_type {config.addition_embed_type!r}; "
            "give the arguments of a call: verify={...}"
        )
    return inputs


def _graphed(part: Any) -> Prepare | None:
    return prepared_step if isinstance(part, UNet2DConditionModel) else None


INTEGRATION = Integration(
    serves=(DiffusionPipeline, ModelMixin, SchedulerMixin),
    fused=(
        FusedResnetBlock2D,
        FusedUpBlock2D,
        FusedResnetUpsampleBlock2D,
        FusedCrossAttnUpBlock2D,
        FusedSimpleCrossAttnUpBlock2D,
        TextKeepingAttention,
        FusedAttention,
        TextKeepingPooling,
        FusedGEGLU,
        TextLinear,
        PackedLinear,
        PackedConv2d,
        *FUSED_STEPS,
    ),
    parts=_parts,
    runs=_runs,
    graphed=_graphed,
)
