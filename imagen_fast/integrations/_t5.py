"""Attention of transformers' T5 family on `ops.attention`, in encoders.

The name of the attention in a model's configuration stays as it is: transformers and its users compare it. With each
name in `_OVER` fused blocks attend by the op, and go to the function of that name for what the op has no form for. They

- get a mask of shape (B, 1, 1, K), where the caller masks padding alone, instead of (B, 1, Q, K);
- compute the bias of relative positions inside the kernel, from the table: a fused attention block hands on a
  `PositionBias` in the place of the (1, H, Q, K) tensor, and whatever else meets it makes that tensor of it;
- project queries, keys and values in one product (`_packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedModel

from .. import ops
from ..ops.attention import RelativePositionBias
from ._fused import Fused, FusedMethod, is_plain, why_called
from ._packed import linears
from ._padding import with_means

_OVER = ("sdpa", "eager", "flex_attention")

_HEADS = "the op needs a multiple of 8 up to 256"


def _has_heads(width: int) -> bool:
    return width % 8 == 0 and width <= 256


class PositionBias:
    """The bias of relative positions of T5, which becomes a (1, heads, queries, keys) tensor only where it must.

    Args:
        attention: the block that has the table.
        query_length, key_length: of the tensor.
        device: of the tensor.
    """

    def __init__(self, attention: SelfAttention, query_length: int, key_length: int, device: Any) -> None:
        self.attention = attention
        self.arguments = (query_length, key_length, device)

    def relative(self, dtype: torch.dtype) -> RelativePositionBias:
        """As `ops.attention` takes it beside queries of a dtype."""
        table: Tensor = self.attention.relative_attention_bias.weight
        if (table.dtype == torch.float64) != (dtype == torch.float64):
            table = table.to(dtype)
        return RelativePositionBias(table, max_distance=self.attention.relative_attention_max_distance)

    def tensor(self) -> Tensor:
        """As the library computes it."""
        library: Any = self.attention.original
        return library.compute_bias(self.attention, *self.arguments)

    def to_float64(self) -> Tensor:
        """The tensor that `verify` gives to an original in float64."""
        return self.tensor().double()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_materialised(args), **_materialised(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


_OPERATORS = (
    *(f"__{name}__" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")),
    *(f"__r{name}__" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")),
    *("__neg__", "__pos__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__"),
    *("__len__", "__iter__", "__contains__", "__getitem__", "__array__", "__deepcopy__", "__reduce_ex__"),
)


def _on_tensor(name: str) -> Callable[..., Any]:
    def method(self: PositionBias, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return method


for _name in _OPERATORS:  # Python looks them up in the class
    setattr(PositionBias, _name, _on_tensor(_name))


def _materialised(values: Any) -> Any:
    return tree_map(lambda value: value.tensor() if isinstance(value, PositionBias) else value, values)


class SelfAttention(Fused):
    """Mixin for the attention blocks: they ask for their bias, and may get it unexpanded."""

    ops = ("attention",)
    reads = {"relative_attention_bias": nn.Embedding}  # noqa: RUF012
    parameters_read = ("weight",)

    # What the library's class has
    q: Any
    k: Any
    v: Any
    o: Any
    config: Any
    dropout: float
    n_heads: int
    scaling: float
    has_relative_attention_bias: bool
    is_decoder: bool
    key_value_proj_dim: int
    relative_attention_bias: nn.Embedding
    relative_attention_max_distance: int
    relative_attention_num_buckets: int

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        assert isinstance(module, cls.original)
        found = super().obstacles(module) if module.has_relative_attention_bias else []
        if module.has_relative_attention_bias and not cls._has_known_buckets(module):  # type: ignore[arg-type]
            found.append("its bias is expanded as before: the op needs an even number of buckets, and distances beyond")
        if not _has_heads(module.key_value_proj_dim):  # type: ignore[arg-type]
            found.append(f"it attends as before: its heads are {module.key_value_proj_dim} wide, and {_HEADS}")
        return found

    @classmethod
    def joined(cls, module: Any) -> tuple[nn.Module, ...]:
        return () if module.is_decoder else (module.q, module.k, module.v)

    def compute_bias(
        self, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: Any = 0
    ) -> Any:
        if (
            query_length == key_length
            and self.is_on_ours()
            and why_called(self.relative_attention_bias, nn.Embedding, self.parameters_read) is None
            and self._has_known_buckets()
        ):
            return PositionBias(self, query_length, key_length, device)
        return super().compute_bias(query_length, key_length, device, past_seen_tokens)  # type: ignore[misc]

    def _has_known_buckets(self) -> bool:
        """Whether the op has such a table: the library's logarithm may give buckets that it has not."""
        buckets = self.relative_attention_num_buckets
        return buckets >= 4 and buckets % 2 == 0 and self.relative_attention_max_distance > buckets // 4

    def is_on_ours(self) -> bool:
        """Whether it attends by the functions of this file."""
        return not self.is_decoder and self.config._attn_implementation in _OVER

    def attended(self, x: Tensor, mask: Any, position_bias: Any, options: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        """Everything but the output's projection, for a block that `is_on_ours`.

        Args:
            x: (B, L, d_model).
            mask, position_bias: as the library's class takes them.
            options: what else it takes.

        Returns:
            (B, L, heads * width), the bias, and the weights where they are asked for.
        """
        heads = (*x.shape[:-1], self.n_heads, self.key_value_proj_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in linears(self, (self.q, self.k, self.v), x))
        if position_bias is None:
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(x.shape[1], x.shape[1], device=x.device)
            else:
                position_bias = torch.zeros((1, self.n_heads, x.shape[1], x.shape[1]), device=q.device, dtype=q.dtype)
        over = self.config._attn_implementation
        dropout = self.dropout if self.training else 0.0
        mixed, weights = _attend(
            over, self, q, k, v, mask, dropout, self.scaling, position_bias=position_bias, **options
        )
        return mixed.reshape(*x.shape[:-1], -1), position_bias, weights


def _attend(
    over: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention function of transformers gives: (B, Q, H, D) and, where they are asked for, the weights.

    What the op has no form for goes to the function `over`: dropout, weights to be returned, a mask that differs
    between queries together with a bias from the table.
    """
    served = (
        dropout == 0.0
        and not getattr(module, "is_causal", False)
        and not _wants_weights(module, kwargs)
        and kwargs.get("cache") is None
        and is_plain(query, key, value)
        and query.dtype == key.dtype == value.dtype
        and _has_heads(query.shape[-1])
    )
    bias, key_mask = _bias_and_key_mask(position_bias, attention_mask, query) if served else (None, None)
    if not served or bias is NotImplemented:
        function = _function_of(over, module)
        bias = position_bias.tensor() if isinstance(position_bias, PositionBias) else position_bias
        given = _mask_for(over, attention_mask, query)
        return function(
            module, query, key, value, given, dropout=dropout, scaling=scaling, position_bias=bias, **kwargs
        )
    out = ops.attention(query, key, value, bias=bias, key_mask=key_mask, scale=scaling)
    if key_mask is not None:
        out = with_means(out, value, key_mask)
    return out.transpose(1, 2), None


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))


def _bias_and_key_mask(position_bias: Any, mask: Any, query: Tensor) -> tuple[Any, Tensor | None]:
    """As the op takes them, or NotImplemented."""
    if mask is not None and not isinstance(mask, Tensor):
        return NotImplemented, None
    if isinstance(position_bias, PositionBias):
        bias: Any = position_bias.relative(query.dtype)
        if not is_plain(bias.table):
            return NotImplemented, None
    else:
        bias = position_bias
    if mask is None:
        return bias, None
    if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        return bias, mask[:, 0, 0].expand(query.shape[0], -1)
    if isinstance(bias, RelativePositionBias):
        return NotImplemented, None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return mask if bias is None else bias + mask, None


def _function_of(over: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of that name; "eager" is defined beside each model."""
    import sys

    default = sys.modules[type(module).__mro__[_depth(module)].__module__].eager_attention_forward
    return AttentionInterface().get_interface(over, default)


def _depth(module: nn.Module) -> int:
    """Where the library's own class stands among the bases."""
    return next(i for i, cls in enumerate(type(module).__mro__) if cls.__module__.startswith("transformers."))


def _mask_for(over: str, mask: Any, query: Tensor) -> Any:
    """The mask that our own function made, as the function `over` expects it."""
    if over == "eager" and isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask


class EncoderForward(FusedMethod):
    """The `forward` of an encoder's stack of blocks: they get a mask of padding with one row for all queries.

    The stack keeps its class, by whose name transformers knows what to record in it.
    """

    original = PreTrainedModel
    method = "forward"
    ops = ()
    recordable = True

    @property
    def __func__(self) -> Any:
        """As of the bound method in whose place this is; signatures are read from it."""
        return type(self.owner).forward

    @property
    def __code__(self) -> Any:
        """Of the same method; `torch.export` reads it."""
        return type(self.owner).forward.__code__

    @property
    def __wrapped__(self) -> Any:
        return type(self.owner).forward.__get__(self.owner)

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        text = next((x for x in (input_ids, kwargs.get("inputs_embeds")) if isinstance(x, Tensor)), None)
        if isinstance(attention_mask, Tensor) and text is not None and self._is_on_ours():
            attention_mask = self._one_row(attention_mask, text)
        return type(self.owner).forward(self.owner, input_ids, attention_mask, *args, **kwargs)

    def _one_row(self, mask: Tensor, text: Tensor) -> Tensor:
        """The mask of a text (B, L) or (B, L, d_model) with a row for all its queries, if it is one of padding."""
        if mask.dim() == 4 and mask.dtype == torch.bool and self.owner.config._attn_implementation == "eager":
            return mask.to(self.owner.dtype)  # it is added to the scores
        if mask.shape != text.shape[:2]:
            return mask
        return mask[:, None, None].to(device=text.device, dtype=torch.bool)

    def _is_on_ours(self) -> bool:
        attentions = [getattr(block.layer[0], "SelfAttention", None) for block in self.owner.block]
        return all(isinstance(attention, SelfAttention) and attention.is_on_ours() for attention in attentions)
