"""Tokenizers: prompts to token ids. Bytes need no vocabulary file; the others read the one beside a checkpoint."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["longest", "max_length"]


class TokenIds(NamedTuple):
    """What a tokenizer returns: `input_ids` (B, L) int64 and `mask` (B, L) bool, True for tokens of the sentence."""

    input_ids: Tensor
    mask: Tensor


class Tokens(NamedTuple):
    """The tokens of one prompt before its end token: each one's id and the span of characters it stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer(ABC):
    """Prompts to padded token ids. A subclass splits one prompt into tokens; the rest is done here.

    Attributes:
        vocab_size: number of tokens.
        pad_id, eos_id, unk_id: the special tokens.
    """

    vocab_size: int
    pad_id: int = 0
    eos_id: int = 1
    unk_id: int = 2

    @abstractmethod
    def tokenize(self, prompt: str) -> Tokens:
        """The tokens of one prompt, without an end token."""

    def __call__(
        self, prompts: str | Sequence[str], max_length: int | None = None, padding: Padding = "longest"
    ) -> TokenIds:
        """Token ids of prompts, each closed by the end token and padded on the right.

        Args:
            prompts: sentences, or one; they may be empty.
            max_length: most tokens of a prompt, end token included; longer prompts are cut at a whole character, with
                a warning that says after which. None does not cut.
            padding: pad to the "longest" prompt or to "max_length".

        Raises:
            TypeError: `prompts` holds something other than strings.
            ValueError: `max_length` is below 1, or missing where `padding` needs it; `padding` is unknown.
        """
        prompts = check_prompts(prompts)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 (the end token), got {max_length}")
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding must be 'longest' or 'max_length', got {padding!r}")
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        rows = [[*self._cut(prompt, max_length).ids, self.eos_id] for prompt in prompts]
        longest = max(map(len, rows), default=0)
        length = max_length if padding == "max_length" and max_length is not None else longest
        input_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return TokenIds(input_ids, mask)

    def _cut(self, prompt: str, max_length: int | None) -> Tokens:
        """The tokens of `prompt` that fit before the end token; warns of what the model will not see."""
        tokens = self.tokenize(prompt)
        if max_length is not None and len(tokens.ids) > max_length - 1:
            tokens = _whole_characters(tokens, max_length - 1)
            kept = max((end for _, end in tokens.spans), default=0)
            after = f"after character {kept} ({prompt[kept - 1]!r})" if kept else "before its first character"
            warnings.warn(
                f"the prompt {_shorten(prompt)} is longer than the text length of {max_length} tokens: "
                f"it was cut {after}",
                stacklevel=4,
            )
        return tokens


class ByteTokenizer(Tokenizer):
    """ByT5's tokens (Xue et al. 2022, arXiv:2105.13626): byte b of the UTF-8 text is token b + 3.

    Special tokens: 0 padding, 1 end, 2 unknown (never used). The vocabulary has 384 rows: 3 special, 256 bytes and 125
    sentinels that only pretraining uses. Text such as "</s>" in a prompt is read as its bytes.

    Example:
        >>> ByteTokenizer()(["a猫"]).input_ids
        tensor([[100, 234, 143, 174,   1]])
    """

    vocab_size = 384
    offset = 3

    def tokenize(self, prompt: str) -> Tokens:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for i, character in enumerate(prompt):
            encoded = character.encode("utf-8")
            ids += [byte + self.offset for byte in encoded]
            spans += [(i, i + 1)] * len(encoded)
        return Tokens(ids, spans)


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """`prompts` as a list; raises `TypeError` for anything but a string or a list or tuple of strings."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts must be a string or a list of strings, got {type(prompts).__name__}")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {type(prompt).__name__} at position {i}")
    return list(prompts)


def _whole_characters(tokens: Tokens, limit: int) -> Tokens:
    """The first tokens, at most `limit`, such that no character's tokens are kept in part."""
    while 0 < limit < len(tokens.ids) and tokens.spans[limit - 1] == tokens.spans[limit]:
        limit -= 1
    return Tokens(tokens.ids[:limit], tokens.spans[:limit])


def _shorten(prompt: str, limit: int = 40) -> str:
    return repr(prompt if len(prompt) <= limit else prompt[: limit - 1] + "…")
