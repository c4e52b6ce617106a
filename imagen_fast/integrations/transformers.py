"""transformers' T5 family: T5 (and ByT5, which is one), mT5 and umT5; encoders foremost.

Blocks of encoders, norms, gated feed-forwards and attention take fused forms (see `_t5` for attention). Decoders keep
their own attention, with its caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5

from .. import ops
from . import Integration
from ._fused import Fused, hold, is_plain, let_go, own_methods
from ._graphed import Prepare, prepared_text
from ._packed import PackedLinear, linear
from ._t5 import EncoderForward, SelfAttention
from ._t5_blocks import EncoderBlock, GatedDense

# ---- Fused forms


class _LayerNorm(Fused):
    """Mixin of the root mean square norms."""

    ops = ("rms_norm",)

    weight: nn.Parameter  # of the library's class
    variance_epsilon: float

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        return [] if is_plain(module.weight) else ["it runs as it is: its weight is of a tensor subclass"]  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        # With a weight of another dtype the result has that dtype, or the wider one.
        if not is_plain(hidden_states, weight) or hidden_states.dtype != weight.dtype:
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, weight, eps=self.variance_epsilon)


class FusedT5LayerNorm(_LayerNorm, modeling_t5.T5LayerNorm):
    """`T5LayerNorm` on `ops.rms_norm`."""

    original = modeling_t5.T5LayerNorm


class FusedMT5LayerNorm(_LayerNorm, modeling_mt5.MT5LayerNorm):
    """`MT5LayerNorm` on `ops.rms_norm`."""

    original = modeling_mt5.MT5LayerNorm


class FusedUMT5LayerNorm(_LayerNorm, modeling_umt5.UMT5LayerNorm):
    """`UMT5LayerNorm` on `ops.rms_norm`."""

    original = modeling_umt5.UMT5LayerNorm


class _GatedDense(GatedDense):
    """With the library's names of the activations."""

    approximate: ClassVar = {NewGELUActivation: "tanh", GELUActivation: "none"}


class FusedT5DenseGatedActDense(_GatedDense, modeling_t5.T5DenseGatedActDense):
    """`T5DenseGatedActDense` on `ops.gated_gelu`."""

    original = modeling_t5.T5DenseGatedActDense


class FusedMT5DenseGatedActDense(_GatedDense, modeling_mt5.MT5DenseGatedActDense):
    """`MT5DenseGatedActDense` on `ops.gated_gelu`."""

    original = modeling_mt5.MT5DenseGatedActDense


class FusedUMT5DenseGatedActDense(_GatedDense, modeling_umt5.UMT5DenseGatedActDense):
    """`UMT5DenseGatedActDense` on `ops.gated_gelu`."""

    original = modeling_umt5.UMT5DenseGatedActDense


