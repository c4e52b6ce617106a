"""A small text-to-image data set: emoji with English and Chinese captions."""

from __future__ import annotations

from .build import build_dataset
from .dataset import EmojiDataset
from .sheet import contact_sheet

__all__ = ["EmojiDataset", "build_dataset", "contact_sheet"]
