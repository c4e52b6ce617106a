"""`make demo`: four sentences drawn by the same model with and without the kernels, side by side.

Eager runs as the model is loaded, accelerated in channels-last memory, which makes eager faster too.

Both ways start from the same seed. For each prompt they run one after the other, in turns which goes first, after a
warm-up of both that is not timed.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import check_picture_path, labelled_grid, render_label, save_picture

if TYPE_CHECKING:
    from PIL.Image import Image

# The text of a label that is not ASCII is shipped as a picture, since Pillow's own font has no Chinese and the machine
# may have no fonts at all. They were made from Droid Sans Fallback (Apache License 2.0):
#
#     render_label("一个红苹果", ImageFont.truetype("DroidSansFallbackFull.ttf", LABEL_SIZE)).save(...)
PROMPTS = ("a cute cat", "一只可爱的猫咪", "a space rocket", "一个红苹果")
SHIPPED_LABELS = {"一只可爱的猫咪": "cat.png", "一个红苹果": "apple.png"}
_LABELS = Path(__file__).parent / "assets" / "labels"

PICTURE_SIZE = 256  # pixels


@dataclass(frozen=True)
class Comparison:
    """One prompt drawn both ways; `seconds` and pictures are (eager, accelerated), differences in 8-bit levels."""

    prompt: str
    pictures: tuple[Image, Image]
    seconds: tuple[float, float]
    largest_difference: float
    mean_difference: float


def run(
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "emoji",
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
) -> list[Comparison]:
    """Draw the prompts both ways, write the labelled grid to `out` and print the table.

    Args:
        out: the picture to write; checked before any work.
        model: a model's directory, or "emoji": the one that ships.
        seed: fixes the pictures.
        steps: sampling steps a stage; by default the model's.
        progress: show a progress bar on stderr.
    """
    out = check_picture_path(out)
    load = os.getloadavg()[0]
    import torch

    import imagen_fast

    eager = imagen_fast.models.Imagen.from_pretrained(model)
    accelerated = copy.deepcopy(eager)
    report = imagen_fast.accelerate(accelerated, memory_format=torch.channels_last)
    print(report)
    comparisons = compare(eager, accelerated, PROMPTS, seed=seed, steps=steps, progress=progress)
    save_picture(draw(comparisons), out)
    print(f"\n{table(comparisons)}\n")
    print(f"Seconds for one prompt at a time, with {_threads()} threads, from seed {seed}; a warm-up is not counted.")
    print("Eager is as loaded; in channels-last memory, where the accelerated model is, it would be faster too.")
    if load > (os.cpu_count() or 1):
        print(f"Other work was running when this began (load {load:.1f}): the seconds say little.")
    print("Differences between the two pictures are in levels of 0 to 255.")
    print(f"Pictures: {out}")
    return comparisons


def compare(
    eager: Any, accelerated: Any, prompts: Sequence[str], *, seed: int, steps: int | None, progress: bool
) -> list[Comparison]:
    """Draw each prompt with both models from `seed`, and measure."""
    models = (eager, accelerated)
    for model in models:
        model.sample([prompts[0]], seed=seed, steps=4, progress=False)
    comparisons = []
    for turn, prompt in enumerate(prompts):
        pictures: dict[int, Image] = {}
        seconds: dict[int, float] = {}
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (pictures[which],) = models[which].sample([prompt], seed=seed, steps=steps, progress=progress)
            seconds[which] = time.perf_counter() - start
        largest, mean = difference(pictures[0], pictures[1])
        comparisons.append(Comparison(prompt, (pictures[0], pictures[1]), (seconds[0], seconds[1]), largest, mean))
        print(f"{turn + 1} of {len(prompts)}: eager {seconds[0]:.2f} s, accelerated {seconds[1]:.2f} s", flush=True)
    return comparisons


def difference(first: Image, second: Image) -> tuple[float, float]:
    """The largest and the mean difference between the pixels of two RGB pictures of one size, in 8-bit levels."""
    import numpy as np

    delta = np.abs(np.asarray(first.convert("RGB"), np.int16) - np.asarray(second.convert("RGB"), np.int16))
    return float(delta.max()), float(delta.mean())


def table(comparisons: Sequence[Comparison]) -> str:
    """A row for each prompt and one for all. The prompt stands last: Chinese is wide, and so shifts no column."""
    from tabulate import tabulate

    rows = [(c.seconds, c.largest_difference, c.mean_difference, c.prompt) for c in comparisons]
    total = (sum(c.seconds[0] for c in comparisons), sum(c.seconds[1] for c in comparisons))
    largest = max(c.largest_difference for c in comparisons)
    rows.append((total, largest, statistics.fmean(c.mean_difference for c in comparisons), "all"))
    return tabulate(
        [
            (f"{eager:.2f} s", f"{ours:.2f} s", f"{eager / ours:.2f} x", f"{most:.0f}", f"{mean:.4f}", prompt)
            for (eager, ours), most, mean, prompt in rows
        ],
        headers=("eager", "accelerated", "speed-up", "largest difference", "mean difference", "prompt"),
        disable_numparse=True,
        colalign=("right",) * 5 + ("left",),
    )


def draw(comparisons: Sequence[Comparison]) -> Image:
    """The labelled grid: a column for each prompt, above the eager picture and below the accelerated one."""
    labels = [render_label(name) for name in ("eager", "accelerated")]
    rows = [[c.pictures[which] for c in comparisons] for which in (0, 1)]
    return labelled_grid(rows, labels, [_label(c.prompt) for c in comparisons], PICTURE_SIZE)


def _label(text: str) -> Image:
    from PIL import Image

    if text.isascii():
        return render_label(text)
    with Image.open(_LABELS / SHIPPED_LABELS[text]) as label:
        return label.copy()


def _threads() -> int:
    import torch

    return torch.get_num_threads()