class _Attention(SelfAttention):
    """Mixin of T5's and mT5's attention."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Any = None,
        position_bias: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if key_value_states is not None or past_key_values is not None or not self.is_on_ours():
            return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)
        mixed, position_bias, weights = self.attended(hidden_states, mask, position_bias, kwargs)
        return linear(self.o, mixed), position_bias, weights


class FusedT5Attention(_Attention, modeling_t5.T5Attention):
    """`T5Attention` whose bias need not be expanded."""

    original = modeling_t5.T5Attention


class FusedMT5Attention(_Attention, modeling_mt5.MT5Attention):
    """`MT5Attention` whose bias need not be expanded."""

    original = modeling_mt5.MT5Attention


class FusedUMT5Attention(SelfAttention, modeling_umt5.UMT5Attention):
    """`UMT5Attention`, with a table of its own in every layer, whose bias need not be expanded."""

    original = modeling_umt5.UMT5Attention

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is not None or past_key_values is not None or not self.is_on_ours():
            return super().forward(hidden_states, encoder_hidden_states, past_key_values, attention_mask, **kwargs)
        mixed, _, weights = self.attended(hidden_states, attention_mask, None, kwargs)
        return linear(self.o, mixed), weights


class _Block(EncoderBlock):
    """Mixin of T5's and mT5's blocks."""

    @staticmethod
    def compared(result: tuple[Tensor, Any, Any]) -> Tensor:
        return result[0]  # the bias is passed on in another form

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        encoder_decoder_position_bias: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        parts = None if past_key_values is not None else self.parts()
        if parts is None:
            return super().forward(
                hidden_states,
                attention_mask,
                position_bias,
                encoder_hidden_states,
                encoder_attention_mask,
                encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
        return *self.run(parts, hidden_states, attention_mask, position_bias, kwargs), None


class FusedT5Block(_Block, modeling_t5.T5Block):
    """`T5Block` of an encoder, with sums where they are cheapest."""

    original = modeling_t5.T5Block
    layer_classes = (modeling_t5.T5LayerSelfAttention, modeling_t5.T5LayerFF)


class FusedMT5Block(_Block, modeling_mt5.MT5Block):
    """`MT5Block` of an encoder, with sums where they are cheapest."""

    original = modeling_mt5.MT5Block
    layer_classes = (modeling_mt5.MT5LayerSelfAttention, modeling_mt5.MT5LayerFF)


class FusedUMT5Block(EncoderBlock, modeling_umt5.UMT5Block):
    """`UMT5Block` of an encoder, with sums where they are cheapest."""

    original = modeling_umt5.UMT5Block
    layer_classes = (modeling_umt5.UMT5LayerSelfAttention, modeling_umt5.UMT5LayerFF)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        parts = None if past_key_values is not None else self.parts()
        if parts is None:
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return self.run(parts, hidden_states, attention_mask, None, kwargs)[0]


# ---- Whole objects

_STACKS = (modeling_t5.T5Stack, modeling_mt5.MT5Stack, modeling_umt5.UMT5Stack)


def _attach(obj: nn.Module) -> None:
    """The stacks of encoders in `obj`; the forward of `obj` itself is for what is asked of the whole (`_converted`)."""
    for module in obj.modules():
        if module is obj or not isinstance(module, _STACKS) or module.is_decoder or _encoder_forwards(module):
            continue
        held = [key for key, method in own_methods(module).items() if method == "forward"]  # by a wrapper
        if held or "forward" not in vars(module):
            hold(module, held[0] if held else "forward", EncoderForward(module))


def _detach(obj: nn.Module) -> None:
    for module in obj.modules():
        for key, forward in _encoder_forwards(module).items():
            let_go(module, key, forward)


def _encoder_forwards(module: nn.Module) -> dict[str, EncoderForward]:
    return {key: value for key, value in vars(module).items() if isinstance(value, EncoderForward)}


def _parts(obj: nn.Module) -> Mapping[str, nn.Module]:
    return {"": obj}


def _runs(obj: Any, inputs: Any) -> Iterator[Callable[[], object]]:
    """The arguments of one call; by default two random sentences for an encoder, one of them padded."""
    if inputs is None:
        device = next(obj.parameters()).device
        ids = torch.randint(2, obj.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(13) < torch.tensor([[13], [5]])
        values: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        if getattr(obj.config, "is_encoder_decoder", False) and hasattr(obj, "decoder"):
            values["decoder_input_ids"] = values["input_ids"][:, :4]
        yield partial(obj, **values)
    elif isinstance(inputs, tuple):
        yield partial(obj, *inputs)
    elif isinstance(inputs, Mapping):
        yield partial(obj, **inputs)
    else:
        raise TypeError(
            "verify must be True, a tuple of positional arguments or a dict of keyword arguments of a call; "
            f"got {type(inputs).__name__}"
        )


_ENCODERS = (modeling_t5.T5EncoderModel, modeling_mt5.MT5EncoderModel, modeling_umt5.UMT5EncoderModel)


def _graphed(part: Any) -> Prepare | None:
    return prepared_text if isinstance(part, _ENCODERS) else None


_FORMS: tuple[type[Fused], ...] = (
    FusedT5Block,
    FusedMT5Block,
    FusedUMT5Block,
    FusedT5LayerNorm,
    FusedMT5LayerNorm,
    FusedUMT5LayerNorm,
    FusedT5DenseGatedActDense,
    FusedMT5DenseGatedActDense,
    FusedUMT5DenseGatedActDense,
    FusedT5Attention,
    FusedMT5Attention,
    FusedUMT5Attention,
    PackedLinear,
)


def _is_known(form: type[Fused]) -> bool:
    """Whether the library's class is called as the form expects: other versions may take and return other things."""
    ours, theirs = (inspect.signature(cls.forward).parameters for cls in (form, form.original))
    return list(ours) == list(theirs)


INTEGRATION = Integration(
    serves=(modeling_t5.T5PreTrainedModel, modeling_mt5.MT5PreTrainedModel, modeling_umt5.UMT5PreTrainedModel),
    fused=tuple(form for form in _FORMS if _is_known(form)),
    parts=_parts,
    runs=_runs,
    attach=_attach,
    detach=_detach,
    graphed=_graphed,
)
