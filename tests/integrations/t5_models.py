"""Small encoders of transformers' T5 family, and sentences for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {"vocab_size": 384, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
FAMILIES = {
    "t5": (transformers.T5Config, transformers.T5EncoderModel),
    "mt5": (transformers.MT5Config, transformers.MT5EncoderModel),
    "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
}
SENTENCES = ("a cat", "一只戴着帽子的猫，坐在火箭上", "a rocket over the moon, in the style of an old postcard")


def build(family: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, "feed_forward_proj": "gated-gelu", **changes}, attn_implementation=attention)
    model = model_class(config).eval()
    with torch.no_grad():  # a library's own start is nearly uniform attention
        for name, parameter in model.named_parameters():
            if "SelfAttention" in name:
                parameter.mul_(3.0)
    return model


def batch() -> dict[str, Tensor]:
    """Bytes as ByT5 counts them, padded to the longest sentence."""
    rows = [torch.tensor([*(byte + 3 for byte in sentence.encode()), 1]) for sentence in SENTENCES]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def features(model: nn.Module, **changes: Any) -> Tensor:
    return model(**{**batch(), **changes}).last_hidden_state


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Nothing but round-off between them, in float32."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)


def gradients(model: nn.Module) -> Tensor:
    """All of them in one vector. (One alone may have none but round-off.)"""
    model.zero_grad(set_to_none=True)
    found = features(model)
    kept = batch()["attention_mask"][..., None].to(found.dtype)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    (found * kept * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
