"""Tokenizers: prompts to token ids. Bytes need no vocabulary file; the others read the one beside a checkpoint."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...config import read_json
from ...errors import CheckpointError

Padding = Literal["longest", "max_length"]

FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


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

    def files(self) -> dict[str, bytes]:
        """The files, by name, from which `load_tokenizer` makes this tokenizer again."""
        return {}

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
            ValueError: a prompt is no valid Unicode; `max_length` is below 1, or missing where `padding` needs it;
                `padding` is unknown.
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
        self._warn_of_unknown(prompt, tokens)
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

    def _warn_of_unknown(self, prompt: str, tokens: Tokens) -> None:
        unknown = [
            prompt[slice(*span)] for token, span in zip(tokens.ids, tokens.spans, strict=True) if token == self.unk_id
        ]
        characters = dict.fromkeys(character for text in unknown for character in text if not character.isspace())
        if characters:
            warnings.warn(
                f"this model's vocabulary has no {', '.join(characters)}: in the prompt {_shorten(prompt)} the model "
                "cannot read them",
                stacklevel=5,
            )


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

    def files(self) -> dict[str, bytes]:
        return {"tokenizer_config.json": _json({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125})}


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face, read by the package `tokenizers`.

    Raises:
        ModuleNotFoundError: `tokenizers` is not installed.
        CheckpointError: the file cannot be read, or knows no `</s>` and `<pad>`.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise _missing_package(path, "tokenizers") from error
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises bare Exceptions
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = self._backend.get_vocab_size()
        self.eos_id = _special_token(path, "</s>", self._backend.token_to_id("</s>"))
        self.pad_id = _special_token(path, "<pad>", self._backend.token_to_id("<pad>"))
        unk_id = self._backend.token_to_id("<unk>")
        self.unk_id = -1 if unk_id is None else unk_id

    def tokenize(self, prompt: str) -> Tokens:
        encoding = self._backend.encode(prompt, add_special_tokens=False)
        return Tokens(encoding.ids, encoding.offsets)

    def files(self) -> dict[str, bytes]:
        names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        return {
            "tokenizer.json": self._backend.to_str().encode(),
            "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", **names}),
        }


class SentencePieceTokenizer(Tokenizer):
    """A spiece.model, read by the package `sentencepiece` (0.2.3 or later).

    Raises:
        ModuleNotFoundError: `sentencepiece` is not installed.
        CheckpointError: the file cannot be read, or knows no `</s>` and `<pad>`.
    """

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise _missing_package(path, "sentencepiece") from error
        try:
            self._backend = SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._backend.vocab_size()
        self.eos_id = _special_token(path, "</s>", self._backend.eos_id())
        self.pad_id = _special_token(path, "<pad>", self._backend.pad_id())
        self.unk_id = self._backend.unk_id()

    def tokenize(self, prompt: str) -> Tokens:
        pieces = self._backend.encode(prompt, out_type="offset_mapping")
        spans = list(pieces["offsets"])
        # Of several pieces of a character, such as its bytes, the last alone has its span; those before are empty.
        for i in reversed(range(len(spans) - 1)):
            start, end = spans[i]
            if start == end == spans[i + 1][0]:
                spans[i] = spans[i + 1]
        return Tokens(pieces["ids"], spans)

    def files(self) -> dict[str, bytes]:
        return {
            "spiece.model": self._backend.serialized_model_proto(),
            "tokenizer_config.json": _json({"tokenizer_class": "T5Tokenizer"}),
        }


class MissingTokenizer(Tokenizer):
    """Stands for a tokenizer whose package is not installed: the encoder can be used with token ids and saved, and the
    first prompt raises the `ModuleNotFoundError` that says what to install.

    Raises:
        CheckpointError: a file of the tokenizer cannot be read.
    """

    def __init__(self, error: ModuleNotFoundError, directory: Path) -> None:
        self.vocab_size = 0
        self.reason, self.package = str(error), error.name
        paths = [directory / name for name in FILES]
        self._files = {path.name: _read_bytes(path) for path in paths if path.is_file()}

    def tokenize(self, prompt: str) -> Tokens:
        raise ModuleNotFoundError(self.reason, name=self.package)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)


_TOKENIZER_FILES: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.json": JsonTokenizer,
    "spiece.model": SentencePieceTokenizer,
}


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer whose files lie in `directory`; None if there are none.

    Of several the first whose package is installed is taken, or a `MissingTokenizer` if none is.

    Raises:
        CheckpointError: a file cannot be used.
    """
    missing: ModuleNotFoundError | None = None
    for file_name, tokenizer in _TOKENIZER_FILES.items():
        if (directory / file_name).is_file():
            try:
                return tokenizer(directory / file_name)
            except ModuleNotFoundError as error:
                missing = missing or error
    if missing is not None:
        return MissingTokenizer(missing, directory)
    config = directory / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer()
    return None


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """`prompts` as a list; raises `TypeError` or `ValueError` unless they are a string or a list of them."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts must be a string or a list of strings, got {type(prompts).__name__}")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {type(prompt).__name__} at position {i}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            place = error.start + 1
            raise ValueError(f"the prompt {_shorten(prompt)} is no valid Unicode at character {place}") from error
    return list(prompts)


def _whole_characters(tokens: Tokens, limit: int) -> Tokens:
    """The first tokens, at most `limit`, such that no character's tokens are kept in part."""
    while 0 < limit < len(tokens.ids) and tokens.spans[limit - 1] == tokens.spans[limit]:
        limit -= 1
    return Tokens(tokens.ids[:limit], tokens.spans[:limit])


def _shorten(prompt: str, limit: int = 40) -> str:
    return repr(prompt if len(prompt) <= limit else prompt[: limit - 1] + "…")


def _special_token(path: Path, name: str, token: int | None) -> int:
    if token is None or token < 0:
        raise CheckpointError(f"{path} has no token {name}, which T5 needs")
    return token


def _missing_package(path: Path, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"reading {path} needs the package {package}: pip install 'imagen-fast[text]'", name=package
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
