"""`imagen-fast compare-solvers`: the same pictures by every solver in few and in many steps, in one labelled grid."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .pictures import check_picture_path, grid, labelled_grid, render_label, save_picture

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = (5, 10, 20, 50)
PICTURE_SIZE = 128


def run(
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "emoji",
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> list[list[list[Image]]]:
    """Draw the prompts from one seed with every solver and number of steps, and write the grid.

    A row of the grid is a solver, a column a number of steps of every stage, and a cell the prompts side by side. Rows
    after the first two columns should look alike: all solvers approach the same distribution, the deterministic ones
    the same pictures.

    Args:
        prompts: what to draw.
        out: the picture to write; checked before any work.
        model: a model's directory, or "emoji": the one that ships.
        steps: of every stage.
        seed: fixes the pictures.
        progress: show a progress bar on stderr.

    Returns:
        The pictures, by solver, number of steps and prompt.
    """
    out = check_picture_path(out)
    import imagen_fast
    from imagen_fast.models.cascade_config import SOLVERS

    imagen = imagen_fast.models.Imagen.from_pretrained(model)
    imagen_fast.accelerate(imagen)
    drawn = [[_drawn(imagen, prompts, solver, count, seed, progress) for count in steps] for solver in SOLVERS]
    cells = [[grid(pictures, columns=2) for pictures in row] for row in drawn]
    columns = min(2, len(prompts))
    labels = [render_label(f"{count} steps") for count in steps]
    save_picture(labelled_grid(cells, [render_label(s) for s in SOLVERS], labels, columns * PICTURE_SIZE), out)
    print(f"{out}: {', '.join(SOLVERS)} in {', '.join(map(str, steps))} steps a stage, seed {seed}")
    return drawn


def _drawn(imagen: Any, prompts: Sequence[str], solver: str, steps: int, seed: int, progress: bool) -> list[Image]:
    start = time.perf_counter()
    pictures = imagen.sample(list(prompts), seed=seed, steps=steps, solver=solver, progress=progress)
    print(f"{solver}, {steps} steps: {time.perf_counter() - start:.1f} s", flush=True)
    return pictures  # type: ignore[no-any-return]
