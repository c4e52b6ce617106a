from __future__ import annotations

from collections.abc import Iterator

import pytest

from imagen_fast import _native

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, in use."""
    best = _native.cpu_capability()
    if CAPABILITIES.index(request.param) > CAPABILITIES.index(best):
        pytest.skip(f"this machine has no {request.param}")
    _native.set_cpu_capability(request.param)
    yield request.param
    _native.set_cpu_capability(best)


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every op is tested with outputs that are NaN until they are written."""
