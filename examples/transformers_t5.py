"""A T5 encoder of transformers, accelerated: English and Chinese sentences, padded, to the same features.

    python examples/transformers_t5.py                    a small byte-level T5 (ByT5) of random weights
    python examples/transformers_t5.py --model DIR        T5 v1.1, mT5, umT5 or ByT5, saved or downloaded

Needs transformers.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoTokenizer, ByT5Tokenizer, MT5EncoderModel, T5Config, T5EncoderModel, UMT5EncoderModel

import imagen_fast

SENTENCES = [
    "a corgi riding a bicycle in Times Square",
    "一只可爱的猫咪",
    "three red apples",
    "雪山上的日出, oil painting",
]
CLASSES = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}


def small_encoder() -> tuple[ByT5Tokenizer, T5EncoderModel]:
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=256, d_kv=64, d_ff=640, num_layers=4, num_heads=4)
    config.feed_forward_proj, config.dense_act_fn, config.is_gated_act = "gated-gelu", "gelu_new", True
    return ByT5Tokenizer(), T5EncoderModel(config).eval()


def load(directory: str) -> tuple[object, torch.nn.Module]:
    from transformers import AutoConfig

    cls = CLASSES[AutoConfig.from_pretrained(directory).model_type]
    return AutoTokenizer.from_pretrained(directory), cls.from_pretrained(directory).eval()


def encode(encoder: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The features of every token, zero where there is none, and the seconds of the fastest of five calls."""
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            features = encoder(**tokens).last_hidden_state
            seconds.append(time.perf_counter() - start)
    return features * tokens["attention_mask"][..., None], min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the directory of a saved encoder (default: a small random one)")
    options = parser.parse_args()

    tokenizer, encoder = load(options.model) if options.model else small_encoder()
    tokens = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))

    plain, plain_seconds = encode(encoder, tokens)
    print(imagen_fast.accelerate(encoder, verify=True))
    fast, fast_seconds = encode(encoder, tokens)
    imagen_fast.restore(encoder)
    back, _ = encode(encoder, tokens)

    error = (plain - fast).abs().max() / plain.abs().max()
    print(f"\nplain {1e3 * plain_seconds:.1f} ms, accelerated {1e3 * fast_seconds:.1f} ms")
    print(f"largest difference, relative to the largest feature: {error.item():.1e}")
    print(f"restored, bit for bit the same: {torch.equal(plain, back)}")


if __name__ == "__main__":
    main()
