"""The T5 encoder: sentences to features for the U-Nets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import T5Config
from .layers import T5Block, T5RMSNorm
from .tokenizer import ByteTokenizer, Padding, Tokenizer


class TextFeatures(NamedTuple):
    """What `T5Encoder.encode` returns.

    Attributes:
        features: (B, L, d_model); those of padding tokens are whatever the model gives.
        mask: (B, L) bool, True for the tokens of the sentence, its end token included.
    """

    features: Tensor
    mask: Tensor


class T5Encoder(nn.Module):
    """The encoder half of T5, v1.1, mT5, umT5 and ByT5 (Raffel et al. 2020, arXiv:1910.10683).

    A new encoder has random weights with T5's initial deviations and is in training mode, ready to be trained.

    Args:
        config: the sizes.
        tokenizer: what `encode` reads prompts with; a `ByteTokenizer` if None and the vocabulary is ByT5's.

    Example:
        >>> encoder = T5Encoder(T5Config.preset("tiny_bytes")).eval()
        >>> encoder.encode(["a cat", "一只猫"]).features.shape
        torch.Size([2, 10, 256])
    """

    def __init__(self, config: T5Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        if tokenizer is None and config.vocab_size == ByteTokenizer.vocab_size:
            tokenizer = ByteTokenizer()
        self.tokenizer = tokenizer
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # initialised with deviation 1
        self.blocks = nn.ModuleList(
            T5Block(config, has_relative_bias=config.bias_per_layer or i == 0) for i in range(config.num_layers)
        )
        self.final_norm = T5RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states of tokens.

        Args:
            input_ids: (B, L) int64 or int32.
            attention_mask: (B, L), nonzero or True where a token may be attended to; all of them if None.

        Returns:
            (B, L, d_model) in the dtype of the weights.

        Raises:
            TypeError: `input_ids` are not integers.
            ValueError: a shape does not fit.
        """
        self._check(input_ids, attention_mask)
        key_mask = None if attention_mask is None else attention_mask.bool()
        x = self.dropout(self.embedding(input_ids))
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias, key_mask)
        return self.dropout(self.final_norm(x))

    def encode(
        self, prompts: str | list[str], max_length: int | None = None, padding: Padding = "longest"
    ) -> TextFeatures:
        """Features and mask of sentences.

        Args:
            prompts: sentences; an empty one is allowed (its features are those of the end token). A single string is
                taken as a list of one.
            max_length: the text length in tokens, end token included. Longer prompts are cut, with a warning that says
                after which character. None does not cut.
            padding: "longest" pads to the longest prompt of the batch, "max_length" to `max_length` (256 in Imagen, 77
                in DeepFloyd IF).

        Raises:
            TypeError: `prompts` is neither a string nor a list of them.
            ValueError: there is no tokenizer, or an argument is out of range.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this encoder has no tokenizer: give one as T5Encoder(config, tokenizer), or call it with input_ids"
            )
        input_ids, mask = self.tokenizer(prompts, max_length, padding)
        if input_ids.numel() and int(input_ids.max()) >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gave token {int(input_ids.max())}, but the model's vocabulary has "
                f"{self.config.vocab_size}: the tokenizer belongs to another model"
            )
        device = self.embedding.weight.device
        input_ids, mask = input_ids.to(device), mask.to(device)
        return TextFeatures(self(input_ids, mask), mask)

    @staticmethod
    def _check(input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (batch, length), got shape {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
