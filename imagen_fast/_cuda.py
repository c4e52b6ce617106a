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

_SCHEMAS = torch.library.Library("imagen_fast", "FRAGMENT")
_SCHEMAS.define("_cuda_library() -> str")
_SCHEMAS.define("_set_emulator_option(str name, str value) -> ()")


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


def library() -> str:
    """What the library that is loaded was built for: "CUDA 8.0 9.0a", or a flavour of the emulator."""
    return torch.ops.imagen_fast._cuda_library()


def set_emulator_option(name: str, value: object) -> None:
    """Set an option of the emulator, for tests, such as "order" to "reverse"; see `csrc/common/simt/launch.h`."""
    torch.ops.imagen_fast._set_emulator_option(name, str(value))
