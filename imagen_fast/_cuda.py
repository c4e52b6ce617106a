"""The CUDA C++ kernels: finds and loads their library where there is a CUDA device, and says why where it cannot.

For tests, the environment variable `IMAGEN_FAST_CUDA_EMULATOR` names a library of the same sources, compiled for the
host SIMT emulator (`csrc/common/simt`): it implements the CUDA operators for tensors of the CPU.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "lib" / "libimagen_fast_cuda.so"

_EMULATOR = os.environ.get("IMAGEN_FAST_CUDA_EMULATOR", "")


def emulated() -> bool:
    """Whether the kernels run on tensors of the CPU in this process, by the host emulator."""
    return bool(_EMULATOR)


@functools.cache
def unavailable_reason() -> str | None:
    """Load the library if it is not loaded yet; None if that worked, else why not."""
    library = Path(_EMULATOR) if _EMULATOR else LIBRARY
    if not library.exists():
        return "the CUDA library is not built (reinstall imagen_fast on a machine with nvcc)"
    if not _EMULATOR and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None
