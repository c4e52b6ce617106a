"""Custom kernels for pixel-space text-to-image diffusion, and the Imagen system around them.

Importing this package compiles nothing and needs no GPU, no Triton and no compiler. Its parts are imported when they
are first used, so that `imagen-fast --help` does not wait for PyTorch; importing `imagen_fast.ops` registers the
operators.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import diffusion, models, nn, ops, testing
    from .accelerate import Report, accelerate, invalidate, restore
    from .backends import explain, use_backend
    from .reference.attention import RelativePositionBias

__version__ = "0.1.0"
__all__ = [
    "RelativePositionBias",
    "Report",
    "__version__",
    "accelerate",
    "diffusion",
    "explain",
    "invalidate",
    "models",
    "nn",
    "ops",
    "restore",
    "testing",
    "use_backend",
]

_MODULES = ("diffusion", "models", "nn", "ops", "testing")
_MODULE_OF = {
    "RelativePositionBias": "reference.attention",
    "Report": "accelerate",
    "accelerate": "accelerate",
    "explain": "backends",
    "invalidate": "accelerate",
    "restore": "accelerate",
    "use_backend": "backends",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: importing its module `accelerate` binds the function of that name, not the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "accelerate" and isinstance(value, ModuleType):
            value = value.accelerate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
