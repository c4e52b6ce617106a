"""The T5 encoder of this package on the ops.

Attention takes the position bias unmaterialised, and projects queries, keys and values in one product. A residual is
added by the norm that reads the sum, or, without gradients on the CPU, by the product before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.t5.layers import (
    ACTIVATIONS,
    T5Attention,
    T5Block,
    T5GatedFFN,
    T5RelativeBias,
    T5RMSNorm,
    cast_for,
    clamp_fp16,
)
from ..reference.attention import RelativePositionBias
from ._fused import Fused, attention, is_head_width, is_plain, why_called
from ._packed import adds_at_once, linear, linears
from ._padding import with_means

_WEIGHT = ("weight",)
_HALF = (torch.float16, torch.bfloat16)

# For the op, the activations that it knows
_APPROXIMATE: dict[Callable[[Tensor], Tensor], str] = {ACTIVATIONS["gelu_new"]: "tanh", ACTIVATIONS["gelu"]: "none"}


def _normalized(norm: T5RMSNorm, x: Tensor) -> Tensor:
    """norm(x) by the op, in the dtype that the norm gives: the weight's if it has 16 bits, else the wider of both."""
    weight = norm.weight
    dtype = weight.dtype if weight.dtype in _HALF else torch.promote_types(x.dtype, weight.dtype)
    return ops.rms_norm(x if dtype in _HALF else x.to(dtype), weight, eps=norm.eps).to(dtype)


def _is_read(norm: nn.Module, *x: Tensor) -> bool:
    return why_called(norm, T5RMSNorm, _WEIGHT) is None and is_plain(*x)


def _norm(norm: T5RMSNorm, x: Tensor) -> Tensor:
    return _normalized(norm, x) if _is_read(norm, x) else norm(x)


def _add_and_norm(norm: T5RMSNorm, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, clamped as T5 clamps it, and its norm: in one pass where nothing is clamped or cast."""
    if x.dtype == added.dtype != torch.float16 and _is_read(norm, x, added) and norm.weight.dtype == x.dtype:
        y, x = ops.rms_norm(added, norm.weight, residual=x, eps=norm.eps)
        return x, y
    x = clamp_fp16(x + added)
    return x, _norm(norm, x)


class FusedT5RMSNorm(Fused, T5RMSNorm):
    """In one op."""

    original = T5RMSNorm
    ops = ("rms_norm",)

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        reason = "it runs as it is: its weight is of a tensor subclass"
        return [] if isinstance(module, T5RMSNorm) and is_plain(module.weight) else [reason]

    def forward(self, x: Tensor) -> Tensor:
        return _normalized(self, x) if is_plain(x, self.weight) else super().forward(x)


class FusedT5Attention(Fused, T5Attention):
    """Scores, position bias, mask and softmax in one op, which does not hold the bias in memory."""

    original = T5Attention
    ops = ("attention",)

    @classmethod
    def joined(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        assert isinstance(module, T5Attention)
        return module.q, module.k, module.v

    def forward(self, x: Tensor, bias: Tensor | RelativePositionBias, key_mask: Tensor | None = None) -> Tensor:
        mixed = self.attended(x, bias, key_mask)
        return super().forward(x, bias, key_mask) if mixed is None else linear(self.o, mixed)

    def attended(self, x: Tensor, bias: Tensor | RelativePositionBias, key_mask: Tensor | None = None) -> Tensor | None:
        """What `o` reads; None where the op cannot compute it."""
        dropout = self.training and self.dropout_rate > 0
        if dropout or not is_head_width(self.d_kv) or not is_plain(x, *_table(bias)):
            return None
        q, k, v = map(self._split_heads, linears(self, (self.q, self.k, self.v), x))
        mixed = attention(q, k, v, bias=bias, key_mask=key_mask, scale=1.0)
        if key_mask is not None:
            mixed = with_means(mixed, v, key_mask)
        return mixed.transpose(1, 2).flatten(2)


def _table(bias: Tensor | RelativePositionBias) -> tuple[Tensor]:
    return (bias.table if isinstance(bias, RelativePositionBias) else bias,)


class FusedT5GatedFFN(Fused, T5GatedFFN):
    """The activation and the product in one op."""

    original = T5GatedFFN
    ops = ("gated_gelu",)

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        known = isinstance(module, T5GatedFFN) and module.activation in _APPROXIMATE
        return [] if known else ["it runs as it is: its activation is no gelu"]

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.wo, self.gated(x))

    def gated(self, x: Tensor) -> Tensor:
        """What `wo` reads."""
        gate, value = linears(self, (self.wi_0, self.wi_1), x)
        approximate = _APPROXIMATE.get(self.activation)
        if approximate is None or gate.dtype != value.dtype or not is_plain(gate, value):
            h = self.activation(gate) * value
        else:
            h = ops.gated_gelu(gate, value, approximate)
        return cast_for(self.wo, self.dropout(h))


class FusedT5Block(Fused, T5Block):
    """The first residual is added by the norm that reads the sum; the position bias is passed on unmaterialised."""

    original = T5Block
    ops = ("rms_norm",)
    reads = {"attention_norm": T5RMSNorm, "ffn_norm": T5RMSNorm}  # noqa: RUF012
    parameters_read = _WEIGHT

    @staticmethod
    def compared(result: tuple[Tensor, object]) -> Tensor:
        return result[0]  # the bias is passed on in another form

    def forward(
        self, x: Tensor, bias: Tensor | RelativePositionBias | None, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | RelativePositionBias | None]:
        table = self.attention.relative_bias
        if table is not None:
            plain = why_called(table, T5RelativeBias, _WEIGHT) is None and is_plain(x)
            bias = table.unmaterialized() if plain else table(x.shape[1])
        y = _norm(self.attention_norm, x)
        at_once = adds_at_once(x, self.dropout)
        attention: Any = self.attention
        mixed = attention.attended(y, bias, key_mask) if at_once and _is_fused(attention) else None
        if mixed is not None:
            x = clamp_fp16(linear(attention.o, mixed, add=x))
            y = _norm(self.ffn_norm, x)
        else:
            x, y = _add_and_norm(self.ffn_norm, x, self.dropout(attention(y, bias, key_mask)))
        if at_once and isinstance(self.ffn, FusedT5GatedFFN) and _is_fused(self.ffn):
            return clamp_fp16(linear(self.ffn.wo, self.ffn.gated(y), add=x)), bias
        return clamp_fp16(x + self.dropout(self.ffn(y))), bias


def _is_fused(part: nn.Module) -> bool:
    """Whether a part has its fused form, and need not be called for what else there may be on it."""
    return isinstance(part, FusedT5Attention | FusedT5GatedFFN) and why_called(part, part.original, ()) is None


T5_FORMS = (FusedT5Block, FusedT5Attention, FusedT5GatedFFN, FusedT5RMSNorm)
