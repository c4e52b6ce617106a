from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

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


def assert_saved_tensors_may_be_restrided(run: Callable[[], Any], leaves: Sequence[Tensor], dy: Any) -> None:
    """Gradients are the same where saved tensors come back in other strides, as from hooks that offload them."""
    expected = torch.autograd.grad(run(), leaves, dy)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved, lambda saved: torch.stack([saved] * 2, -1)[..., 0]
    ):
        y = run()
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
