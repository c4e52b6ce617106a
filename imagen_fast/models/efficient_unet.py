"""The Efficient U-Net of Imagen's super-resolution models (arXiv 2205.11487, section 2.4 and appendix B, F.2).

Against the base U-Net: more residual blocks at low resolution and fewer at high, downsampling before and upsampling
after the convolutions of a level, skip connections scaled by 1/√2, no attention but at the lowest level. A residual
block at full resolution joins the first convolution to the last, as in imagen-pytorch: the paper draws none, but noise
of the full resolution cannot be predicted from half of it. The model sees the noisy picture beside the upsampled
low-resolution one, and how much noise was added to that (noise-conditioning augmentation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from .layers import Attention, GroupNormSiLU, NumberEmbedding, ResnetBlock, TextCondition, TextConditioning, norm_groups
from .unet import check_shared, embed_inputs


@dataclass(frozen=True)
class EfficientUNetConfig:
    """Sizes of the efficient U-Net; the defaults are the paper's 64→256 model with T5-XXL.

    Every level halves the resolution first, so the lowest runs at 1 / 2^levels of the picture. cross_attention_levels
    attend to the text, self_attention_levels to the pixels too. text_dim None builds it without text.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks: tuple[int, ...] = (2, 4, 8, 8)
    self_attention_levels: tuple[int, ...] = (3,)
    cross_attention_levels: tuple[int, ...] = (3,)
    heads: int = 8
    text_dim: int | None = 4096
    in_channels: int = 6
    out_channels: int = 3
    groups: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.multipliers or min(*self.multipliers, *self.blocks, self.channels, self.heads, self.groups) < 1:
            raise ValueError("channels, multipliers, blocks, heads and groups must be positive")
        check_shared(self)
        if len(self.blocks) != len(self.multipliers):
            raise ValueError(f"blocks needs one number per level: {len(self.multipliers)}, got {len(self.blocks)}")
        if self.cross_attention_levels and self.text_dim is None:
            raise ValueError("cross_attention_levels needs text_dim")
        for level in (*self.self_attention_levels, *self.cross_attention_levels):
            if not 0 <= level < len(self.multipliers):
                raise ValueError(f"attention at level {level}, but there are {len(self.multipliers)} levels")
            if self.channels * self.multipliers[level] % self.heads:
                raise ValueError(f"heads {self.heads} does not divide the channels of level {level}")


class EfficientUNet(nn.Module):
    """Predicts noise, v or x0 of a noisy picture from its timestep, a low-resolution picture and the text."""

    def __init__(self, config: EfficientUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.size_factor = 2 ** len(config.multipliers)
        widths = [config.channels * m for m in config.multipliers]
        embedding = 4 * config.channels
        self.time = NumberEmbedding(config.channels, embedding)
        self.augmentation = NumberEmbedding(config.channels, embedding)
        self.text = TextConditioning(config.text_dim, embedding) if config.text_dim is not None else None

        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = config.channels
        for level, level_width in enumerate(widths):
            self.down.append(DownBlock(width, level_width, level, config, embedding))
            # The way up adds the skip of the same level, then returns to the width of the level above.
            self.up.insert(0, UpBlock(level_width, width, level, config, embedding))
            width = level_width
        # The levels start at half resolution. Noise of full resolution reaches the output through the skip of conv_in.
        groups = norm_groups(config.groups, config.channels)
        self.resnet_out = ResnetBlock(2 * config.channels, config.channels, embedding, groups=groups)
        self.norm_out = GroupNormSiLU(groups, config.channels)
        self.conv_out = nn.Conv2d(config.channels, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        augmentation: Tensor,
    ) -> Tensor:
        """
        Args:
            x: (B, in_channels, H, W), the noisy picture beside the upsampled low-resolution one; H and W divisible
                by 2^levels.
            timestep: (B,) in training timesteps, 0 is the cleanest.
            text, text_mask: as for the base U-Net.
            augmentation: (B,), the timestep up to which noise was added to the low-resolution picture.
        """
        if augmentation.shape != x.shape[:1]:
            raise ValueError(f"augmentation must be ({x.shape[0]},), got {tuple(augmentation.shape)}")
        embedding, condition = embed_inputs(self, x, timestep, text, text_mask)
        embedding = embedding + self.augmentation(augmentation)
        h = stem = self.conv_in(x)
        skips = []
        for block in self.down:
            h = block(h, embedding, condition)
            skips.append(h)
        for block in self.up:
            h = block(h, skips.pop(), embedding, condition)
        h = self.resnet_out(h, embedding, stem)
        return self.conv_out(self.norm_out(h))


class DownBlock(nn.Module):
    """Strided convolution, then the level's residual blocks and attention."""

    def __init__(self, c_in: int, c_out: int, level: int, config: EfficientUNetConfig, embedding: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.resnets, self.attention = _level(c_out, c_out, level, config, embedding)

    def forward(self, x: Tensor, embedding: Tensor, condition: TextCondition | None) -> Tensor:
        h = self.downsample(x)
        for resnet in self.resnets:
            h = resnet(h, embedding)
        return h if self.attention is None else self.attention(h, condition)


class UpBlock(nn.Module):
    """Skip connection, the level's residual blocks and attention, then upsampling and a convolution."""

    def __init__(self, c_in: int, c_out: int, level: int, config: EfficientUNetConfig, embedding: int) -> None:
        super().__init__()
        self.resnets, self.attention = _level(2 * c_in, c_in, level, config, embedding)
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor, condition: TextCondition | None) -> Tensor:
        first, *others = self.resnets
        h = first(x, embedding, skip * math.sqrt(0.5))
        for resnet in others:
            h = resnet(h, embedding)
        if self.attention is not None:
            h = self.attention(h, condition)
        return self.conv(nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"))


def _level(
    c_in: int, c_out: int, level: int, config: EfficientUNetConfig, embedding: int
) -> tuple[nn.ModuleList, Attention | None]:
    """The residual blocks of one level, the first of which may change the width, and its attention."""
    groups = norm_groups(config.groups, c_out)
    resnets = nn.ModuleList(
        ResnetBlock(c_in if i == 0 else c_out, c_out, embedding, groups=groups, dropout=config.dropout)
        for i in range(config.blocks[level])
    )
    reads_text, reads_pixels = level in config.cross_attention_levels, level in config.self_attention_levels
    if not (reads_text or reads_pixels):
        return resnets, None
    text_width = embedding if reads_text else None
    return resnets, Attention(
        c_out, heads=config.heads, text_width=text_width, self_attention=reads_pixels, groups=groups
    )
