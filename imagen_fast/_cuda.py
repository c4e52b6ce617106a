"""The CUDA C++ kernels: finds and loads their library where there is a CUDA device, and says why where it cannot.

For tests, the environment variable `IMAGEN_FAST_CUDA_EMULATOR` names a library of the same sources, compiled for the
host SIMT emulator (`csrc/common/simt`): it implements the CUDA operators for tensors of the CPU.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch

from ._tracing import traced_as_constant

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


_device_reasons: dict[int, str | None] = {}


@traced_as_constant
def device_reason(index: int) -> str | None:
    """Why the library that is loaded cannot run on a CUDA device, or None if it can."""
    if index not in _device_reasons:
        major, minor = torch.cuda.get_device_capability(index)
        fits = has_code_for(library(), (major, minor))
        _device_reasons[index] = None if fits else f"it was built for {library()}, and the device is {major}.{minor}"
    return _device_reasons[index]


def has_code_for(built: str, capability: tuple[int, int]) -> bool:
    """Whether a library runs on a device.

    Args:
        built: as `library()` says it: "CUDA 8.0 9.0a 12.0+PTX".
        capability: of the device.

    Machine code runs on its architecture and on later ones of the same generation; with the suffix a on its own alone;
    PTX on all later ones. That of 10.0 and later is the PTX of 9.0 (see `gencode` in setup.py).
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", built):
        of = int(major), int(minor)
        if capability == of or (suffix != "a" and capability[0] == of[0] and capability[1] >= of[1]):
            return True
        if ptx and not suffix and capability >= min(of, (9, 0)):
            return True
    return False


def set_emulator_option(name: str, value: object) -> None:
    """Set an option of the emulator, for tests, such as "order" to "reverse"; see `csrc/common/simt/launch.h`."""
    torch.ops.imagen_fast._set_emulator_option(name, str(value))
