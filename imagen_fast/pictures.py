"""Pictures to files: several in one grid, saved whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError
from .files import atomic_file, check_writable

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABEL_SIZE = 20  # pixels
MARGIN = 12


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


def labelled_grid(
    rows: Sequence[Sequence[Image]], row_labels: Sequence[Image], column_labels: Sequence[Image], size: int
) -> Image:
    """Rows of pictures on white, each fitted into `size` pixels, with a label beside each row and above each column.

    Args:
        rows: the pictures, as many in each row as there are column_labels.
        row_labels, column_labels: see `render_label`.
        size: of the longer side of a picture.
    """
    from PIL import Image, ImageOps

    left = max(label.width for label in row_labels) + 2 * MARGIN
    top = LABEL_SIZE + 3 * MARGIN
    fitted = [[ImageOps.contain(p.convert("RGB"), (size, size), Image.Resampling.LANCZOS) for p in row] for row in rows]
    column = max(*(p.width for row in fitted for p in row), *(label.width for label in column_labels)) + MARGIN
    heights = [max(p.height for p in row) + MARGIN for row in fitted]
    sheet = Image.new("RGB", (left + column * len(column_labels), top + sum(heights)), "white")
    for x, label in enumerate(column_labels):
        sheet.paste("black", (left + x * column, (top - label.height) // 2), label)
    for y, (row, label) in enumerate(zip(fitted, row_labels, strict=True)):
        above = top + sum(heights[:y])
        sheet.paste("black", (MARGIN, above + (heights[y] - MARGIN - label.height) // 2), label)
        for x, picture in enumerate(row):
            sheet.paste(picture, (left + x * column, above))
    return sheet


def render_label(text: str, font: Any = None) -> Image:
    """`text` as a picture of its coverage, 0 to 255, one line high. Pillow's own font, the default, has ASCII alone."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(LABEL_SIZE) if font is None else font
    left, _, right, _ = font.getbbox(text)
    label = Image.new("L", (int(right - left) + 2, sum(font.getmetrics())))
    ImageDraw.Draw(label).text((1 - left, 0), text, fill=255, font=font)
    return label


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
