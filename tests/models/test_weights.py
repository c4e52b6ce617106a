"""The shipped cascade: its size, its formats, and a model card that says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import imagen_fast

FOLDER = Path(imagen_fast.__file__).parent / "models" / "weights" / "emoji"


def test_it_is_small_and_nothing_in_it_is_pickled():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("row", range(4))
def test_the_card_says_what_was_measured(row):
    result = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))["results"][row]
    language = {"en": "English", "zh": "Chinese"}[result["language"]]
    expected = f"| {language} | {result['accuracy']:.1%} of {result['count']} |"
    rows = [line for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if line.endswith("|")]
    kind = "training" if result["split"] == "train" else "held-out"
    assert any(line.startswith(f"| {kind}") and line.endswith(expected) for line in rows)


def test_the_card_counts_the_parameters():
    model = imagen_fast.models.Imagen.from_pretrained("emoji")
    parts = (model.text_encoder, *model.unets.values())
    card = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    for part in parts:
        millions = sum(parameter.numel() for parameter in part.parameters()) / 1e6
        assert f"({millions:.1f} M" in card
