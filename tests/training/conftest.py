"""A tiny data set: five plain colours, as the builder would write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "black": "黑", "white": "白"}
RGB = ((230, 30, 30), (30, 200, 60), (40, 60, 220), (10, 10, 10), (250, 250, 250))


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("colours")
    images = np.broadcast_to(np.array(RGB, dtype=np.uint8)[:, None, None], (5, 128, 128, 3))
    np.save(directory / "images.npy", np.ascontiguousarray(images))
    items = [
        {
            "char": en[0],
            "name_en": en,
            "name_zh": zh,
            "train": {"en": [en, f"a {en} square"], "zh": [zh, f"{zh}色"]},
            "held_out": {"en": [f"some {en}"], "zh": [f"{zh}的"]},
        }
        for en, zh in COLOURS.items()
    ]
    (directory / "captions.json").write_text(json.dumps({"version": 1, "items": items}))
    return directory
