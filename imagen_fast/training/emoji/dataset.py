"""Reading the emoji data set."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .selection import LANGUAGES

FORMAT_VERSION = 1
IMAGE_SIZE = 128
IMAGES_FILE = "images.npy"
CAPTIONS_FILE = "captions.json"
LICENSES_FILE = "LICENSES.md"
SPLITS = ("train", "held_out")


class EmojiDataset:
    """Pictures with captions, as `build_dataset` writes them.

    Args:
        directory: the directory of the data set.

    Attributes:
        images: (N, 128, 128, 3) uint8, read from disk as needed.

    Raises:
        CheckpointError: a file is missing, damaged, of another version or shape.

    Example:
        >>> dataset = EmojiDataset("emoji")  # doctest: +SKIP
        >>> dataset.images[0].shape, dataset.captions(0, "held_out", "zh")[0]  # doctest: +SKIP
        ((128, 128, 3), '一张笑脸的插图')
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(
                f"there is no data set {self.directory}; build it with `imagen-fast data emoji --out {self.directory}`"
            )
        self._fingerprint: str | None = None
        self._items = _read_items(self.directory / CAPTIONS_FILE)
        self.images = _open_images(self.directory / IMAGES_FILE)
        if len(self._items) != len(self.images):
            raise CheckpointError(
                f"{self.directory}: {IMAGES_FILE} holds {len(self.images)} pictures, "
                f"but {CAPTIONS_FILE} captions for {len(self._items)}"
            )

    def __len__(self) -> int:
        return len(self._items)

    def fingerprint(self) -> str:
        """A digest of all pictures and captions, by which a run knows its data set again."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self._items, sort_keys=True).encode())
            digest.update(self.images.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def char(self, index: int) -> str:
        """The emoji itself."""
        return self._items[index]["char"]

    def name(self, index: int, language: str = "en") -> str:
        """What the picture shows, in one word or a few: "cat", 猫."""
        return self._items[index][f"name_{language}"]

    def captions(self, index: int, split: str = "train", language: str | None = None) -> list[str]:
        """The captions of one picture.

        Args:
            split: "train", or "held_out" for sentences that training never shows.
            language: "en", "zh", or None for both.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        captions: dict[str, list[str]] = self._items[index][split]
        if language is None:
            return [caption for own in captions.values() for caption in own]
        if language not in captions:
            raise ValueError(f"language: expected one of {', '.join(LANGUAGES)} or None, got {language!r}")
        return list(captions[language])


def _read_items(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected version {FORMAT_VERSION}, got {version!r}; build the data set again")
    items = content.get("items")
    if not isinstance(items, list) or not items:
        raise CheckpointError(f"{path} is damaged: it lists no items")
    for index, item in enumerate(items):
        _check_item(item, f"{path}: item {index}")
    return items


def _check_item(item: Any, where: str) -> None:
    for key in ("char", *(f"name_{language}" for language in LANGUAGES)):
        if not isinstance(item, dict) or not isinstance(item.get(key), str):
            raise CheckpointError(f"{where} has no {key!r}")
    for split in SPLITS:
        captions = item.get(split)
        for language in LANGUAGES:
            own = captions.get(language) if isinstance(captions, dict) else None
            if not isinstance(own, list) or not own or not all(isinstance(caption, str) for caption in own):
                raise CheckpointError(f"{where} has no list of captions {split!r} in {language!r}")


def _open_images(path: Path) -> np.memmap:
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or images.dtype != np.uint8:
        raise CheckpointError(
            f"{path}: expected uint8 of shape (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {images.dtype} {images.shape}"
        )
    return images
