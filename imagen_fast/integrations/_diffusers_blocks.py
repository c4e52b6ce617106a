"""Blocks of diffusers' U-Nets in fused form: residual blocks, attention, gated feed-forwards."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from diffusers.models.embeddings import TextTimeEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnUpBlock2D,
    ResnetUpsampleBlock2D,
    SimpleCrossAttnUpBlock2D,
    UpBlock2D,
)
from torch import Tensor, nn

from .. import ops
from ._fused import Fused, activation_name, group_norm_act, is_plain, replaced, why_called
from ._packed import conv2d, linear, linears
from ._skips import Joined, norm_act, parts, skips_for
from ._text import of_text
from ._time import projected


class FusedResnetBlock2D(Fused, ResnetBlock2D):
    """Both group norms with what follows them, each in one op; every mode of time embedding and of resampling."""

    original = ResnetBlock2D
    ops = ("group_norm_act",)
    reads = {"norm1": nn.GroupNorm, "norm2": nn.GroupNorm}  # noqa: RUF012

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        found = super().obstacles(module)
        act = module.nonlinearity
        if activation_name(act) is None:  # type: ignore[arg-type]
            found.append(
                f"nonlinearity ({type(act).__name__}) is called as it is: it has hooks, or the op has none such"
            )
        return found

    def forward(self, input_tensor: Any, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input is a tensor, or `Joined`."""
        skip = None
        if isinstance(input_tensor, Joined):
            input_tensor, skip = self._parts(input_tensor)
        projects = self.time_emb_proj is not None or temb is None  # else temb is of any shape
        if args or kwargs or not projects:  # the former are deprecated; the library says so
            return super().forward(input_tensor, temb, *args, **kwargs)
        if skip is None:
            hidden = self._norm_act(self.norm1, input_tensor)
        else:
            hidden = norm_act(self.norm1, input_tensor, skip, activation_name(self.nonlinearity))
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            if self.upsample is not None and hidden.shape[0] >= 64:
                input_tensor, hidden = input_tensor.contiguous(), hidden.contiguous()
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None:
            activation = None if self.skip_time_act else activation_name(self.nonlinearity)
            if self.skip_time_act or activation is not None:
                temb = projected(self.time_emb_proj, temb, activation)
            else:
                temb = self.time_emb_proj(self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                return super().forward(input_tensor, temb)  # the library's error
            scale, shift = temb.chunk(2, dim=1)
            hidden = self._norm_act(self.norm2, hidden, scale, shift)
        else:
            if self.time_embedding_norm == "default" and temb is not None:
                hidden = hidden + temb[:, :, None, None]
            hidden = self._norm_act(self.norm2, hidden)
        if skip is not None:
            assert self.conv_shortcut is not None
            input_tensor = conv2d(self.conv_shortcut, input_tensor, more=skip)
        elif self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
        y = conv2d(self.conv2, self.dropout(hidden), add=input_tensor)
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor

    def _parts(self, joined: Joined) -> tuple[Tensor, Tensor | None]:
        joins = self.upsample is None and self.downsample is None and self.time_emb_proj is not None
        shortcut = self.conv_shortcut if joins and activation_name(self.nonlinearity) is not None else None
        return parts(joined.hidden, joined.skip, self.norm1, shortcut)

    def _norm_act(self, norm: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        activation = activation_name(self.nonlinearity)
        y = group_norm_act(norm, x, activation, scale=scale, shift=shift)
        return y if activation is not None else self.nonlinearity(y)


class _ReadsSkips(Fused):
    """Up blocks: skip connections are read where they are, where that is faster (see `_skips`).

    They keep the names of their classes: the library lists by name which blocks checkpoint their gradients.
    """

    ops = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__name__ = cls.original.__name__  # pickles go by the qualified name

    def forward(self, hidden_states: Tensor, res_hidden_states_tuple: Any, *args: Any, **kwargs: Any) -> Tensor:
        # FreeU scales both before they are joined.
        free_u = any(getattr(self, name, None) for name in ("s1", "s2", "b1", "b2"))
        if not free_u and isinstance(res_hidden_states_tuple, tuple):
            resnets: Any = self.resnets
            res_hidden_states_tuple = skips_for(resnets, ResnetBlock2D, res_hidden_states_tuple)
        return super().forward(hidden_states, res_hidden_states_tuple, *args, **kwargs)


class FusedUpBlock2D(_ReadsSkips, UpBlock2D):
    """Of residual blocks alone."""

    original = UpBlock2D


class FusedResnetUpsampleBlock2D(_ReadsSkips, ResnetUpsampleBlock2D):
    """The same, upsampled by a residual block."""

    original = ResnetUpsampleBlock2D


class FusedCrossAttnUpBlock2D(_ReadsSkips, CrossAttnUpBlock2D):
    """With transformers (Stable Diffusion)."""

    original = CrossAttnUpBlock2D


class FusedSimpleCrossAttnUpBlock2D(_ReadsSkips, SimpleCrossAttnUpBlock2D):
    """With attention that has added keys and values (DeepFloyd IF)."""

    original = SimpleCrossAttnUpBlock2D


class FusedGEGLU(Fused, GEGLU):
    """Activation and product in one op, read in place from the projection's result."""

    original = GEGLU
    ops = ("gated_gelu",)

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        own = replaced(module, "gelu")
        return super().obstacles(module) + ([] if own is None else [f"it runs as it is: its {own} is replaced"])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or replaced(self, "gelu") is not None:
            return super().forward(hidden_states, *args, **kwargs)
        projected = self.proj(hidden_states)
        value, gate = projected.chunk(2, dim=-1)
        if not is_plain(projected):
            return value * self.gelu(gate)
        return ops.gated_gelu(gate, value, approximate="none")


_ADDED = (AttnAddedKVProcessor2_0, AttnAddedKVProcessor)
_PLAIN = (AttnProcessor2_0, AttnProcessor)
_SCALING = (AttnProcessor, AttnAddedKVProcessor)  # by what the block says
# Methods of a block that processors call, and of which some do not run here
_CALLED = (
    "get_attention_scores",
    "head_to_batch_dim",
    "batch_to_head_dim",
    "prepare_attention_mask",
    "norm_encoder_hidden_states",
)


class FusedAttention(Fused, Attention):
    """Self- and cross-attention of U-Nets, by processors that the library sets itself.

    With added keys and values (DeepFloyd IF) the text is a second segment that is read in place. Another processor, a
    call with arguments for one, or one with a mask that is not added to the scores as it is (a boolean one), runs as
    it is.
    """

    original = Attention
    ops = ("attention", "group_norm_act")

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        reason = _why_processor_called(module)
        found = (
            [] if reason is None else [f"processor ({type(module.processor).__name__}) is called as it is: {reason}"]
        )
        for name in ("group_norm", "norm_cross"):
            child = getattr(module, name, None)
            if isinstance(child, nn.GroupNorm):
                why = why_called(child, nn.GroupNorm)
                if why is not None:
                    found.append(f"{name} ({type(child).__name__}) is called as it is: {why}")
        return found

    @classmethod
    def joined(cls, module: Any) -> tuple[nn.Module, ...]:
        if _why_processor_called(module) is not None or module.only_cross_attention:
            return ()
        if type(module.processor) in _PLAIN and module.is_cross_attention:
            return ()
        return module.to_q, module.to_k, module.to_v

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        added = attention_mask is None or getattr(attention_mask, "dtype", None) == hidden_states.dtype
        if cross_attention_kwargs or not added or _why_processor_called(self) is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        if type(self.processor) in _ADDED:
            return self._with_added_keys(hidden_states, encoder_hidden_states, attention_mask)
        return self._plain(hidden_states, encoder_hidden_states, attention_mask)

    def _with_added_keys(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        pixels = x.flatten(2)  # [B, C, N], as x lies in memory
        batch, _, length = pixels.shape
        if mask is not None:
            mask = self.prepare_attention_mask(mask, length, batch, out_dim=4)
        if text is None:
            text_k, text_v = self._project(pixels.transpose(1, 2), added=True)
        else:
            text_k, text_v = self._of_text(text, added=True)
        h = group_norm_act(self.group_norm, pixels, None).transpose(1, 2)
        if self.only_cross_attention:
            out = self._attend(self._heads(self.to_q(h)), text_k, text_v, mask)
        else:
            q, k, v = map(self._heads, linears(self, (self.to_q, self.to_k, self.to_v), h))
            out = self._attend(q, k, v, mask, text_k, text_v)
        return self._out(out, add=pixels.transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    def _plain(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        h = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        batch, length = (h if text is None else text).shape[:2]
        if mask is not None:
            mask = self.prepare_attention_mask(mask, length, batch)
            mask = mask.view(batch, self.heads, -1, mask.shape[-1])
        if self.group_norm is not None:
            h = group_norm_act(self.group_norm, h.transpose(1, 2), None).transpose(1, 2)
        if text is None:
            q, k, v = map(self._heads, linears(self, (self.to_q, self.to_k, self.to_v), h))
        else:
            q, (k, v) = self._heads(self.to_q(h)), self._of_text(text, added=False)
        residual = None
        if self.residual_connection:
            residual = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        out = self._out(self._attend(q, k, v, mask), add=residual)
        if x.dim() == 4:
            out = out.transpose(1, 2).reshape(x.shape)
        return out if self.rescale_output_factor == 1 else out / self.rescale_output_factor

    def _of_text(self, text: Tensor, added: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of a text (B, L, width): (B, heads, L, head width) each."""
        return self._project(self._norm_text(text) if self.norm_cross else text, added)

    def _project(self, x: Tensor, added: bool) -> tuple[Tensor, Tensor]:
        k, v = linears(self, (self.add_k_proj, self.add_v_proj) if added else (self.to_k, self.to_v), x)
        return self._heads(k), self._heads(v)

    def _norm_text(self, text: Tensor) -> Tensor:
        if isinstance(self.norm_cross, nn.GroupNorm):  # over the tokens too, padding included
            return group_norm_act(self.norm_cross, text.transpose(1, 2), None).transpose(1, 2)
        return self.norm_encoder_hidden_states(text)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * width) -> (B, heads, N, width), in place."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        context_k: Tensor | None = None,
        context_v: Tensor | None = None,
    ) -> Tensor:
        """(B, heads, N, width) each -> (B, N, heads * width). PyTorch 2's processors know the usual scale alone."""
        scale = self.scale if type(self.processor) in _SCALING else None
        given = (t for t in (q, k, v, context_k, context_v) if t is not None)
        dtypes = {t.dtype for t in given}
        if not is_plain(q, k, v, context_k, context_v, mask) or len(dtypes) > 1:
            k = k if context_k is None else torch.cat([context_k, k], dim=2)
            v = v if context_v is None else torch.cat([context_v, v], dim=2)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            out = ops.attention(q, k, v, context_k=context_k, context_v=context_v, bias=mask, scale=scale)
        return out.transpose(1, 2).flatten(2)

    def _out(self, x: Tensor, add: Tensor | None) -> Tensor:
        """The projection and what follows it, plus a residual (B, N, C)."""
        project, *others = self.to_out  # dropout
        if add is not None and not any(self._drops(layer) for layer in others):
            return linear(project, x, add=add)
        for layer in self.to_out:
            x = layer(x)
        return x if add is None else x + add

    @staticmethod
    def _drops(layer: Any) -> bool:
        plain = why_called(layer, nn.Dropout, ()) is None
        return not plain or (layer.training and layer.p > 0)


class TextKeepingAttention(FusedAttention):
    """The same, with keys and values of the text computed once for each text."""

    original = Attention
    caches_text = True

    def _of_text(self, text: Tensor, added: bool) -> tuple[Tensor, Tensor]:
        layers = (self.add_k_proj, self.add_v_proj) if added else (self.to_k, self.to_v)
        compute = super()._of_text
        return of_text(self, "text", (self.norm_cross, *layers), (text,), lambda: compute(text, added))


class TextKeepingPooling(Fused, TextTimeEmbedding):
    """What the embedding of time gets from the text, computed once for each text."""

    original = TextTimeEmbedding
    ops = ()
    caches_text = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        compute = super().forward
        children = tuple(self.children())
        return of_text(self, "text", children, (hidden_states,), lambda: compute(hidden_states))


def _why_processor_called(attention: Any) -> str | None:
    """Why the processor of an attention block must be called; at every call."""
    processor = type(attention.processor)
    if processor not in _ADDED and processor not in _PLAIN:
        return "it is not one of the library's own for every day"
    if attention.spatial_norm is not None or attention.norm_q is not None or attention.norm_k is not None:
        return "the block has norms of queries and keys, or of another kind"
    if processor in _ADDED and attention.group_norm is None:
        return "it needs a group norm"
    if processor in _SCALING and (attention.upcast_attention or attention.upcast_softmax or not attention.scale_qk):
        return "it computes in another precision, or without a scale"
    width = attention.inner_dim // max(attention.heads, 1)
    if width % 8 or width > 256:
        return f"heads are {width} wide, and the op needs a multiple of 8 up to 256"
    own = replaced(attention, *_CALLED)
    return None if own is None else f"the block's {own} is replaced"
