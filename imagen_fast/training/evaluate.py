"""How often a sampled picture is the one its sentence names: nearest neighbour among the data set's pictures.

A picture counts as right if, of all pictures of the data set at the first stage's size, the one nearest to it in mean
squared error is that of the caption. The captions are those held out from training: other templates, other adjectives.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tabulate import tabulate
from tqdm.auto import tqdm

from ..files import atomic_file, check_writable
from ..models import Imagen
from ..provenance import collect
from .emoji.dataset import EmojiDataset
from .stages import resized


@dataclass(frozen=True)
class Evaluation:
    """Share of right pictures, and what was drawn instead of what."""

    split: str
    language: str
    count: int
    accuracy: float
    mistakes: tuple[tuple[str, str], ...]  # caption, name of the nearest picture


def run(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate on training and held-out captions in both languages; print a table, and write JSON to `out`.

    Args:
        model: a directory, or the name of a cascade that ships.
        data: the data set's directory.
        count: captions of each kind; one a picture if None.
        steps, seed: as of `Imagen.sample`.
    """
    if out is not None:
        check_writable(out)
    cascade, dataset = Imagen.from_pretrained(model), EmojiDataset(data)
    results = [
        evaluate(
            cascade,
            dataset,
            language=language,
            split=split,
            count=count or len(dataset),
            steps=steps,
            seed=seed,
            progress=progress,
        )
        for split in ("train", "held_out")
        for language in ("en", "zh")
    ]
    rows = [(r.split, r.language, r.count, f"{r.accuracy:.1%}") for r in results]
    print(tabulate(rows, headers=("captions", "language", "count", "nearest picture is the right one")))
    if out is not None:
        values = {"provenance": asdict(collect()), "seed": seed, "results": [asdict(result) for result in results]}
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def evaluate(
    model: Imagen,
    dataset: EmojiDataset,
    *,
    language: str,
    split: str = "held_out",
    count: int = 162,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> Evaluation:
    """Sample the first stage from captions and look up the nearest pictures.

    Args:
        model: a cascade trained on the data set.
        dataset: its pictures and captions.
        language: "en" or "zh"; split: "held_out" or "train".
        count: number of captions, spread evenly over the pictures.
        steps, guidance, seed: as of `Imagen.sample`.
        batch_size: captions sampled at a time.
        progress: show a progress bar.
    """
    generator = np.random.default_rng(seed)
    indices = [i % len(dataset) for i in range(count)]
    captions = [str(generator.choice(dataset.captions(i, split, language))) for i in indices]
    stage = model.config.stages[0]
    truth = resized(dataset.images, stage.size).flatten(1)
    mistakes = []
    for start in tqdm(range(0, count, batch_size), disable=not progress, desc=f"{split} {language}", unit="batch"):
        batch = captions[start : start + batch_size]
        pictures = model.sample(
            batch, seed=seed + start, steps=steps, guidance=guidance, progress=False, until=stage.name
        )
        drawn = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
        nearest = torch.cdist(drawn.float().flatten(1) / 127.5 - 1, truth).argmin(1).tolist()
        for caption, wanted, found in zip(batch, indices[start : start + batch_size], nearest, strict=True):
            if wanted != found:
                mistakes.append((caption, dataset.name(found, language)))
    return Evaluation(split, language, count, 1 - len(mistakes) / count, tuple(mistakes))
