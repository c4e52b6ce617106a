"""The parts of a T5 encoder: pre-norm blocks of attention with relative position bias and a gated feed-forward part.

    x = x + attention(rms_norm(x));  x = x + ffn(rms_norm(x))

Raffel et al. 2020 (arXiv:1910.10683), with the gated feed-forward part of Shazeer 2020 (arXiv:2002.05202). What happens
in half precision follows Hugging Face transformers, whose checkpoints these modules load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reference.attention import RelativePositionBias, materialized
from .config import T5Config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class T5RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x**2) + eps)` over the last dimension, the mean square taken in fp32 (fp64 of fp64).

    With a 16-bit weight the normalised value is rounded to its dtype first and multiplied after.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = _at_least_fp32(x).square().mean(-1, keepdim=True)
        x = x * torch.rsqrt(mean_square + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class T5RelativeBias(nn.Module):
    """T5's relative position bias: a learned number per head and bucket of distances."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.empty(self.num_buckets, config.num_heads))
        nn.init.normal_(self.weight, std=config.d_model**-0.5)

    def forward(self, length: int) -> Tensor:
        """The bias of every query and key, (1, heads, length, length), in the table's dtype."""
        return materialized(self.unmaterialized(), length, length)

    def unmaterialized(self) -> RelativePositionBias:
        """What the bias is made of; attention takes it in its place."""
        return RelativePositionBias(self.weight, bidirectional=True, max_distance=self.max_distance)

    def extra_repr(self) -> str:
        return f"buckets={self.num_buckets}, heads={self.weight.shape[1]}, max_distance={self.max_distance}"


class T5Attention(nn.Module):
    """Self-attention without the usual 1/sqrt(d) (the initial weights hold it) and without linear biases.

    Attributes:
        q, k, v, o: the projections, (inner, d_model) and (d_model, inner).
        relative_bias: the position table of this block, or None if it uses the one of the first block.
    """

    def __init__(self, config: T5Config, has_relative_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.d_kv, self.dropout_rate = config.num_heads, config.d_kv, config.dropout_rate
        self.q = nn.Linear(config.d_model, config.inner_dim, bias=False)
        self.k = nn.Linear(config.d_model, config.inner_dim, bias=False)
        self.v = nn.Linear(config.d_model, config.inner_dim, bias=False)
        self.o = nn.Linear(config.inner_dim, config.d_model, bias=False)
        self.relative_bias = T5RelativeBias(config) if has_relative_bias else None
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.v.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=config.inner_dim**-0.5)

    def forward(self, x: Tensor, bias: Tensor | RelativePositionBias, key_mask: Tensor | None = None) -> Tensor:
        """Attend within each sentence.

        Args:
            x: (B, L, d_model).
            bias: what `T5RelativeBias` returned, (1, heads, L, L), or what it is made of.
            key_mask: (B, L) bool, True where a token may be attended to. A sentence without such a token attends to all
                its tokens alike: the lowest finite value takes the place of their scores, which keeps NaN away.
        """
        q = self._split_heads(self.q(x))  # (B, heads, L, d_kv)
        k = self._split_heads(self.k(x))
        v = self._split_heads(self.v(x))
        if isinstance(bias, RelativePositionBias):
            bias = materialized(bias, x.shape[1], x.shape[1])
        scores = _at_least_fp32(q @ k.transpose(-1, -2)) + bias  # (B, heads, L, L)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1), self.dropout_rate, self.training)
        mixed = weights.to(v.dtype) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.d_kv)).transpose(1, 2)


class T5FFN(nn.Module):
    """The feed-forward part of original T5: `wo act(wi x)`.

    `wo` may have a wider dtype than the rest (fp32 in an fp16 model); its input is cast to it.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        nn.init.normal_(self.wi.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=config.d_ff**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return project_out(self.dropout(self.activation(self.wi(x))), self.wo)


class T5GatedFFN(nn.Module):
    """The feed-forward part of T5 v1.1 and later: `wo (act(wi_0 x) * wi_1 x)`, with `wo` as in `T5FFN`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        nn.init.normal_(self.wi_0.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wi_1.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=config.d_ff**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return project_out(self.dropout(self.activation(self.wi_0(x)) * self.wi_1(x)), self.wo)


def project_out(x: Tensor, wo: nn.Linear) -> Tensor:
    return wo(cast_for(wo, x))


def cast_for(wo: nn.Linear, x: Tensor) -> Tensor:
    """The input of `wo` in its dtype, which may be wider than the rest of the model has."""
    if x.dtype != wo.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return x.to(wo.weight.dtype)
    return x


class T5Block(nn.Module):
    """Attention, then the feed-forward part, each on the norm of its input and added to it."""

    def __init__(self, config: T5Config, has_relative_bias: bool) -> None:
        super().__init__()
        self.attention_norm = T5RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = T5Attention(config, has_relative_bias)
        self.ffn_norm = T5RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ffn = T5GatedFFN(config) if config.is_gated else T5FFN(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, bias: Tensor | RelativePositionBias | None, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | RelativePositionBias | None]:
        """The block's output, and the position bias for the blocks after it that have no table of their own.

        Args:
            x: (B, L, d_model).
            bias: what the block before returned; None for the first, which has a table.
            key_mask: as in `T5Attention`.
        """
        if self.attention.relative_bias is not None:
            bias = self.attention.relative_bias(x.shape[1])
        x = clamp_fp16(x + self.dropout(self.attention(self.attention_norm(x), bias, key_mask)))
        x = clamp_fp16(x + self.dropout(self.ffn(self.ffn_norm(x))))
        return x, bias


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clamp_fp16(x: Tensor) -> Tensor:
    """Bring fp16 infinities back to finite values: T5's residual stream can pass 65504. Other dtypes are untouched."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    # Some room is left below the largest value, so that the next addition does not overflow at once.
    limit = torch.where(x.isinf().any(), largest - 1000, largest)
    return torch.clamp(x, min=-limit, max=limit)
