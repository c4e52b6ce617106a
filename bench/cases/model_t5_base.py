"""transformers' T5 v1.1 base encoder: 12 layers of width 768 with 12 heads, gated GELU of 2048. Random weights.

Every call gets new tokens. Cases named "padded" have one sentence of 77 tokens beside one that fills the length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models import model_case
from ..registry import Case

OP = "model_t5_base"
BF16, FP32 = torch.bfloat16, torch.float32
LAYERS, WIDTH, INNER, FEED_FORWARD, VOCABULARY = 12, 768, 768, 2048, 32128
PARAMETERS = LAYERS * (4 * WIDTH * INNER + 3 * WIDTH * FEED_FORWARD)  # of the blocks' matrices


class Encoder(nn.Module):
    """The encoder as a function of tensors."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=64,
            d_ff=FEED_FORWARD,
            num_layers=LAYERS,
            num_heads=INNER // 64,
            feed_forward_proj="gated-gelu",
            attn_implementation=attention,
        )
        self.model = T5EncoderModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def build() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return Encoder().eval()


def with_attention(name: str, model: nn.Module) -> nn.Module:
    model.model.set_attn_implementation(name)  # type: ignore[operator, union-attr]
    return model


def cases() -> Iterator[Case]:
    """All of them; the name is batch x length-form-dtype."""
    for dtype in (BF16, FP32):
        yield _case(2, 128, dtype, tags={"headline"})
    yield _case(2, 128, BF16, padded=True)
    for batch, length in ((1, 77), (8, 128), (1, 512)):
        yield _case(batch, length, BF16)


def _case(batch: int, length: int, dtype: torch.dtype, padded: bool = False, tags: set[str] | None = None) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        values = {"input_ids": torch.randint(2, VOCABULARY, (batch, length), generator=generator)}
        if padded:
            values["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [77]])).long()
        return values

    tokens = batch * length
    return model_case(
        op=OP,
        name=f"{batch}x{length}-{'padded' if padded else 'full'}",
        title=f"{batch}×{length} tokens{', padded' if padded else ''}",
        build=build,
        inputs=inputs,
        shape=(batch, length),
        dtype=dtype,
        renewed=("input_ids",),
        flops=2 * tokens * (PARAMETERS + 2 * LAYERS * length * INNER),
        moved=(PARAMETERS + tokens * WIDTH) * dtype.itemsize,
        variants={name: functools.partial(with_attention, name) for name in ("sdpa", "eager")},
        tags=tags or (),
    )
