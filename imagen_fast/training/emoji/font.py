"""Pictures of a colour bitmap font: the PNG images of its CBDT table.

Source: OpenType specification, CBDT and CBLC tables; read with fontTools.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


class BitmapFont:
    """The pictures of the largest strike of a CBDT font, found by character.

    Args:
        path: the font; by default where Debian installs Noto Color Emoji.

    Raises:
        UserError: the font is missing, cannot be read or has no bitmaps, or fontTools is not installed.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path or DEFAULT_FONT)
        if not self.path.is_file():
            raise UserError(
                f"there is no font {self.path}; install it with "
                "`apt-get install fonts-noto-color-emoji unicode-cldr-core`, or give another file as font (--font)"
            )
        try:
            from fontTools.ttLib import TTFont, TTLibError
        except ImportError as error:
            raise UserError(
                "the emoji data set is read with fontTools: pip install 'imagen-fast[train]' or fonttools"
            ) from error
        try:
            self._font: Any = TTFont(self.path, lazy=True)
            if "CBDT" not in self._font or "CBLC" not in self._font:
                raise UserError(f"{self.path} holds no bitmaps (no CBDT table); Debian's Noto Color Emoji does")
            sizes = [strike.bitmapSizeTable.ppemY for strike in self._font["CBLC"].strikes]
            self._glyphs: dict[str | None, Any] = self._font["CBDT"].strikeData[sizes.index(max(sizes))]
            self._names: dict[int, str] = self._font.getBestCmap()
        except (TTLibError, OSError, struct.error) as error:
            raise UserError(f"{self.path} is not a font that can be read: {error}") from error

    def name(self, name_id: int) -> str:
        """An entry of the font's name table: 0 copyright, 5 version, 13 licence, 14 its address."""
        return self._font["name"].getDebugName(name_id) or ""

    def picture(self, char: str) -> Image.Image:
        """The bitmap of one character, RGBA, as stored.

        Raises:
            UserError: the font has none, or `char` is a sequence of several code points.
        """
        code_point = char.removesuffix("\ufe0f")
        name = self._names.get(ord(code_point)) if len(code_point) == 1 else None
        data = getattr(self._glyphs.get(name), "imageData", None)
        if not data:
            raise UserError(f"the font {self.path} holds no picture of {char}")
        return Image.open(io.BytesIO(data)).convert("RGBA")


def square_on_white(picture: Image.Image, size: int) -> np.ndarray:
    """Composite on white, as an array (size, size, 3) of uint8.

    Noto's bitmaps are 136x128 with four empty columns at each side. Empty margins are cut, which leaves the artist's
    pixels as they are; a picture that is not square without them is padded and resized.
    """
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    rgb = white.convert("RGB")

    box = _centred(picture.size, min(picture.size))
    if not _inside(picture.getchannel("A").getbbox(), box):
        box = _centred(picture.size, max(picture.size))
    square = Image.new("RGB", (box[2] - box[0],) * 2, "white")
    square.paste(rgb, (-box[0], -box[1]))
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square)


def _centred(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def _inside(inner: tuple[int, int, int, int] | None, outer: tuple[int, int, int, int]) -> bool:
    if inner is None:
        return True
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]
