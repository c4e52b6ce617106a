"""Build the emoji data set: pictures of Noto Color Emoji, captions in English and Chinese.

The directory holds `images.npy` (uint8, (N, 128, 128, 3), on white), `captions.json` and `LICENSES.md`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import OutputError, UserError
from ...files import atomic_directory
from .annotations import AnnotationFile, naming_annotations, read_annotations
from .captions import held_out_captions, train_captions
from .dataset import CAPTIONS_FILE, FORMAT_VERSION, IMAGE_SIZE, IMAGES_FILE, LICENSES_FILE, SPLITS, EmojiDataset
from .font import BitmapFont, square_on_white
from .selection import LANGUAGES, Concept, resolve_selection

_LICENSES = """\
# Licences of this data set

## Pictures (`images.npy`)
Noto Color Emoji, {version}. {copyright}
Licensed under the SIL Open Font License, Version 1.1: https://openfontlicense.org
Source: https://github.com/googlefonts/noto-emoji
Changed: composited on white, empty margins cut, stored as an array.

## Captions (`captions.json`)
Emoji names and keywords in English and Chinese from Unicode CLDR. {cldr_copyright}
Licensed under the Unicode licence ({cldr_licence}): https://www.unicode.org/copyright.html
Source: https://github.com/unicode-org/cldr
Changed: keywords that fit several emoji are left out, and names are put into sentences. The sentences, and the nouns
that CLDR does not have, are part of imagen_fast (Apache License 2.0).
"""


def build_dataset(
    out_dir: str | os.PathLike[str],
    *,
    font: str | os.PathLike[str] | None = None,
    annotations_dir: str | os.PathLike[str] | None = None,
    selection: str | Sequence[Concept] = "common",
    progress: bool = True,
) -> EmojiDataset:
    """Write the data set to `out_dir` and open it. The same inputs give the same bytes.

    Args:
        out_dir: the directory to write; an older data set there is replaced once the new one is whole.
        font: a font with CBDT bitmaps; by default Debian's Noto Color Emoji.
        annotations_dir: a directory with CLDR's `en.xml` and `zh.xml`; by default Debian's.
        selection: the name of a set in `selection.SELECTIONS`, or the concepts themselves.
        progress: show a progress bar on stderr.

    Raises:
        UserError: a source is missing or unreadable, the selection is unknown or empty, or one caption would name two
            pictures.
        OutputError: `out_dir` is something other than a data set, or cannot be written.

    Example:
        >>> build_dataset("emoji").captions(0, language="en")[:2]  # doctest: +SKIP
        ['smiley', 'a smiley']
    """
    concepts = resolve_selection(selection)
    if not concepts:
        raise UserError("selection: needs at least one emoji, got none")
    _refuse_to_replace(Path(out_dir))
    source = BitmapFont(font)
    annotations = {language: read_annotations(annotations_dir, language) for language in LANGUAGES}
    items = _captioned_items(concepts, annotations)
    with atomic_directory(out_dir) as directory:
        images = np.empty((len(concepts), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for index, concept in enumerate(tqdm(concepts, desc="emoji", unit="picture", disable=not progress)):
            images[index] = square_on_white(source.picture(concept.char), IMAGE_SIZE)
        np.save(directory / IMAGES_FILE, images)
        text = json.dumps({"version": FORMAT_VERSION, "items": items}, ensure_ascii=False, indent=1)
        (directory / CAPTIONS_FILE).write_text(text + "\n", encoding="utf-8")
        credit = _LICENSES.format(
            version=source.name(5),
            copyright=source.name(0),
            cldr_copyright=annotations["en"].copyright,
            cldr_licence=annotations["en"].licence,
        )
        (directory / LICENSES_FILE).write_text(credit, encoding="utf-8")
    return EmojiDataset(out_dir)


def _captioned_items(concepts: Sequence[Concept], annotations: dict[str, AnnotationFile]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for concept in concepts:
        names = {f"name_{language}": concept.name(language) for language in LANGUAGES}
        items.append({"char": concept.char, **names, "train": {}, "held_out": {}})
    for language in LANGUAGES:
        naming = naming_annotations(concepts, annotations[language].annotations, language)
        for item, concept, names_of_it in zip(items, concepts, naming, strict=True):
            item["train"][language] = train_captions(concept, language, names_of_it)
            item["held_out"][language] = held_out_captions(concept, language)
    _refuse_ambiguity(items)
    return items


def _refuse_ambiguity(items: Sequence[dict[str, Any]]) -> None:
    owner: dict[str, str] = {}
    for item in items:
        for caption in {caption for split in SPLITS for own in item[split].values() for caption in own}:
            other = owner.setdefault(caption.lower(), item["char"])
            if other != item["char"]:
                raise UserError(f"selection: {caption!r} names both {other} and {item['char']}")


def _refuse_to_replace(out_dir: Path) -> None:
    """A directory of something else is never deleted for a data set."""
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / CAPTIONS_FILE).is_file():
        raise OutputError(f"cannot write {out_dir}: the directory holds something other than an emoji data set")
