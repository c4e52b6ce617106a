"""A pytest plugin that halves the time of Triton's interpreter.

Whenever a kernel calls a device function, the interpreter replaces the functions of `triton.language` again, which
takes a millisecond, though it has done so when the kernel began. Here it does so only where they are not replaced.
"""

from __future__ import annotations

from typing import Any

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
