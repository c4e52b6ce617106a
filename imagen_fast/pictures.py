"""Pictures to files: several in one grid, saved whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OutputError
from .files import atomic_file, check_writable

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_picture_path(path: str | os.PathLike[str]) -> Path:
    """Raise `OutputError` now if no picture could be saved as `path` later; return it as a `Path`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"cannot write {path}: a picture's name ends in {', '.join(SUFFIXES)}")
    return check_writable(path)


def save_picture(image: Image, path: str | os.PathLike[str]) -> None:
    """Save `image` in the format that the name of `path` says; raises `OutputError` and leaves no half of it."""
    with atomic_file(path) as temporary:
        image.save(temporary)


def grid(images: Sequence[Image], columns: int = 4, gap: int = 2) -> Image:
    """The pictures, all of one size, row by row on white, `gap` pixels apart."""
    from PIL import Image

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet
