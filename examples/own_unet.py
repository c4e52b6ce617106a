"""The ops in a U-Net of one's own: a block written in plain PyTorch, and the same block with its slow parts swapped.

    python examples/own_unet.py

Needs PyTorch alone. The two share their weights; forward and gradients are compared with float64.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_fast import ops
from imagen_fast.testing import assert_as_accurate


class Block(nn.Module):
    """Residual block with a time embedding, then attention of the pixels to the text and themselves."""

    def __init__(self, channels: int = 64, text_width: int = 48, heads: int = 4, groups: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.modulation = nn.Linear(channels, 2 * channels)
        self.norm3 = nn.GroupNorm(groups, channels)
        self.to_q, self.to_kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.text_kv = nn.Linear(text_width, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """x (B, C, H, W), time (B, C), text (B, L, text_width)"""
        scale, shift = self.modulation(F.silu(time)).chunk(2, dim=1)
        h = self.conv1(self.norm_silu(self.norm1, x))
        h = x + self.conv2(self.modulated_norm_silu(self.norm2, h, scale, shift))
        pixels = self.norm3(h).flatten(2).transpose(1, 2)
        q, (k, v) = self.split(self.to_q(pixels)), map(self.split, self.to_kv(pixels).chunk(2, dim=2))
        text_k, text_v = map(self.split, self.text_kv(text).chunk(2, dim=2))
        mixed = self.attend(q, k, v, text_k, text_v).transpose(1, 2).flatten(2)
        return h + self.to_out(mixed).transpose(1, 2).view_as(h)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    # The slow parts, in plain PyTorch

    def norm_silu(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return F.silu(norm(x))

    def modulated_norm_silu(self, norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.silu(norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2))


class FastBlock(Block):
    """The same, with each of the slow parts in one op."""

    def norm_silu(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, activation="silu", eps=norm.eps)

    def modulated_norm_silu(self, norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.group_norm_act(
            x, norm.num_groups, norm.weight, norm.bias, scale=scale, shift=shift, activation="silu", eps=norm.eps
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        return ops.attention(q, k, v, context_k=text_k, context_v=text_v)  # the text is read where it is


def results(block: Block, inputs: tuple[Tensor, ...], weights: Tensor) -> list[Tensor]:
    """The output, and the gradient of every parameter for some weights of it."""
    output = block(*inputs)
    gradients = torch.autograd.grad((output * weights).sum(), list(block.parameters()))
    return [output.detach(), *gradients]


def main() -> None:
    torch.manual_seed(0)
    plain = Block()
    fast = FastBlock()
    fast.load_state_dict(plain.state_dict())
    truth = copy.deepcopy(plain).double()
    inputs = (torch.randn(2, 64, 16, 16), torch.randn(2, 64), torch.randn(2, 7, 48))
    weights = torch.randn(2, 64, 16, 16)

    found = results(fast, inputs, weights)
    eager = results(plain, inputs, weights)
    exact = results(truth, tuple(x.double() for x in inputs), weights.double())
    names = ["output", *(f"gradient of {name}" for name, _ in plain.named_parameters())]
    for name, ours, theirs, true in zip(names, found, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, true)
        print(f"{name:36}  error {relative(ours, true):.1e}   plain PyTorch's {relative(theirs, true):.1e}")


def relative(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).abs().max() / exact.abs().max()).item()


if __name__ == "__main__":
    main()
