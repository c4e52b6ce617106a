"""The C++ kernels of attention, at each instruction set: sizes around those of their blocks, what a backward pass is
asked for, memory, and direct calls of the operators."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_fast import RelativePositionBias, _native, ops, use_backend
from imagen_fast.testing import assert_as_accurate, assert_op_as_accurate

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the native library is not built")

common_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])

NAMES = ("q", "k", "v", "context_k", "context_v")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(
    batch: int, q_heads: int, kv_heads: int, queries: int, keys: int, context: int, width: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    sizes = ((q_heads, queries), (kv_heads, keys), (kv_heads, keys), (kv_heads, context), (kv_heads, context))
    return {
        name: torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)
        for name, (heads, length) in zip(NAMES, sizes, strict=True)
    }


# Blocks are of 48 queries, and of 16 to 256 columns by instruction set and pass; the last is often partial.
@common_dtypes
@pytest.mark.parametrize(
    ("queries", "keys", "context"),
    [(1, 257, 0), (7, 16, 16), (48, 255, 1), (49, 64, 63), (95, 513, 33), (97, 31, 300)],
    ids=str,
)
def test_sizes_around_those_of_blocks(kernel: str, queries: int, keys: int, context: int, dtype: torch.dtype) -> None:
    assert_op_as_accurate(ops.attention, **inputs(1, 2, 1, queries, keys, context, 24, dtype))


@common_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 60, 420), (2, 1, 60, 420), (1, 3, 1, 420), (1, 1, 1, 420), (2, 3, 60, 420)])
def test_bias_of_several_blocks(kernel: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Its gradient is written directly or, where scores share the bias, summed up by a kernel of its own."""
    assert_op_as_accurate(ops.attention, **inputs(2, 3, 1, 60, 370, 50, 16, dtype), bias=torch.randn(shape).to(dtype))


def test_bias_that_all_keys_share_has_no_gradient(kernel: str) -> None:
    bias = torch.randn(2, 3, 60, 1, requires_grad=True)
    ops.attention(**inputs(2, 3, 1, 60, 70, 50, 16, torch.float32), bias=bias).square().sum().backward()
    assert bias.grad is not None
    assert not bias.grad.any()


@common_dtypes
def test_relative_bias_of_several_blocks(kernel: str, dtype: torch.dtype) -> None:
    bias = RelativePositionBias(torch.randn(32, 2))
    arguments = inputs(1, 2, 2, 150, 300, 20, 32, dtype)
    bias.table.requires_grad_()
    results = {}
    for name, cast in (("ours", lambda x: x), ("eager", lambda x: x), ("truth", Tensor.double)):
        with use_backend("cpu" if name == "ours" else "eager"):
            given = {key: cast(x) for key, x in arguments.items()}
            out = ops.attention(**given, bias=bias._replace(table=cast(bias.table)), scale=1.0)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            results[name] = (out.detach(), torch.autograd.grad(out, bias.table, weights.to(out.dtype))[0])
    truth_of_table = results["truth"][1].double()
    assert_as_accurate(results["ours"][0], results["eager"][0], results["truth"][0])
    assert_as_accurate(results["ours"][1], results["eager"][1], truth_of_table, name="gradient of the table")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(kernel: str, value: float) -> None:
    arguments = inputs(1, 2, 2, 20, 70, 9, 16, torch.float32)
    clean = ops.attention(**arguments)
    arguments["k"][0, 1, 66, 3] = value
    out = ops.attention(**arguments)
    with use_backend("eager"):
        eager = ops.attention(**arguments)
    assert torch.equal(out[:, 0], clean[:, 0])
    assert torch.equal(out.isnan(), eager.isnan())


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e4])
def test_bias_of_the_lowest_number(kernel: str, lowest: float) -> None:
    """What stands for "not attended" in transformers; a row full of it is attended to evenly."""
    bias = torch.zeros(1, 1, 20, 79)
    bias[..., 40:] = lowest
    bias[..., 3, :] = lowest
    assert_op_as_accurate(ops.attention, **inputs(1, 2, 2, 20, 70, 9, 16, torch.float32), bias=bias)


