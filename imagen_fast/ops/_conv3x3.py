"""A 3x3 convolution of pictures in channels-last by Winograd's algorithm, on the CPU and without gradients.

    y = conv2d(x, weight, bias, stride=1, padding=1) + add

The weights are transformed once, by `transformed`, for tiles of 4x4 results in 16 bits and of 2x2 in float32; they take
8 times the memory of 16-bit ones and 1.8 times that of float32. For models whose weights stay
(`imagen_fast.integrations`); the arithmetic and its source are described in `csrc/conv3x3/cpu_kernel.cpp`. An infinity
or NaN in x reaches all results of its tiles, some of which lie a pixel or two outside of the 3x3 around it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _native

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHANNEL_STEP = 16  # channels are a multiple of this
_PANEL = 64  # output channels that lie together
# G by the edge of a tile's results: of F(2, 3) for the points 0, 1, -1 and infinity, of F(4, 3) for 2 and -2 too
_G = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}

_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")
_LIBRARY.define("_conv3x3_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? add, int out_channels) -> Tensor")


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this dtype, and a processor on which it is the faster way: in 16 bits one without
    matrix tiles."""
    has_tiles = dtype in (torch.float16, torch.bfloat16) and torch.cpu._is_amx_tile_supported()
    return dtype in _DTYPES and not has_tiles and _native.unavailable_reason() is None


def edge_of(dtype: torch.dtype) -> int:
    """Of the results of a tile, where x and the weight are of this dtype."""
    return 2 if dtype == torch.float32 else 4


def transformed(weight: Tensor) -> Tensor:
    """What `conv3x3` computes with, from a weight (O, C, 3, 3): (16 or 36, panels, C, 64), float32."""
    g = torch.tensor(_G[edge_of(weight.dtype)], dtype=torch.float64)
    points = torch.einsum("ai,ocij,bj->abco", g, weight.detach().double(), g).flatten(0, 1)  # [points, C, O]
    panels = -(-weight.shape[0] // _PANEL)
    padded = torch.nn.functional.pad(points.float(), (0, panels * _PANEL - weight.shape[0]))
    return padded.unflatten(2, (panels, _PANEL)).transpose(1, 2).contiguous()


def transformed_bytes(in_channels: int, out_channels: int, dtype: torch.dtype) -> int:
    """What the transform of a weight of this dtype takes."""
    return (edge_of(dtype) + 2) ** 2 * -(-out_channels // _PANEL) * _PANEL * in_channels * 4


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out_channels: int) -> Tensor:
    """`conv2d(x, ..., padding=1) + add`, for x (B, C, H, W) dense in channels-last, and add like the result."""
    return torch.ops.imagen_fast._conv3x3_cpu.default(x, weight, bias, add, out_channels)
