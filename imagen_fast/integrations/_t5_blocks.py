"""The encoder blocks of transformers' T5 family, whole: what their layers share is computed once, and sums where it is
cheapest.

A block adds what attention gives to its input, and to that what the feed-forward part gives. Without gradients on the
CPU a product on packed weights adds the residual while its results are in registers; elsewhere the norm that reads the
first sum makes it. A layer, or a part of it, with hooks or of another class is called as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ._fused import Fused, is_plain, why_called
from ._packed import adds_at_once, linear, linears
from ._t5 import SelfAttention


class GatedDense(Fused):
    """Mixin of the gated feed-forwards: both projections in one product, activation and product in one op."""

    ops = ("gated_gelu",)
    approximate: ClassVar[dict[type[nn.Module], str]]
    """The activations that the op has, by class."""

    act: Any  # these are of the library's class
    wi_0: Any
    wi_1: Any
    wo: Any
    dropout: Any

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        reason = cls.why_activation_called(module.act)  # type: ignore[arg-type]
        return [] if reason is None else [f"act ({type(module.act).__name__}) is called as it is: {reason}"]

    @classmethod
    def why_activation_called(cls, activation: nn.Module) -> str | None:
        """Why the activation must be called; None where the op computes it."""
        if type(activation) not in cls.approximate:
            return "it is no GELU of a kind that the op has"
        return why_called(activation, type(activation), ())

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.why_activation_called(self.act) is not None:
            return super().forward(hidden_states)
        return linear(self.wo, self.gated(hidden_states))

    def gated(self, x: Tensor) -> Tensor:
        """What `wo` reads."""
        gate, value = linears(self, (self.wi_0, self.wi_1), x)
        if is_plain(gate, value) and gate.dtype == value.dtype:
            hidden = ops.gated_gelu(gate, value, approximate=self.approximate[type(self.act)])
        else:
            hidden = self.act(gate) * value
        hidden = self.dropout(hidden)
        weight = getattr(self.wo, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype not in (hidden.dtype, torch.int8):  # wo may be kept in float32
            hidden = hidden.to(weight.dtype)
        return hidden


class EncoderBlock(Fused):
    """Mixin of the blocks; those of a decoder do as before."""

    ops = ("rms_norm",)
    layer_classes: ClassVar[tuple[type[nn.Module], type[nn.Module]]]
    """Of self-attention and of the feed-forward part."""

    is_decoder: bool  # these are of the library's class
    layer: nn.ModuleList

    def parts(self) -> tuple[Any, Any] | None:
        """The two layers, where they need not be called."""
        if self.is_decoder or len(self.layer) != 2:
            return None
        for layer, expected in zip(self.layer, self.layer_classes, strict=True):
            if why_called(layer, expected, ()) is not None:
                return None
        first, last = self.layer
        attention = first.SelfAttention
        if (
            not isinstance(attention, SelfAttention)
            or why_called(attention, attention.original, ()) is not None
            or not attention.is_on_ours()
        ):
            return None
        return first, last

    def run(
        self, parts: tuple[Any, Any], x: Tensor, mask: Any, position_bias: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """The block's output and the position bias."""
        first, last = parts
        mixed, position_bias, _ = first.SelfAttention.attended(first.layer_norm(x), mask, position_bias, options)
        x, y = _sum_and_norm(x, first.SelfAttention.o, mixed, first.dropout, last.layer_norm)
        dense = last.DenseReluDense
        if (
            isinstance(dense, GatedDense)
            and why_called(dense, dense.original, ()) is None
            and dense.why_activation_called(dense.act) is None
            and adds_at_once(x, last.dropout)
        ):
            return _clamped(linear(dense.wo, dense.gated(y), add=x)), position_bias
        return _clamped(x + last.dropout(dense(y))), position_bias


def _sum_and_norm(x: Tensor, project: nn.Module, mixed: Tensor, dropout: nn.Module, norm: Any) -> tuple[Tensor, Tensor]:
    """x plus what `project` makes of `mixed`, and the norm of that."""
    if adds_at_once(x, dropout):
        x = _clamped(linear(project, mixed, add=x))
        return x, norm(x)
    added = dropout(project(mixed))
    if (
        x.dtype == added.dtype != torch.float16
        and is_plain(x, added)
        and hasattr(norm, "original")
        and why_called(norm, norm.original, ("weight",)) is None
        and norm.weight.dtype == x.dtype
    ):
        y, x = ops.rms_norm(added, norm.weight, residual=x, eps=norm.variance_epsilon)
        return x, y
    x = _clamped(x + added)
    return x, norm(x)


def _clamped(x: Tensor) -> Tensor:
    """As the library brings fp16 infinities back to finite values."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), largest - 1000, largest)
    return torch.clamp(x, min=-limit, max=limit)
