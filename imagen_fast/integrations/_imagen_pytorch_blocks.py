"""Blocks of imagen-pytorch's U-Nets in fused form, of 1.26 (group norms) and of 2.0 and later (channel RMS norms)."""

from __future__ import annotations

from typing import Any

import imagen_pytorch.imagen_pytorch as library
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ._fused import Fused, activation_name, attention, group_norm_act, is_head_width, is_plain, why_called

_NORM = "norm" if hasattr(library, "ChanRMSNorm") else "groupnorm"
_NORM_CLASS: type[nn.Module] = getattr(library, "ChanRMSNorm", nn.GroupNorm)
_NORM_PARAMETERS = ("weight", "bias") if _NORM_CLASS is nn.GroupNorm else ("gamma",)


class FusedBlock(Fused, library.Block):
    """The norm, scale and shift, and the activation in one op."""

    original = library.Block
    ops = ("group_norm_act" if _NORM_CLASS is nn.GroupNorm else "channel_rms_norm_act",)

    activation: Any  # these are of the library's class
    project: Any

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        found, norm = [], getattr(module, _NORM)
        reason = None if type(norm) is library.Identity else why_called(norm, _NORM_CLASS, _NORM_PARAMETERS)
        if reason is not None:
            found.append(f"{_NORM} ({type(norm).__name__}) is called as it is: {reason}")
        if activation_name(module.activation) is None:  # type: ignore[arg-type]
            found.append(f"activation ({type(module.activation).__name__}) is called as it is: the op has none such")
        return found

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        norm, activation = getattr(self, _NORM), activation_name(self.activation)
        scale, shift = (None, None) if scale_shift is None else scale_shift
        fits = x.dim() == 4 and is_plain(x, scale, shift) and activation is not None
        if not fits or not all(_is_per_sample(value, x) for value in (scale, shift)):
            return super().forward(x, scale_shift)
        if why_called(norm, _NORM_CLASS, _NORM_PARAMETERS) is not None:
            return super().forward(x, scale_shift)
        scale, shift = (None if value is None else value.flatten(1) for value in (scale, shift))
        if _NORM_CLASS is nn.GroupNorm:
            h = group_norm_act(norm, x, activation, scale=scale, shift=shift)
        else:
            h = ops.channel_rms_norm_act(x, norm.gamma.flatten(), scale=scale, shift=shift, activation=activation)
        return self.project(h)


def _is_per_sample(value: Tensor | None, x: Tensor) -> bool:
    """Whether it is (B, C, 1, 1), of a dtype that would not widen x."""
    return value is None or (value.shape == (*x.shape[:2], 1, 1) and value.dtype == x.dtype)


class FusedResnetBlock(Fused, library.ResnetBlock):
    """Without the product with 1 where there is no global context."""

    original = library.ResnetBlock
    ops = ()

    time_mlp: Any  # these are of the library's class
    cross_attn: Any
    block1: Any
    block2: Any
    gca: Any
    res_conv: Any

    def forward(self, x: Tensor, time_emb: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        if type(self.gca) is not library.Always or self.gca.val != 1:
            return super().forward(x, time_emb, cond)
        scale_shift = None
        if self.time_mlp is not None and time_emb is not None:
            scale_shift = self.time_mlp(time_emb)[:, :, None, None].chunk(2, dim=1)
        h = self.block1(x)
        if self.cross_attn is not None:
            assert cond is not None
            height, width = h.shape[2:]
            pixels = h.flatten(2).transpose(1, 2)  # [B, H * W, C]
            pixels = self.cross_attn(pixels, context=cond) + pixels
            h = pixels.transpose(1, 2).unflatten(2, (height, width))
        return self.block2(h, scale_shift=scale_shift) + self.res_conv(x)


class FusedLayerNorm(Fused, library.LayerNorm):
    """PyTorch's own layer norm where the norm is over the last dimension."""

    original = library.LayerNorm
    ops = ()

    dim: int  # these are of the library's class
    stable: bool
    g: nn.Parameter

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        return [] if module.dim == -1 else ["it runs as it is: its norm is over channels that are not last"]

    def forward(self, x: Tensor) -> Tensor:
        if self.dim != -1 or not is_plain(x, self.g):
            return super().forward(x)
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        return F.layer_norm(x, self.g.shape, self.g.to(x.dtype), None, eps).to(x.dtype)


# ---- Attention, with keys in the order [text; null; pixels], [null; text], [text; latents]


class _Attention(Fused):
    """Mixin: normalised queries and keys, null keys and text in place, in one op."""

    ops = ("attention",)

    scale: float  # these are of the library's classes
    heads: int
    q_scale: nn.Parameter
    k_scale: nn.Parameter
    null_kv: nn.Parameter
    norm: Any
    norm_context: Any
    norm_latents: Any
    to_q: Any
    to_kv: Any
    to_context: Any
    to_out: Any

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        width = len(module.q_scale)  # type: ignore[arg-type]
        return [] if is_head_width(width) else [f"it runs as it is: heads are {width} wide, and the op has none such"]

    def _serves(self, *tensors: Tensor | None) -> bool:
        return is_head_width(len(self.q_scale)) and is_plain(*tensors, self.q_scale, self.k_scale)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * width) -> (B, heads, N, width), in place."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        """(B, heads, N, width) -> (B, N, dim)"""
        scales = {"q_scale": self.q_scale, "k_scale": self.k_scale}
        out = attention(q, k, v, scale=float(self.scale), **scales, **arguments)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _null(null_kv: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The null key and value (2, width) beside keys (B, heads, N, width): (B, heads, 1, width) each, one in memory."""
    key, value = null_kv.to(like.dtype).unbind(0)
    shape = (*like.shape[:2], 1, like.shape[3])
    return key.expand(shape), value.expand(shape)