# ---- Gradients asked for one by one


def all_arguments() -> dict[str, Any]:
    arguments: dict[str, Any] = inputs(1, 4, 2, 51, 60, 9, 16, torch.float32)
    return arguments | {"bias": torch.randn(1, 4, 51, 69), "q_scale": torch.randn(16), "k_scale": torch.randn(16)}


@pytest.mark.parametrize("name", [*NAMES, "bias", "q_scale", "k_scale"])
def test_one_gradient_alone(kernel: str, name: str) -> None:
    arguments = all_arguments()

    def gradients(*names: str) -> tuple[Tensor, ...]:
        given = {key: x.detach().requires_grad_(key in names) for key, x in arguments.items()}
        return torch.autograd.grad(ops.attention(**given).square().sum(), [given[key] for key in names])

    together = dict(zip(arguments, gradients(*arguments), strict=True))
    assert torch.equal(gradients(name)[0], together[name])


def test_gradients_are_the_same_each_time(kernel: str) -> None:
    arguments = {name: x.requires_grad_() for name, x in all_arguments().items()}
    first, *others = (
        torch.autograd.grad(ops.attention(**arguments).square().sum(), list(arguments.values())) for _ in range(3)
    )
    for other in others:
        assert all(map(torch.equal, first, other))


# ---- Matrix tiles


@pytest.fixture
def emulated_tiles() -> Iterator[None]:
    """The kernel for matrix tiles (AMX), on a machine that may have none."""
    if _native.cpu_capability() != "avx512_bf16":
        pytest.skip("matrix tiles are used beside AVX-512 with bf16")
    before = _native.matrix_tiles()
    _native.set_matrix_tiles("emulated")
    try:
        with use_backend("cpu"):
            yield
    finally:
        _native.set_matrix_tiles(before)


@pytest.mark.parametrize("width", [8, 16, 40, 64, 72, 256])
@pytest.mark.parametrize(
    ("queries", "keys", "context"),
    [(1, 1, 0), (16, 16, 16), (17, 31, 1), (48, 64, 77), (33, 290, 15), (95, 0, 33)],
    ids=str,
)
def test_emulated_tiles(emulated_tiles: None, queries: int, keys: int, context: int, width: int) -> None:
    assert_op_as_accurate(ops.attention, **inputs(1, 2, 1, queries, keys, context, width, torch.bfloat16))


def test_emulated_tiles_with_everything(emulated_tiles: None) -> None:
    arguments: dict[str, Any] = inputs(2, 4, 2, 51, 60, 9, 24, torch.bfloat16)
    scales = {name: torch.randn(24).bfloat16() for name in ("q_scale", "k_scale")}
    mask = torch.rand(2, 69) > 0.3
    mask[1] = False
    for bias in (torch.randn(4, 51, 69).bfloat16(), RelativePositionBias(torch.randn(32, 4))):
        assert_op_as_accurate(ops.attention, **arguments, **scales, bias=bias, key_mask=mask, scale=8.0)


def test_emulated_tiles_multiply_as_vectors_do(emulated_tiles: None) -> None:
    arguments = inputs(1, 2, 2, 50, 120, 20, 64, torch.bfloat16)
    by_tiles = ops.attention(**arguments)
    _native.set_matrix_tiles("none")
    torch.testing.assert_close(by_tiles, ops.attention(**arguments))


def test_unknown_tiles_are_refused() -> None:
    with pytest.raises(RuntimeError, match="none, hardware or emulated"):
        _native.set_matrix_tiles("large")
    if _native.matrix_tiles() == "none":
        with pytest.raises(RuntimeError, match="no matrix tiles"):
            _native.set_matrix_tiles("hardware")


# ---- Memory

