"""The shipped cascade as a whole: sentences through the byte-level T5 encoder, the base U-Net at 32x32 pixels and the
super-resolution U-Net at 128x128, to pictures.

Every call gets new sentences of one length and new seeds. The noise is a function of the seed alone, so that everybody
draws the same pictures. Compilers and runtimes get the encoder and the U-Nets, and the sampler around them is eager.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...models import Imagen
from ..models import MEMORY_FORMATS, model_case, random_sentences, sentences
from ..registry import Case

OP = "model_cascade"
BF16, FP32 = torch.bfloat16, torch.float32
SIZE = 128
STEPS = (8, 4)  # of the base and of super-resolution; the model's own are 25 and 16
LETTERS = 24
PARTS = ("model.text_encoder", "model.unets.base", "model.unets.super_128")
PARAMETERS = 9_480_000
FLOPS_PER_SAMPLE = 27_800_000_000  # of the convolutions and matrix products


class Cascade(nn.Module):
    """The cascade as a function of tensors.

    Args:
        steps: evaluations of each stage's U-Net.
    """

    def __init__(self, steps: tuple[int, int] = STEPS) -> None:
        super().__init__()
        self.model = Imagen.from_pretrained("emoji")
        self.steps = steps

    @torch.inference_mode()
    def forward(self, letters: Tensor, seeds: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1], from `letters` (B, L) and one of the `seeds` (B,) each."""
        plans = self.model.config.plan(steps=self.steps)
        return self.model._run(plans, sentences(letters), seeds.tolist(), None, progress=False)


def cases() -> Iterator[Case]:
    """All of them; the name is batch-dtype."""
    for dtype in (BF16, FP32):
        yield _case(1, dtype, tags={"headline"})
    for batch in (2, 4, 8):
        yield _case(batch, BF16)


def _case(batch: int, dtype: torch.dtype, tags: set[str] | None = None) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "letters": random_sentences(generator, batch, LETTERS),
            "seeds": torch.randint(2**31, (batch,), generator=generator),
        }

    return model_case(
        op=OP,
        name=f"{batch}x3x{SIZE}x{SIZE}",
        title=f"{batch}×3×{SIZE}×{SIZE}, {STEPS[0]} + {STEPS[1]} steps",
        build=lambda: Cascade().eval(),
        inputs=inputs,
        shape=(batch, 3, SIZE, SIZE),
        dtype=dtype,
        renewed=("letters", "seeds"),
        flops=FLOPS_PER_SAMPLE * batch,
        moved=PARAMETERS * dtype.itemsize,
        variants=MEMORY_FORMATS,
        parts=PARTS,
        samples_checked=32,
        tags=tags or (),
    )
