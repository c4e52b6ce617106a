"""The C++ kernels for the CPU: finds and loads the library, and says why where it cannot."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "lib" / "libimagen_fast_cpu.so"


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
