"""One picture that shows a whole data set."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...files import atomic_file
from .dataset import EmojiDataset

_LABEL_HEIGHT = 14


def contact_sheet(
    dataset: EmojiDataset, path: str | os.PathLike[str], *, columns: int = 16, cell: int = 96, labels: bool = True
) -> Path:
    """Write all pictures of a data set as one image, with their English names.

    Args:
        columns: pictures in a row.
        cell: side of a picture, in pixels.
        labels: write the name under each picture.

    Raises:
        ValueError: `columns` or `cell` is less than 1.
        OutputError: `path` cannot be written.

    Example:
        >>> contact_sheet(EmojiDataset("emoji"), "emoji.png")  # doctest: +SKIP
    """
    if columns < 1 or cell < 1:
        raise ValueError(f"columns, cell: expected at least 1, got {columns} and {cell}")
    height = cell + (_LABEL_HEIGHT if labels else 0)
    rows = -(-len(dataset) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for index in range(len(dataset)):
        left, top = index % columns * cell, index // columns * height
        picture = Image.fromarray(dataset.images[index]).resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        if labels:
            draw.text((left + cell / 2, top + cell), dataset.name(index, "en"), fill="black", font=font, anchor="ma")
    with atomic_file(path) as temporary:
        sheet.save(temporary)
    return Path(path)
