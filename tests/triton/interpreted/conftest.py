"""Tests that are run in Triton's interpreter; `tests/triton/test_interpreter.py` starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import imagen_fast
from imagen_fast import _triton

collect_ignore_glob = [] if _triton.INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_triton(poisoned_memory: None) -> Iterator[None]:
    with imagen_fast.use_backend("triton"):
        yield
