"""The C++ kernels for the CPU: finds and loads their library, says why where it cannot, and their instruction set."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import UserError

LIBRARY = Path(__file__).parent / "lib" / "libimagen_fast_cpu.so"

_SCHEMAS = torch.library.Library("imagen_fast", "FRAGMENT")
_SCHEMAS.define("_cpu_capability() -> str")
_SCHEMAS.define("_set_cpu_capability(str name) -> ()")
_SCHEMAS.define("_matrix_tiles() -> str")
_SCHEMAS.define("_set_matrix_tiles(str name) -> ()")
_SCHEMAS.define("_poison_outputs(bool on) -> ()")
_SCHEMAS.define("_unwritten_output(int size) -> Tensor")
_SCHEMAS.define("_fingerprints(Tensor[] tensors) -> Tensor")


@functools.cache
def unavailable_reason() -> str | None:
    """Load the library if it is not loaded yet; None if that worked, else why not."""
    if not LIBRARY.exists():
        return "the C++ library is not built (reinstall imagen_fast on a machine with a C++ compiler)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the C++ library does not load: {error}"
    return None


def load() -> bool:
    """Whether the library could be loaded."""
    return unavailable_reason() is None


def fingerprints(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where each tensor lies, its dtype, sizes and strides, and, on the CPU, a few of its numbers: a row for each.

    Numbers are taken at equal distances; which ones depends on sizes and strides alone.
    """
    return torch.ops.imagen_fast._fingerprints(tensors)


def cpu_capability() -> str:
    """The instruction set of the C++ kernels: "default", "avx2", "avx512" or "avx512_bf16"; loads the library."""
    _require()
    try:
        return torch.ops.imagen_fast._cpu_capability()
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        raise UserError(f"the environment variable IMAGEN_FAST_CPU_CAPABILITY: {message}") from error


def set_cpu_capability(name: str) -> None:
    """Use a lower instruction set than the best one, for tests; process-wide."""
    _require()
    torch.ops.imagen_fast._set_cpu_capability(name)


def matrix_tiles() -> str:
    """By which matrix tiles (AMX) attention multiplies bfloat16: "none", the "hardware"'s or "emulated" ones.

    They are used beside the instruction set "avx512_bf16" alone.
    """
    _require()
    return torch.ops.imagen_fast._matrix_tiles()


def set_matrix_tiles(name: str) -> None:
    """Use the machine's tiles, emulated ones or none, for tests; process-wide."""
    _require()
    torch.ops.imagen_fast._set_matrix_tiles(name)


def poison_outputs(on: bool) -> None:
    """Fill the outputs of the C++ kernels with NaN before the kernels run, for tests; process-wide."""
    _require()
    torch.ops.imagen_fast._poison_outputs(on)


def unwritten_output(size: int) -> torch.Tensor:
    """An output of the C++ kernels, (1, size) in float32, that no kernel wrote to; for tests."""
    _require()
    return torch.ops.imagen_fast._unwritten_output(size)


def _require() -> None:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
