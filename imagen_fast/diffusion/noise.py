"""The noise of a batch of pictures, each from a seed of its own.

Everything is a function of (seed, use, number of the element) by the Philox stream of `reference.philox`, so a picture
is the same alone or in a batch, and on every device and backend.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import philox

# The counter's last word: what a draw is for. `ops.sampler_step` has 0, with the table's row as the word before.
FIRST_SAMPLE, AUGMENTATION, SEEDS = 1, 2, 3


class Noise:
    """Normal noise for some samples, that depends on each sample's own seed alone.

    Args:
        seeds: one per sample, any Python integers; they count modulo 2^64.
        device, dtype: of the noise; it is drawn on the CPU, so that every device sees the same.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        try:
            signed = [(operator.index(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
        except TypeError as error:
            raise TypeError(f"seeds must be integers, got {seeds!r}") from error
        self._seeds = torch.tensor(signed, dtype=torch.int64, device="cpu")
        self.device, self.dtype = torch.device(device), dtype
        self.seeds = self._seeds.to(device)
        """(samples,) int64 on the device: what `ops.sampler_step` draws its noise from."""

    def __call__(self, *shape: int, use: int = FIRST_SAMPLE) -> Tensor:
        """The noise (samples, *shape) for one use; the same at every call."""
        drawn = philox.normals(self._seeds, torch.Size(shape).numel(), row=0, stage=use)
        return drawn.view(-1, *shape).to(self.device, self.dtype)

    def of_stage(self, stage: int) -> Noise:
        """Noise of its own for a stage of a cascade; stage 0's is this one."""
        if stage == 0:
            return self
        low, high, *_ = philox.words(self._seeds, 1, row=stage, stage=SEEDS).unbind(-1)
        return Noise((low + (high << 32)).flatten().tolist(), self.device, self.dtype)
