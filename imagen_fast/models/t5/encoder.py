"""The T5 encoder: sentences to features for the U-Nets."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ..checkpoint import check_dtype
from .checkpoint import load_state, read_config, save_directory
from .config import T5Config
from .layers import T5Block, T5RMSNorm
from .tokenizer import ByteTokenizer, Padding, Tokenizer, load_tokenizer


class TextFeatures(NamedTuple):
    """What `T5Encoder.encode` returns.

    Attributes:
        features: (B, L, d_model); those of padding tokens are whatever the model gives.
        mask: (B, L) bool, True for the tokens of the sentence, its end token included.
    """

    features: Tensor
    mask: Tensor


def _tokenizer_beside(directory: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of the pipeline that an encoder is part of; None if it has none that fits."""
    name = directory.name.replace("text_encoder", "tokenizer")
    beside = directory.with_name(name if name.startswith("tokenizer") else "tokenizer")
    try:
        tokenizer = load_tokenizer(beside)
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise CheckpointError(f"{beside} has {tokenizer.vocab_size} tokens, the encoder {vocab_size}")
    except CheckpointError as error:
        warnings.warn(f"the tokenizer beside {directory} is not the encoder's: {error}", stacklevel=3)
        return None
    return tokenizer


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

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        variant: str | None = None,
    ) -> T5Encoder:
        """The encoder of a Hugging Face directory of T5, T5 v1.1, mT5, umT5 or ByT5, in evaluation mode.

        The directory holds config.json and safetensors, whole or in shards, of the encoder alone or of the full model
        (the decoder is left unread). Everything is checked before the first tensor is loaded, and tensors are loaded
        one by one into place, so that T5-XXL needs the memory of its weights once.

        Args:
            directory: where the checkpoint is.
            dtype: of the weights; if None what config.json says, or else that of the stored embedding. An fp16 model
                keeps its feed-forward output weights in fp32.
            device: where the weights go; the CPU if None.
            tokenizer: a directory with tokenizer.json, spiece.model, or ByT5's tokenizer_config.json. If None,
                `directory` itself or else the folder beside it that pipelines of diffusers have for it: "tokenizer", or
                "tokenizer_2" beside "text_encoder_2". Without any of these files, and with a warning where that
                folder's are another model's, the encoder has no tokenizer, or ByT5's if the vocabulary is that.
            variant: "fp16" reads model.fp16.safetensors, or its shards.

        Raises:
            CheckpointError: a file or tensor is missing, or one cannot be used; the message names it.
            TypeError: `dtype` is not float64, float32, float16 or bfloat16.

        Example:
            >>> encoder = T5Encoder.from_pretrained("t5-v1_1-xxl", dtype=torch.bfloat16)  # doctest: +SKIP
        """
        check_dtype(dtype)
        directory = Path(directory)
        config, config_dtype = read_config(directory)
        with torch.device("meta"):
            encoder = cls(config)
        shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
        if tokenizer is not None:
            encoder.tokenizer = load_tokenizer(Path(tokenizer))
            if encoder.tokenizer is None:
                raise CheckpointError(f"{tokenizer} holds no tokenizer")
        else:
            found = load_tokenizer(directory) or _tokenizer_beside(directory.absolute(), config.vocab_size)
            encoder.tokenizer = found or encoder.tokenizer
        state = load_state(directory, shapes, dtype or config_dtype, device, variant)
        encoder.load_state_dict(state, assign=True)
        return encoder.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """Write the encoder and its tokenizer as a directory that `from_pretrained` and Hugging Face transformers
        (`T5EncoderModel`, or `UMT5EncoderModel` with `bias_per_layer`) read.

        Args:
            directory: created, or replaced if it holds such a checkpoint; it appears only once it is whole.
            dtype: of the stored weights; theirs if None.
            max_shard_bytes: weights beyond this go into several files.

        Raises:
            OutputError: the directory cannot be written, or holds files that are no part of such a checkpoint.
            TypeError: `dtype` is not float64, float32, float16 or bfloat16.
        """
        files = {} if self.tokenizer is None else self.tokenizer.files()
        save_directory(Path(directory), self.config, self.state_dict(), dtype, files, max_shard_bytes)

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