class FusedAttention(_Attention, library.Attention):
    """Self-attention: one head of keys for all heads of queries, to the text, a null key and the pixels."""

    original = library.Attention

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, attn_bias: Tensor | None = None
    ) -> Tensor:
        if mask is not None or attn_bias is not None or not self._serves(x, context, self.null_kv):
            return super().forward(x, context, mask, attn_bias)
        x = self.norm(x)
        q = self._split_heads(self.to_q(x))
        k, v = self.to_kv(x)[:, None].chunk(2, dim=-1)  # [B, 1, N, width]
        context_k, context_v = _null(self.null_kv, k)
        if context is not None:
            assert self.to_context is not None
            text_k, text_v = self.to_context(context)[:, None].to(k.dtype).chunk(2, dim=-1)
            context_k, context_v = torch.cat([text_k, context_k], dim=2), torch.cat([text_v, context_v], dim=2)
        return self._attend(q, k, v, context_k=context_k, context_v=context_v)


class FusedCrossAttention(_Attention, library.CrossAttention):
    """Attention to a null key and the text."""

    original = library.CrossAttention

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self._serves(x, context, self.null_kv) or (mask is not None and mask.dtype != torch.bool):
            return super().forward(x, context, mask)
        x, context = self.norm(x), self.norm_context(context)
        q = self._split_heads(self.to_q(x))
        k, v = map(self._split_heads, self.to_kv(context).chunk(2, dim=-1))
        null_k, null_v = _null(self.null_kv, k)
        key_mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return self._attend(q, k, v, context_k=null_k, context_v=null_v, key_mask=key_mask)


class FusedPerceiverAttention(_Attention, library.PerceiverAttention):
    """Attention of latents to the text and themselves."""

    original = library.PerceiverAttention

    def forward(self, x: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self._serves(x, latents) or (mask is not None and mask.dtype != torch.bool):
            return super().forward(x, latents, mask)
        x, latents = self.norm(x), self.norm_latents(latents)
        q = self._split_heads(self.to_q(latents))
        text_k, text_v = map(self._split_heads, self.to_kv(x).chunk(2, dim=-1))
        k, v = map(self._split_heads, self.to_kv(latents).chunk(2, dim=-1))
        key_mask = None if mask is None else F.pad(mask, (0, latents.shape[-2]), value=True)
        return self._attend(q, k, v, context_k=text_k, context_v=text_v, key_mask=key_mask)


class FusedSinusoids(Fused, library.LearnedSinusoidalPosEmb):
    """Sines and cosines of a time, which 16 bits are too few for."""

    original = library.LearnedSinusoidalPosEmb
    ops = ()
    keeps_dtype = ("weights",)


class FusedEntrance(Fused, nn.Sequential):
    """Layers that get float32 from the library (a time, a mean) also where their weights are converted to 16 bits."""

    original = nn.Sequential
    ops = ()
    names = ("to_time_hiddens", "to_lowres_time_hiddens", "to_latents_from_mean_pooled_seq")

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            weight = layer._parameters.get("weight")
            input = layer(input if weight is None else input.to(weight.dtype))
        return input


BLOCKS = (
    FusedBlock,
    FusedResnetBlock,
    FusedLayerNorm,
    FusedAttention,
    FusedCrossAttention,
    FusedPerceiverAttention,
    FusedSinusoids,
    FusedEntrance,
)
