"""Normal noise that is a function of (seed, row, stage, element) alone, in plain PyTorch on integers.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) turns a key and a
counter into four words w0, ..., w3 of 32 bits:

    key      (seed mod 2^32, seed / 2^32), the sample's seed taken as an unsigned integer of 64 bits
    counter  (e mod 2^32, e / 2^32, row, stage)

From them two Box-Muller pairs make the normals of the elements 4 e, ..., 4 e + 3 of the sample, counted over
(C, positions...) in order, whatever the memory layout:

    u = (w0 + 1/2) / 2^32, f = int32(w1) / 2^32, each rounded to float32
    sqrt(-2 log u) cos(2 pi f), sqrt(-2 log u) sin(2 pi f)        and likewise from w2 and w3

u is ((w0 as float32) * 2^-32 + 2^-33 as float32). Here the functions are taken in float64 and their product rounded to
float32 at the end; the kernels' normals are within 2 ulp of it, and their words the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

STEP = 0  # the stage of `sampler_step`


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for four words of counter and two of key: int64 tensors that broadcast, with values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k + increment & _LOW for k, increment in zip((k0, k1), _KEY_INCREMENTS, strict=True))
    return c0, c1, c2, c3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a * m; in halves, because the product does not fit an int64."""
    low, high = (a & 0xFFFF) * m, (a >> 16) * m
    return high + (low >> 16) >> 16, (high << 16) + low & _LOW


def words(seed: Tensor, counters: int, row: int | Tensor, stage: int = STEP) -> Tensor:
    """(B, counters, 4) int64: the words of the counters 0, 1, ... for each of the seeds (B,) int64."""
    e = torch.arange(counters, device=seed.device)
    rows = e.new_zeros(()) + row
    counter = (e & _LOW, e >> 32, rows & _LOW, e.new_full((), stage))
    key = (seed[:, None] & _LOW, seed[:, None] >> 32 & _LOW)
    return torch.stack(torch.broadcast_tensors(*philox(counter, key)), dim=-1)


def normals(seed: Tensor, size: int, row: int | Tensor, stage: int = STEP) -> Tensor:
    """(B, size) float32: the noise of the first `size` elements for each of the seeds (B,) int64."""
    w = words(seed, (size + 3) // 4, row, stage)
    u = (w[..., 0::2].float() * 2.0**-32 + 2.0**-33).double()
    signed = w[..., 1::2] - (w[..., 1::2] >> 31 << 32)
    turns = (signed.float() * 2.0**-32).double()
    # Within an eighth of a turn from the nearest quarter, where a float64 sine has all its digits
    quarter = (4 * turns).round()
    rest = 2 * math.pi * (turns - quarter / 4)
    cosine, sine = rest.cos(), rest.sin()
    odd, after_first = quarter.long() % 2 != 0, (quarter.long() + 1) % 4 >= 2
    after_second = quarter.long() % 4 >= 2
    cosine, sine = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    cosine, sine = torch.where(after_first, -cosine, cosine), torch.where(after_second, -sine, sine)
    radius = (-2 * u.log()).sqrt()
    pairs = torch.stack((radius * cosine, radius * sine), dim=-1)  # (B, counters, 2, 2)
    return pairs.flatten(1)[:, :size].float()
