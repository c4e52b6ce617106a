"""The reference Imagen of this package: the parts of its U-Nets; those of its T5 encoder are in `_reference_t5`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..models.efficient_unet import EfficientUNet
from ..models.imagen import Imagen
from ..models.layers import Attention, GroupNormSiLU, ResnetBlock, TextCondition, TextConditioning, resampled
from ..models.t5 import T5Encoder
from ..models.unet import UNet
from . import Integration
from ._fused import Fused, attention, group_norm_act, is_head_width, is_plain
from ._graphed import Prepare, prepared_step, prepared_text
from ._packed import PackedConv2d, PackedLinear, conv2d, linears
from ._reference_t5 import T5_FORMS
from ._skips import norm_act, parts
from ._text import of_text
from ._time import projected

# ---- Fused forms


class FusedResnetBlock(Fused, ResnetBlock):
    """Both group norms with what follows them, each in one op."""

    original = ResnetBlock
    ops = ("group_norm_act",)
    reads = {"norm1": nn.GroupNorm, "norm2": nn.GroupNorm}  # noqa: RUF012

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x, skip = parts(x, skip, self.norm1, None if self.resample else self.skip)
        h = group_norm_act(self.norm1, x, "silu") if skip is None else norm_act(self.norm1, x, skip, "silu")
        h = conv2d(self.conv1, resampled(h, self.resample))
        scale, shift = projected(self.modulation, embedding, "silu").chunk(2, dim=1)
        h = group_norm_act(self.norm2, h, "silu", scale=scale, shift=shift)
        shortcut = self.skip(resampled(x, self.resample)) if skip is None else conv2d(self.skip, x, more=skip)
        return conv2d(self.conv2, self.dropout(h), add=shortcut)


class FusedAttention(Fused, Attention):
    """The group norm, and attention to the text and the pixels where they are, each in one op."""

    original = Attention
    ops = ("group_norm_act", "attention")
    reads = {"norm": nn.GroupNorm}  # noqa: RUF012

    @classmethod
    def joined(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        assert isinstance(module, Attention)
        return () if module.to_kv is None else (module.to_q, module.to_kv)

    def forward(self, x: Tensor, text: TextCondition | None) -> Tensor:
        return x + self.attend(group_norm_act(self.norm, x, None), text)

    def attend(self, x: Tensor, text: TextCondition | None) -> Tensor:
        batch, channels, height, width = x.shape
        if not is_head_width(channels // self.heads):
            return super().attend(x, text)
        pixels = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        own_kv: Tensor | None = None
        if self.to_kv is None:
            q = self.to_q(pixels)
        else:
            q, own_kv = linears(self, (self.to_q, self.to_kv), pixels)
        q = self._split_heads(q)
        segments: list[tuple[Tensor | None, Tensor | None]] = []
        mask = None
        if self.to_text_kv is not None and text is not None:
            segments.append(self._of_text(text.tokens))
            mask = text.mask if self.to_kv is None else F.pad(text.mask, (0, height * width), value=True)
        if own_kv is not None:
            segments.append(self._keys_and_values(own_kv))
        (context_k, context_v), (k, v) = segments if len(segments) == 2 else ((None, None), *segments)
        assert k is not None and v is not None  # noqa: PT018
        h = attention(q, k, v, context_k=context_k, context_v=context_v, key_mask=mask)
        h = self.to_out(h.transpose(1, 2).reshape(batch, height * width, channels))
        return h.transpose(1, 2).reshape(batch, channels, height, width)

    def _of_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        assert self.to_text_kv is not None
        return self._keys_and_values(self.to_text_kv(tokens))

    def _keys_and_values(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, L, C / heads) each, parts of one projection (B, L, 2 C)."""
        k, v = both.chunk(2, dim=2)
        return self._split_heads(k), self._split_heads(v)


class TextKeepingAttention(FusedAttention):
    """The same, with keys and values of the text computed once for each text."""

    original = Attention
    caches_text = True

    def _of_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        compute = super()._of_text
        return of_text(self, "text", (self.to_text_kv,), (tokens,), lambda: compute(tokens))


