"""A pytest plugin that halves the time of Triton's interpreter, and lets it round to bfloat16 as GPUs do.

Whenever a kernel calls a device function, the interpreter replaces the functions of `triton.language` again, which
takes a millisecond, though it has done so when the kernel began. Here it does so only where they are not replaced.

From float32 to bfloat16 it cuts off; here it rounds to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Nothing:
    def restore(self) -> None:
        pass


_patch = interpreter._patch_lang


def _patch_once(function: Any) -> Any:
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return _Nothing()
    return _patch(function)


interpreter._patch_lang = _patch_once

_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_and_round(self: Any, source: Any, to: Any) -> Any:
    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, to)
    bits = source.data.view(np.uint32)
    rounded = np.where(np.isnan(source.data), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return interpreter.TensorHandle(rounded.astype(np.uint16), to.scalar)


interpreter.InterpreterBuilder.cast_impl = _cast_and_round
