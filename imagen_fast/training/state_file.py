"""Reading a run's tensors back, with one kind of error for whatever is wrong with the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

TENSORS = "state.safetensors"


class StateFile:
    """The tensors of a checkpoint by name; made by `open_state`."""

    def __init__(self, file: safe_open, path: Path) -> None:
        self._file = file
        self.path = path
        self.names = frozenset(file.keys())

    def copy(self, name: str, to: Tensor) -> Tensor:
        """Copy a tensor into `to`, of the same shape, and return that. Raises `CheckpointError` for another shape."""
        shape = tuple(self._file.get_slice(name).get_shape())
        if shape != tuple(to.shape):
            raise CheckpointError(f"{self.path}: {name} has shape {shape}, this run's has {tuple(to.shape)}")
        with torch.no_grad():
            return to.copy_(self._file.get_tensor(name))


@contextmanager
def open_state(checkpoint: Path, purpose: str) -> Iterator[StateFile]:
    """Open the tensors of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, or misses a tensor that the block asks for. `purpose` completes
            "cannot ... CHECKPOINT".
    """
    try:
        with safe_open(checkpoint / TENSORS, framework="pt") as file:
            yield StateFile(file, checkpoint / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot {purpose} {checkpoint}: {error}") from error
