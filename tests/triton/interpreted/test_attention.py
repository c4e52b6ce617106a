"""attention's Triton kernels in the interpreter, forward and backward, held to float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_fast import RelativePositionBias, ops
from imagen_fast.testing import assert_op_as_accurate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def arguments(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 21,
    keys: int = 37,
    context: int = 13,
    width: int = 16,
) -> dict[str, Any]:
    """Queries as they come out of a projection, keys and values from a packed one."""
    packed = randn(batch, keys, 2, kv_heads, width, dtype=dtype)
    k, v = packed.permute(2, 0, 3, 1, 4)
    values = {"q": randn(batch, queries, heads, width, dtype=dtype).transpose(1, 2), "k": k, "v": v}
    if context:
        values["context_k"] = randn(batch, kv_heads, context, width, dtype=dtype)
        values["context_v"] = randn(batch, kv_heads, context, width + 1, dtype=dtype)[..., :width]
    return values


@DTYPES
def test_two_segments_and_grouped_heads(dtype: torch.dtype) -> None:
    assert_op_as_accurate(ops.attention, **arguments(dtype))


@pytest.mark.parametrize(
    ("sizes"),
    [
        {"batch": 1, "queries": 1, "keys": 1, "context": 0},
        {"queries": 130, "keys": 70, "context": 0, "kv_heads": 4},
        {"queries": 17, "keys": 0, "context": 5},
        {"queries": 5, "keys": 77, "context": 64, "kv_heads": 1},
        {"width": 8, "context": 3},
        {"width": 72, "queries": 9},
        {"width": 256, "queries": 3, "keys": 9, "context": 0},
        {"batch": 0},
        {"queries": 0},
    ],
    ids=str,
)
def test_sizes(sizes: dict[str, int]) -> None:
    assert_op_as_accurate(ops.attention, **arguments(**sizes))


@DTYPES
def test_masked_keys(dtype: torch.dtype) -> None:
    values = arguments(dtype)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False  # nothing to attend to
    assert_op_as_accurate(ops.attention, **values, key_mask=mask)


@pytest.mark.parametrize("shape", [(2, 4, 21, 50), (1, 4, 21, 50), (2, 1, 1, 50), (1, 1, 21, 50), (50,)], ids=str)
def test_tensor_bias(shape: tuple[int, ...]) -> None:
    assert_op_as_accurate(ops.attention, **arguments(), bias=randn(*shape))


def test_a_bias_of_minus_infinity_masks() -> None:
    bias = randn(2, 1, 21, 50)
    bias[0, 0, :, 7] = -torch.inf
    bias[1, 0, 3] = -torch.inf
    assert_op_as_accurate(ops.attention, **arguments(), bias=bias)


@pytest.mark.parametrize("bidirectional", [True, False])
@DTYPES
def test_relative_position_bias(dtype: torch.dtype, bidirectional: bool) -> None:
    bias = RelativePositionBias(randn(8, 4, dtype=dtype), bidirectional, max_distance=9)
    assert_op_as_accurate(ops.attention, **arguments(dtype), bias=bias, scale=1.0)


@DTYPES
def test_normalised_queries_and_keys(dtype: torch.dtype) -> None:
    q_scale, k_scale = randn(16, dtype=dtype).abs() + 0.5, randn(16, dtype=dtype).abs() + 0.5
    values = arguments(dtype, kv_heads=1)
    assert_op_as_accurate(ops.attention, **values, q_scale=q_scale, k_scale=k_scale, scale=8.0)


def test_large_scores() -> None:
    values = arguments()
    values["q"] = values["q"] * 1e3
    assert_op_as_accurate(ops.attention, **values)


def test_equal_keys() -> None:
    values = arguments(context=0)
    values["k"] = values["k"][:, :, :1].expand_as(values["k"])
    assert_op_as_accurate(ops.attention, **values)


def test_the_same_bits_every_time_and_in_every_batch() -> None:
    values = {name: value.requires_grad_() for name, value in arguments(torch.bfloat16).items()}

    def run(only: slice) -> list[Tensor]:
        out = ops.attention(**{name: value[only] for name, value in values.items()})
        weights = torch.arange(out[0].numel()).reshape(out[0].shape).to(out.dtype) / out[0].numel()
        return [out, *(g[only] for g in torch.autograd.grad((out * weights).sum(), list(values.values())))]

    first = run(slice(None))
    for again, before in zip(run(slice(None)), first, strict=True):
        assert torch.equal(again, before)
    for alone, before in zip(run(slice(1, 2)), first, strict=True):
        assert torch.equal(alone, before[1:2])
