"""Building blocks that the base and the efficient U-Net share, in plain PyTorch.

Shapes: B batch, C channels, H and W height and width, L text tokens, D width of the text features, E width of the
embedding of time and text that modulates every residual block.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextCondition(NamedTuple):
    """What the U-Net's attention reads of the text."""

    tokens: Tensor  # (B, 1 + L, E): a learned null token, then the projected text
    mask: Tensor  # (B, 1 + L) bool, True is attended; the null token always is


class SinusoidalEmbedding(nn.Module):
    """Transformer position embedding of a real number, cosines first (as in DDPM and diffusers)."""

    def __init__(self, width: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.width, self.max_period = width, max_period

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) → (B, width) in fp32."""
        half = self.width // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) * exponent)[None]
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class NumberEmbedding(nn.Sequential):
    """A real number (a timestep, an augmentation level) → (B, E): sinusoids, then a two-layer perceptron."""

    def __init__(self, sinusoid_width: int, width: int) -> None:
        super().__init__(
            SinusoidalEmbedding(sinusoid_width), nn.Linear(sinusoid_width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        sinusoids, *rest = self
        h = sinusoids(t).to(self[1].weight.dtype)
        for layer in rest:
            h = layer(h)
        return h


class TextConditioning(nn.Module):
    """Text features to tokens for attention and to a pooled vector for the time embedding.

    A prompt that is dropped (classifier-free guidance) is one whose mask is False everywhere: attention then sees the
    null token alone, and the pooled vector is a constant.
    """

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, width)
        self.norm = nn.LayerNorm(width)
        self.null_token = nn.Parameter(torch.randn(width) * 0.02)
        hidden, last = nn.Linear(text_dim, width), nn.Linear(width, width)
        self.pool = nn.Sequential(nn.LayerNorm(text_dim), hidden, nn.SiLU(), last)
        # Sentences must differ in it as much as timesteps do in theirs, or the text is learned long after the pictures.
        nn.init.normal_(last.weight, std=2 / width**0.5)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[TextCondition, Tensor]:
        """text (B, L, D), mask (B, L) bool → tokens with their mask, and the pooled vector (B, E)."""
        batch = text.shape[0]
        tokens = self.norm(self.project(text))
        null = self.null_token.to(tokens.dtype).expand(batch, 1, -1)
        tokens = torch.cat((null, tokens), dim=1)
        weights = mask.to(text.dtype)[:, :, None]
        pooled = self.pool((text * weights).sum(1) / weights.sum(1).clamp_min(1))
        return TextCondition(tokens, F.pad(mask, (1, 0), value=True)), pooled


class ResnetBlock(nn.Module):
    """GroupNorm → SiLU → conv → GroupNorm → (1 + scale)·x + shift → SiLU → conv, plus the (resampled) input.

    With `resample` both branches change size between the first activation and the first convolution (BigGAN). A skip
    connection is joined with the input in the channels; in_channels counts those of both.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        *,
        groups: int = 32,
        dropout: float = 0.0,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_width, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), embedding (B, E) and perhaps skip (B, S, H, W) → (B, C', H', W')."""
        x = x if skip is None else torch.cat((x, skip), dim=1)
        h = F.silu(self.norm1(x))
        h = self.conv1(resampled(h, self.resample))
        scale, shift = self.modulation(F.silu(embedding)).chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(resampled(x, self.resample)) + h


class GroupNormSiLU(nn.GroupNorm):
    """Group norm, then SiLU: what a U-Net ends with before its last convolution. The parameters are the norm's."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → the same shape."""
        return F.silu(super().forward(x))


class Attention(nn.Module):
    """Attention of pixels to the text, and with `self_attention` to all pixels too: keys are the text, then pixels."""

    def __init__(
        self, channels: int, *, heads: int, text_width: int | None, self_attention: bool = True, groups: int = 32
    ) -> None:
        super().__init__()
        if text_width is None and not self_attention:
            raise ValueError("attention needs something to attend to: text_width or self_attention=True")
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(channels, 2 * channels, bias=False) if self_attention else None
        self.to_text_kv = nn.Linear(text_width, 2 * channels, bias=False) if text_width is not None else None
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, text: TextCondition | None) -> Tensor:
        """x (B, C, H, W) → the same shape, residual added."""
        return x + self.attend(self.norm(x), text)

    def attend(self, x: Tensor, text: TextCondition | None) -> Tensor:
        """The normalised x (B, C, H, W) → what attention adds to the residual, of the same shape."""
        batch, channels, height, width = x.shape
        pixels = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        q = self._split_heads(self.to_q(pixels))
        segments, masks = [], []
        if self.to_text_kv is not None and text is not None:
            segments.append(self.to_text_kv(text.tokens))
            masks.append(text.mask)
        if self.to_kv is not None:
            segments.append(self.to_kv(pixels))
            masks.append(torch.ones(batch, height * width, dtype=torch.bool, device=x.device))
        k, v = torch.cat(segments, dim=1).chunk(2, dim=2)
        mask = torch.cat(masks, dim=1)[:, None, None] if text is not None else None
        h = F.scaled_dot_product_attention(q, self._split_heads(k), self._split_heads(v), attn_mask=mask)
        h = self.to_out(h.transpose(1, 2).reshape(batch, height * width, channels))
        return h.transpose(1, 2).reshape(batch, channels, height, width)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, L, C) → (B, heads, L, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def resampled(x: Tensor, resample: Literal["up", "down"] | None) -> Tensor:
    """Double the size by nearest neighbours, halve it by averaging, or leave it."""
    if resample == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return x


def zero_init(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Start a residual branch at zero, so that a deep U-Net starts near the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def norm_groups(wanted: int, channels: int) -> int:
    """`wanted` groups, or the largest smaller power-of-two fraction of it that divides the channels (small models)."""
    while channels % wanted:
        wanted //= 2
    return wanted
