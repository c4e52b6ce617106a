"""The ops, one module each: `ops/<op>.py` defines the function `<op>`, which is found here by its name alone."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from .. import _native

if TYPE_CHECKING:  # static type checkers find nothing by running code: without this they see the modules
    from .abs_quantile import abs_quantile as abs_quantile
    from .add_noise import add_noise as add_noise
    from .attention import attention as attention
    from .channel_rms_norm_act import channel_rms_norm_act as channel_rms_norm_act
    from .gated_gelu import gated_gelu as gated_gelu
    from .group_norm_act import group_norm_act as group_norm_act
    from .rms_norm import rms_norm as rms_norm
    from .sampler_step import sampler_step as sampler_step

__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

for _name in __all__:
    globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_name}"), _name)

_native.load()  # a program that was exported calls the operators before anybody asks which backend there is