class TextKeepingConditioning(Fused, TextConditioning):
    """What attention and the embedding of time get from the text, computed once for each text."""

    original = TextConditioning
    ops = ()
    caches_text = True

    def forward(self, text: Tensor, mask: Tensor) -> tuple[TextCondition, Tensor]:
        compute = super().forward
        return of_text(self, "text", (self,), (text, mask), lambda: compute(text, mask))


class FusedGroupNormSiLU(Fused, GroupNormSiLU):
    """Norm and activation in one op."""

    original = GroupNormSiLU
    ops = ("group_norm_act",)

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        plain = isinstance(module, GroupNormSiLU) and is_plain(module.weight, module.bias)
        return [] if plain else ["it runs as it is: its parameters are of a tensor subclass"]

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(x, self.weight, self.bias):
            return super().forward(x)
        return ops.group_norm_act(x, self.num_groups, self.weight, self.bias, activation="silu", eps=self.eps)


# ---- Whole objects


def _parts(obj: nn.Module) -> Mapping[str, nn.Module]:
    if not isinstance(obj, Imagen):
        return {"": obj}
    unets = {f"unets.{name}": unet for name, unet in obj.unets.items()}
    return {"text_encoder": obj.text_encoder, **unets}


def _runs(obj: nn.Module, inputs: Any) -> Iterator[Callable[[], object]]:
    """A cascade takes prompts, and draws them in one step a stage; a model takes the arguments of one call."""
    if inputs is None:
        for part in _parts(obj).values():
            if isinstance(part, UNet | EfficientUNet):
                yield partial(part, **_synthetic_inputs(part))
            elif isinstance(part, T5Encoder):
                yield partial(part, **_synthetic_text(part))
    elif isinstance(obj, Imagen):
        yield partial(obj.sample, inputs, steps=1, progress=False)
    elif isinstance(inputs, tuple):
        yield partial(obj, *inputs)
    elif isinstance(inputs, dict):
        yield partial(obj, **inputs)
    else:
        raise TypeError(
            "verify must be True, a tuple of positional arguments or a dict of keyword arguments of a call, "
            f"or prompts for a cascade; got {type(inputs).__name__}"
        )


def _synthetic_inputs(unet: UNet | EfficientUNet) -> dict[str, Tensor]:
    """Two random pictures, the smallest that keep 4 pixels or more a side everywhere; one with less text."""
    config, parameter = unet.config, next(unet.parameters())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(parameter)

    size = 4 * 2 ** len(config.multipliers)
    timestep = torch.tensor([20, 700], device=parameter.device)
    inputs = {"x": random(2, config.in_channels, size, size), "timestep": timestep}
    if isinstance(unet, EfficientUNet):
        inputs["augmentation"] = timestep.flip(0)
    if config.text_dim is not None:
        inputs["text"] = random(2, 7, config.text_dim)
        inputs["text_mask"] = torch.arange(7, device=parameter.device) < torch.tensor(
            [[7], [3]], device=parameter.device
        )
    return inputs


def _synthetic_text(encoder: T5Encoder) -> dict[str, Tensor]:
    """Two sentences of random tokens; one of them shorter."""
    device, generator = encoder.embedding.weight.device, torch.Generator().manual_seed(0)
    input_ids = torch.randint(encoder.config.vocab_size, (2, 21), generator=generator)
    mask = torch.arange(21) < torch.tensor([[21], [13]])
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def _graphed(part: nn.Module) -> Prepare | None:
    if isinstance(part, T5Encoder):
        return prepared_text
    return prepared_step if isinstance(part, UNet | EfficientUNet) else None


INTEGRATION = Integration(
    serves=(Imagen, UNet, EfficientUNet, T5Encoder),
    fused=(
        FusedResnetBlock,
        TextKeepingAttention,
        FusedAttention,
        TextKeepingConditioning,
        FusedGroupNormSiLU,
        *T5_FORMS,
        PackedLinear,
        PackedConv2d,
    ),
    parts=_parts,
    runs=_runs,
    graphed=_graphed,
)
