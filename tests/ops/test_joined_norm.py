"""Group norm of two pictures beside each other gives the very numbers of the norm of their concatenation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imagen_fast import _native, ops
from imagen_fast.ops._joined_norm import joined_group_norm_act

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built here")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def picture(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + seed
    return x.to(dtype, memory_format=torch.channels_last)


def check(x: Tensor, skip: Tensor, groups: int, activation: str | None = "silu") -> Tensor:
    channels = x.shape[1] + skip.shape[1]
    weight, bias = (torch.randn(channels, generator=torch.Generator().manual_seed(s)).to(x.dtype) for s in (5, 6))
    found = joined_group_norm_act(x, skip, groups, weight, bias, activation, 1e-5)
    whole = torch.cat((x, skip), dim=1).contiguous(memory_format=torch.channels_last)
    expected = ops.group_norm_act(whole, groups, weight, bias, activation=activation, eps=1e-5)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    # batch, channels of x and of skip, height, width, groups; the last one is split among threads
    [(2, 3, 5, 4, 5, 2), (1, 1, 1, 3, 2, 1), (2, 48, 16, 9, 7, 4), (3, 64, 32, 1, 1, 32), (1, 96, 32, 40, 40, 8)],
    ids=str,
)
def test_it_is_the_norm_of_the_concatenation(case: tuple[int, ...], dtype: torch.dtype, capability: str) -> None:
    batch, own, more, height, width, groups = case
    x, skip = (picture(batch, c, height, width, dtype=dtype, seed=s) for s, c in enumerate((own, more)))
    check(x, skip, groups)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_activations(activation: str | None) -> None:
    x, skip = (picture(2, 24, 5, 5, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    check(x, skip, 6, activation)


def test_no_samples() -> None:
    x = torch.empty(0, 4, 3, 3).to(memory_format=torch.channels_last)
    assert joined_group_norm_act(x, x, 2, None, None, None, 1e-5).shape == (0, 8, 3, 3)


@pytest.mark.parametrize("how", ["size", "dtype", "layout", "groups", "weight"])
def test_what_does_not_fit(how: str) -> None:
    x, skip, groups, weight = (*(picture(2, 4, 3, 3, dtype=torch.float32, seed=s) for s in (0, 1)), 4, torch.ones(8))
    if how == "size":
        skip = skip[:, :, :2].contiguous(memory_format=torch.channels_last)
    elif how == "dtype":
        skip = skip.half()
    elif how == "layout":
        skip = skip.contiguous()
    elif how == "groups":
        groups = 3
    else:
        weight = torch.ones(4)
    with pytest.raises(RuntimeError, match="group_norm_act"):
        joined_group_norm_act(x, skip, groups, weight, None, None, 1e-5)