_PEAK = """
import resource, sys, torch
from imagen_fast import RelativePositionBias, ops, use_backend
torch.manual_seed(0)
torch.set_num_threads(1)
length = int(sys.argv[1])

def attend(length):
    q, k, v = (torch.randn(1, 4, length, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(32, 4, requires_grad=True)
    with use_backend(sys.argv[2]):
        ops.attention(q, k, v, bias=RelativePositionBias(table)).sum().backward()

attend(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_memory(length: int, backend: str) -> int:
    """Kilobytes by which the largest resident set of a process grows with attention over `length`, both passes."""
    command = [sys.executable, "-c", _PEAK, str(length), backend]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """Four heads of 2048 x 2048 scores are 64 MB in float32; q, k and v are 0.5 MB each."""
    assert peak_memory(2048, "cpu") < 32 * 1024


# ---- Direct calls of the operators


def operator_arguments() -> dict[str, Any]:
    names = ("bias", "table", "buckets", "key_mask", "q_scale", "k_scale")
    return inputs(1, 4, 2, 5, 6, 3, 16, torch.float32) | dict.fromkeys(names) | {"scale": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 3, 6, 16)}, "heads"),
        ({"k": torch.zeros(1, 2, 6, 8)}, "k must have"),
        ({"v": torch.zeros(1, 2, 7, 16)}, "v must have"),
        ({"v": torch.zeros(1, 2, 6, 16, dtype=torch.float16)}, "v must have"),
        ({"k": torch.zeros(1, 2, 16, 6).transpose(2, 3)}, "last dimension dense"),
        ({"context_v": None}, "go together"),
        ({"context_v": torch.zeros(1, 2, 4, 16)}, "context_v must have"),
        ({"bias": torch.zeros(1, 1, 5, 8)}, "broadcast"),
        ({"bias": torch.zeros(1, 1, 9, 5).transpose(2, 3)}, "dense"),
        ({"bias": torch.zeros(1, 1, 1, 1, dtype=torch.float64)}, "float64"),
        ({"table": torch.zeros(8, 4)}, "buckets"),
        ({"table": torch.zeros(8, 4), "buckets": torch.full((10,), 8, dtype=torch.int32)}, "rows of the table"),
        ({"table": torch.zeros(8, 4), "buckets": torch.zeros(9, dtype=torch.int32)}, "buckets"),
        ({"key_mask": torch.zeros(1, 8, dtype=torch.bool)}, "key_mask"),
        ({"q_scale": torch.zeros(16)}, "go together"),
        ({"q_scale": torch.zeros(16), "k_scale": torch.zeros(8)}, "k_scale"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_operator_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.imagen_fast.attention_cpu(*(operator_arguments() | changes).values())


def test_backward_operator_refuses_what_the_forward_pass_did_not_give() -> None:
    arguments = operator_arguments()
    out, lse = torch.ops.imagen_fast.attention_cpu(*arguments.values())
    backward = torch.ops.imagen_fast.attention_backward_cpu
    with pytest.raises(RuntimeError, match="lse"):
        backward(out, out, lse[..., :4], *arguments.values(), 1)
    with pytest.raises(RuntimeError, match="dout"):
        backward(out[:, :, :4], out, lse, *arguments.values(), 1)


# ---- Few keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_key_of_few_has_no_gradient_of_scores(kernel: str, dtype: torch.dtype) -> None:
    """Its weight is 1 whatever its score: so the gradients of q and k are nothing, to the rounding of one product."""
    q, k, v = (torch.randn(2, 4, length, 64).to(dtype).requires_grad_() for length in (16, 3, 3))
    mask = torch.tensor([[True, False, False], [False, False, True]])
    out = ops.attention(q, k, v, key_mask=mask)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert dq.abs().max() <= 1e-6
    assert dk.abs().max() <= 2e-6  # of 16 queries
    assert dv.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_few_keys_some_of_them_far_away(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, length, 56).to(dtype) for length in (16, 2, 2))
    bias = torch.randn(16, 1).masked_fill(torch.arange(16)[:, None] % 3 == 0, -torch.inf)
    assert_op_as_accurate(ops.attention, 3 * q, k, v, bias=bias.expand(16, 2))
