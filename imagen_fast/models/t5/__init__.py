"""T5 text encoders: T5 v1.1, mT5, umT5 and ByT5 checkpoints of Hugging Face, and small ones trained from scratch."""

from __future__ import annotations

from .config import T5Config
from .encoder import T5Encoder, TextFeatures
from .tokenizer import ByteTokenizer, Tokenizer

__all__ = ["ByteTokenizer", "T5Config", "T5Encoder", "TextFeatures", "Tokenizer"]
