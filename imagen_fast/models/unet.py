"""The base U-Net of Imagen: text to small pictures (Saharia et al., arXiv 2205.11487, section 2.4 and appendix F.1).

The structure is that of Dhariwal & Nichol, arXiv 2105.05233: residual blocks with scale-shift modulation, resampling
inside residual blocks, self-attention at the lower resolutions; Imagen adds the text to the keys and values of every
attention layer, and the pooled text to the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers import Attention, GroupNormSiLU, NumberEmbedding, ResnetBlock, TextCondition, TextConditioning, norm_groups

if TYPE_CHECKING:
    from .efficient_unet import EfficientUNet, EfficientUNetConfig


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the base U-Net; the defaults are the paper's 64×64 model with T5-XXL.

    channels is the width at full resolution, multipliers the factor per level; resolution halves between levels.
    attention_levels names the levels (0 is full resolution) with attention. text_dim None builds it without text.
    """

    channels: int = 512
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention_levels: tuple[int, ...] = (1, 2, 3)
    head_width: int = 64
    text_dim: int | None = 4096
    in_channels: int = 3
    out_channels: int = 3
    groups: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        widths = [self.channels * m for m in self.multipliers]
        if not self.multipliers or min(*widths, self.blocks, self.head_width, self.groups) < 1:
            raise ValueError("channels, multipliers, blocks, head_width and groups must be positive")
        check_shared(self)
        # The lowest level has attention between its two middle blocks, wherever else there is some.
        lowest = (len(widths) - 1,) if self.attention_levels else ()
        for level in (*self.attention_levels, *lowest):
            if not 0 <= level < len(widths):
                raise ValueError(f"attention_levels: {level} is not a level; there are {len(widths)}")
            if widths[level] % self.head_width:
                raise ValueError(
                    f"head_width {self.head_width} does not divide level {level}'s {widths[level]} channels"
                )


class UNet(nn.Module):
    """Predicts noise, v or x0 of a noisy picture from its timestep and the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.size_factor = 2 ** (len(config.multipliers) - 1)
        widths = [config.channels * m for m in config.multipliers]
        embedding = 4 * config.channels
        self.time = NumberEmbedding(config.channels, embedding)
        self.text = TextConditioning(config.text_dim, embedding) if config.text_dim is not None else None

        def resnet(c_in: int, c_out: int, **kwargs: Any) -> ResnetBlock:
            groups = min(norm_groups(config.groups, c_in), norm_groups(config.groups, c_out))
            return ResnetBlock(c_in, c_out, embedding, groups=groups, dropout=config.dropout, **kwargs)

        def attention(level: int) -> Attention:
            width = widths[level]
            text_width = embedding if self.text is not None else None
            heads = width // config.head_width
            return Attention(width, heads=heads, text_width=text_width, groups=norm_groups(config.groups, width))

        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [config.channels]
        width = config.channels
        for level, level_width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_Step(resnet(width, level_width), self._attention(attention, level)))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(_Step(resnet(width, width, resample="down")))
                skips.append(width)

        self.middle1 = _Step(resnet(width, width), attention(len(widths) - 1) if config.attention_levels else None)
        self.middle2 = _Step(resnet(width, width))

        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(_Step(resnet(width + skips.pop(), widths[level]), self._attention(attention, level)))
                width = widths[level]
            if level > 0:
                self.up.append(_Step(resnet(width, width, resample="up"), reads_skip=False))

        self.norm_out = GroupNormSiLU(norm_groups(config.groups, width), width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def _attention(self, build: Callable[[int], Attention], level: int) -> Attention | None:
        return build(level) if level in self.config.attention_levels else None

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: noisy pictures (B, in_channels, H, W); H and W divisible by 2^(levels − 1).
            timestep: (B,) in training timesteps, 0 is the cleanest.
            text: features of the text encoder (B, L, text_dim), or None.
            text_mask: (B, L) bool, True where there is text; a row of False samples without the text.
        """
        embedding, condition = embed_inputs(self, x, timestep, text, text_mask)
        h = self.conv_in(x)
        skips = [h]
        for step in self.down:
            h = step(h, embedding, condition)
            skips.append(h)
        h = self.middle1(h, embedding, condition)
        h = self.middle2(h, embedding, condition)
        for step in self.up:
            h = step(h, embedding, condition, skips.pop() if step.reads_skip else None)
        return self.conv_out(self.norm_out(h))


class _Step(nn.Module):
    """A residual block and, at some levels, attention after it."""

    def __init__(self, resnet: ResnetBlock, attention: Attention | None = None, *, reads_skip: bool = True) -> None:
        super().__init__()
        self.resnet, self.attention, self.reads_skip = resnet, attention, reads_skip

    def forward(
        self, x: Tensor, embedding: Tensor, condition: TextCondition | None, skip: Tensor | None = None
    ) -> Tensor:
        h = self.resnet(x, embedding) if skip is None else self.resnet(x, embedding, skip)
        return h if self.attention is None else self.attention(h, condition)


def check_shared(config: UNetConfig | EfficientUNetConfig) -> None:
    """Raise ValueError for what no U-Net's configuration may hold."""
    if config.channels % 2:
        raise ValueError(f"channels must be even, for the cosines and sines of the time, got {config.channels}")
    if min(config.in_channels, config.out_channels) < 1:
        raise ValueError(
            f"in_channels and out_channels must be positive, got {config.in_channels} and {config.out_channels}"
        )
    if config.text_dim is not None and config.text_dim < 1:
        raise ValueError(f"text_dim must be positive or None, got {config.text_dim}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {config.dropout}")


def embed_inputs(
    model: UNet | EfficientUNet, x: Tensor, timestep: Tensor, text: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, TextCondition | None]:
    """Check a U-Net's inputs; return the embedding of time and text (B, E), and the text for attention."""
    config = model.config
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x must be (B, {config.in_channels}, H, W), got {tuple(x.shape)}")
    if timestep.shape != x.shape[:1]:
        raise ValueError(f"timestep must be ({x.shape[0]},), got {tuple(timestep.shape)}")
    if x.shape[2] % model.size_factor or x.shape[3] % model.size_factor:
        raise ValueError(f"x must have a height and width divisible by {model.size_factor}, got {tuple(x.shape)}")
    embedding = model.time(timestep)
    if model.text is None:
        return embedding, None
    assert config.text_dim is not None
    if text is None:
        text = torch.zeros(x.shape[0], 1, config.text_dim, dtype=x.dtype, device=x.device)
        text_mask = torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device)
    if text.ndim != 3 or text.shape[0] != x.shape[0] or text.shape[2] != config.text_dim:
        raise ValueError(f"text must be ({x.shape[0]}, L, {config.text_dim}), got {tuple(text.shape)}")
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if text_mask.shape != text.shape[:2]:
        raise ValueError(f"text_mask must be {tuple(text.shape[:2])}, got {tuple(text_mask.shape)}")
    condition, pooled = model.text(text, text_mask.bool())
    return embedding + pooled, condition
