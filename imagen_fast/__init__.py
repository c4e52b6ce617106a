"""Custom kernels for pixel-space text-to-image diffusion, and the Imagen system around them.

Importing this package compiles nothing and needs no GPU, no Triton and no compiler. `models`, `diffusion` and
`training` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import nn, ops, testing
from .backends import explain, use_backend

if TYPE_CHECKING:
    from . import diffusion, models

__version__ = "0.1.0"
__all__ = ["__version__", "diffusion", "explain", "models", "nn", "ops", "testing", "use_backend"]

_LAZY_MODULES = ("diffusion", "models")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
