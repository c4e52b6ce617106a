"""transformers' T5 family: T5 (and ByT5, which is one), mT5 and umT5; encoders foremost.

Norms, gated feed-forwards and attention blocks take fused forms. Attention is switched by the name of its
implementation in each stack's configuration (see `_t5`), which transformers does not save. Decoders keep their own
attention, with its caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5

from .. import ops
from . import Integration
from ._fused import Fused, is_plain, why_called
from ._t5 import _OVER, PREFIX, SelfAttention, attend, make_mask

# Registering is how transformers is extended; nothing changes for a model that does not ask for these names.
for _over in _OVER:
    AttentionInterface.register(PREFIX + _over, partial(attend, _over))
    AttentionMaskInterface.register(PREFIX + _over, partial(make_mask, _over))

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


_GELU: dict[type[nn.Module], str] = {NewGELUActivation: "tanh", GELUActivation: "none"}


class _GatedDense(Fused):
    """Mixin of the gated feed-forwards: activation and product in one op."""

    ops = ("gated_gelu",)

    act: Any  # these are of the library's class
    wi_0: Any
    wi_1: Any
    wo: Any
    dropout: Any

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        reason = _why_activation_called(module.act)  # type: ignore[arg-type]
        return [] if reason is None else [f"act ({type(module.act).__name__}) is called as it is: {reason}"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if _why_activation_called(self.act) is not None:
            return super().forward(hidden_states)
        gate, value = self.wi_0(hidden_states), self.wi_1(hidden_states)
        if is_plain(gate, value) and gate.dtype == value.dtype:
            hidden = ops.gated_gelu(gate, value, approximate=_GELU[type(self.act)])
        else:
            hidden = self.act(gate) * value
        hidden = self.dropout(hidden)
        weight = getattr(self.wo, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype not in (hidden.dtype, torch.int8):  # wo may be kept in float32
            hidden = hidden.to(weight.dtype)
        return self.wo(hidden)


def _why_activation_called(activation: nn.Module) -> str | None:
    if type(activation) not in _GELU:
        return "it is no GELU of a kind that the op has"
    return why_called(activation, type(activation), ())


class FusedT5LayerNorm(_LayerNorm, modeling_t5.T5LayerNorm):
    """`T5LayerNorm` on `ops.rms_norm`."""

    original = modeling_t5.T5LayerNorm


class FusedMT5LayerNorm(_LayerNorm, modeling_mt5.MT5LayerNorm):
    """`MT5LayerNorm` on `ops.rms_norm`."""

    original = modeling_mt5.MT5LayerNorm


class FusedUMT5LayerNorm(_LayerNorm, modeling_umt5.UMT5LayerNorm):
    """`UMT5LayerNorm` on `ops.rms_norm`."""

    original = modeling_umt5.UMT5LayerNorm


class FusedT5DenseGatedActDense(_GatedDense, modeling_t5.T5DenseGatedActDense):
    """`T5DenseGatedActDense` on `ops.gated_gelu`."""

    original = modeling_t5.T5DenseGatedActDense


class FusedMT5DenseGatedActDense(_GatedDense, modeling_mt5.MT5DenseGatedActDense):
    """`MT5DenseGatedActDense` on `ops.gated_gelu`."""

    original = modeling_mt5.MT5DenseGatedActDense


class FusedUMT5DenseGatedActDense(_GatedDense, modeling_umt5.UMT5DenseGatedActDense):
    """`UMT5DenseGatedActDense` on `ops.gated_gelu`."""

    original = modeling_umt5.UMT5DenseGatedActDense


class FusedT5Attention(SelfAttention, modeling_t5.T5Attention):
    """`T5Attention` whose bias need not be expanded."""

    original = modeling_t5.T5Attention


class FusedMT5Attention(SelfAttention, modeling_mt5.MT5Attention):
    """`MT5Attention` whose bias need not be expanded."""

    original = modeling_mt5.MT5Attention


class FusedUMT5Attention(SelfAttention, modeling_umt5.UMT5Attention):
    """`UMT5Attention`, with a table of its own in every layer, whose bias need not be expanded."""

    original = modeling_umt5.UMT5Attention


# ---- Whole objects

_STACKS = (modeling_t5.T5Stack, modeling_mt5.MT5Stack, modeling_umt5.UMT5Stack)


def _attach(obj: nn.Module) -> None:
    for module in obj.modules():
        if isinstance(module, _STACKS) and not module.is_decoder:
            name = module.config._attn_implementation
            if name in _OVER:
                module.set_attn_implementation(PREFIX + name)


def _detach(obj: nn.Module) -> None:
    for module in obj.modules():
        if isinstance(module, _STACKS) and (module.config._attn_implementation or "").startswith(PREFIX):
            module.set_attn_implementation(module.config._attn_implementation.removeprefix(PREFIX))


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


INTEGRATION = Integration(
    serves=(modeling_t5.T5PreTrainedModel, modeling_mt5.MT5PreTrainedModel, modeling_umt5.UMT5PreTrainedModel),
    fused=(
        FusedT5LayerNorm,
        FusedMT5LayerNorm,
        FusedUMT5LayerNorm,
        FusedT5DenseGatedActDense,
        FusedMT5DenseGatedActDense,
        FusedUMT5DenseGatedActDense,
        FusedT5Attention,
        FusedMT5Attention,
        FusedUMT5Attention,
    ),
    parts=_parts,
    runs=_runs,
    attach=_attach,
    detach=_detach,
)
