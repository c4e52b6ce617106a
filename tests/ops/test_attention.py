"""Accuracy of every kernel, forward and backward: segments, heads, masks, biases, sizes, strides, dtypes, values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import imagen_fast
from imagen_fast import RelativePositionBias, ops
from imagen_fast.testing import assert_op_as_accurate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
common_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    """Skips the backends that have no kernel yet."""
    for name in {"backend", "kernel"} & set(request.fixturenames):
        request.getfixturevalue(name)
        x = torch.zeros(1, 1, 1, 8)
        error = imagen_fast.explain("attention", x, x, x).error
        if error is not None:
            pytest.skip(error)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def heads(batch: int, count: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, L, D), in memory (B, L, H, D): as it comes out of a projection."""
    return torch.randn(batch, length, count, width).to(dtype).transpose(1, 2)


def inputs(
    batch: int = 2,
    q_heads: int = 4,
    kv_heads: int = 4,
    queries: int = 19,
    keys: int = 23,
    context: int | None = None,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """q, k and v, and the context where its length is given."""
    result = {"q": heads(batch, q_heads, queries, width, dtype)}
    for prefix, length in (("", keys), ("context_", context)):
        if length is not None:
            result |= {f"{prefix}{name}": heads(batch, kv_heads, length, width, dtype) for name in ("k", "v")}
    return result


# ---- Dtypes, heads and widths


@dtypes
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi-head", "grouped", "one-kv-head"])
@pytest.mark.parametrize("context", [None, 7], ids=["one-segment", "context"])
def test_dtypes_and_heads(kernel: str, dtype: torch.dtype, kv_heads: int, context: int | None) -> None:
    assert_op_as_accurate(ops.attention, **inputs(kv_heads=kv_heads, context=context, dtype=dtype))


@common_dtypes
@pytest.mark.parametrize("width", [8, 16, 40, 64, 72, 128, 136, 256])
def test_head_widths(kernel: str, width: int, dtype: torch.dtype) -> None:
    assert_op_as_accurate(ops.attention, **inputs(width=width, context=9, dtype=dtype))


# ---- Lengths


@common_dtypes
@pytest.mark.parametrize(
    ("queries", "keys", "context"),
    [
        pytest.param(64, 64, 77, id="IF-8x8"),
        pytest.param(141, 64, 77, id="141-queries"),
        pytest.param(77, 256, 77, id="IF-16x16"),
        pytest.param(1, 333, None, id="one-query"),
        pytest.param(130, 1, None, id="one-key"),
        pytest.param(5, 1, 1, id="one-key-each"),
        pytest.param(33, 0, 77, id="text-only"),
        pytest.param(33, 77, 0, id="empty-context"),
        pytest.param(129, 257, 31, id="one-more-than-a-tile"),
    ],
)
def test_lengths(kernel: str, queries: int, keys: int, context: int | None, dtype: torch.dtype) -> None:
    assert_op_as_accurate(ops.attention, **inputs(1, 2, 2, queries, keys, context, 64, dtype))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"batch": 0}, id="no-samples"),
        pytest.param({"queries": 0}, id="no-queries"),
        pytest.param({"q_heads": 0}, id="no-query-heads"),
        pytest.param({"keys": 0}, id="no-keys"),
        pytest.param({"keys": 0, "context": 0}, id="no-keys-in-either-segment"),
        pytest.param({"queries": 0, "keys": 0}, id="nothing"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "table", "normalized"])
def test_empty(backend: str, sizes: dict[str, int], form: str) -> None:
    arguments = inputs(**sizes)
    if form == "table":
        arguments["bias"] = RelativePositionBias(torch.randn(32, arguments["q"].shape[1]))
    if form == "normalized":
        arguments |= {"q_scale": torch.randn(16), "k_scale": torch.randn(16)}
    assert_op_as_accurate(ops.attention, **arguments)
    if arguments["k"].shape[2] == 0:
        assert not ops.attention(**arguments).any()


# ---- Masks


@dtypes
@pytest.mark.parametrize("context", [None, 12], ids=["one-segment", "context"])
def test_padded_batch(kernel: str, dtype: torch.dtype, context: int | None) -> None:
    """Sentences of different lengths; the last has nothing but padding."""
    arguments = inputs(4, context=context, dtype=dtype)
    keys = 23 if context is None else context
    mask = torch.arange(keys) < torch.tensor([[keys], [5], [1], [0]])
    if context is not None:
        mask = torch.cat((mask, torch.ones(4, 23, dtype=torch.bool)), dim=1)
    assert_op_as_accurate(ops.attention, **arguments, key_mask=mask)


def test_any_key_may_be_masked(kernel: str) -> None:
    assert_op_as_accurate(ops.attention, **inputs(3, context=40, keys=90), key_mask=torch.rand(3, 130) > 0.4)


@dtypes
@pytest.mark.parametrize("how", ["mask", "bias", "both", "table"])
def test_nothing_to_attend_to(kernel: str, dtype: torch.dtype, how: str) -> None:
    """Zeros, and gradients of zero: not of the other samples, and nowhere NaN."""
    arguments = inputs(context=7, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask, bias = torch.ones(2, 30, dtype=torch.bool), torch.randn(2, 1, 19, 30, dtype=wide)
    if how in ("mask", "table"):
        mask[1] = False
    elif how == "bias":
        bias[1] = -math.inf
    else:
        mask[1, ::2], bias[1, ..., 1::2] = False, -math.inf
    if how in ("mask", "both", "table"):
        arguments["key_mask"] = mask
    if how in ("bias", "both"):
        arguments["bias"] = bias
    if how == "table":
        arguments["bias"] = RelativePositionBias(torch.randn(32, 4, dtype=wide))
    assert_op_as_accurate(ops.attention, **arguments)
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v", "context_k", "context_v")]
    out = ops.attention(**arguments)
    assert not out[1].any()
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert not gradient[1].any()
        assert gradient[0].any()


def test_one_query_with_nothing_to_attend_to(kernel: str) -> None:
    bias = torch.randn(19, 23)
    bias[4] = -math.inf
    assert_op_as_accurate(ops.attention, **inputs(), bias=bias)
    assert not ops.attention(**inputs(), bias=bias)[:, :, 4].any()


# ---- Biases


@common_dtypes
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 19, 30), (1, 4, 19, 30), (2, 1, 1, 30), (4, 19, 30), (4, 1, 1), (19, 30), (19, 1), (30,), (1,), ()],
    ids=str,
)
def test_bias_broadcasts(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_op_as_accurate(ops.attention, **inputs(context=7, dtype=dtype), bias=torch.randn(shape).to(dtype))


@dtypes
def test_bias_without_a_batch(kernel: str, dtype: torch.dtype) -> None:
    """Its gradient is a sum over the samples."""
    assert_op_as_accurate(ops.attention, **inputs(5, context=7, dtype=dtype), bias=torch.randn(1, 4, 19, 30).to(dtype))


@pytest.mark.parametrize("bias_dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
def test_parameters_of_another_dtype(kernel: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    arguments = inputs(context=7, dtype=dtype)
    assert_op_as_accurate(ops.attention, **arguments, bias=torch.randn(4, 19, 30).to(bias_dtype))
    scales = {name: (1 + torch.randn(16)).to(bias_dtype) for name in ("q_scale", "k_scale")}
    table = RelativePositionBias(torch.randn(32, 4).to(bias_dtype))
    assert_op_as_accurate(ops.attention, **arguments, bias=table, **scales, scale=3.0)


def test_bias_of_minus_infinity_is_a_mask(kernel: str) -> None:
    bias = torch.randn(2, 4, 19, 30)
    bias[torch.rand(bias.shape) < 0.5] = -math.inf
    assert_op_as_accurate(ops.attention, **inputs(context=7), bias=bias, key_mask=torch.rand(2, 30) > 0.2)


def test_strided_bias(kernel: str) -> None:
    bias = torch.randn(4, 2, 40, 38)
    assert_op_as_accurate(ops.attention, **inputs(context=7), bias=bias.transpose(0, 1)[:, :, ::2][:, :, :19, 3:33])
    assert_op_as_accurate(ops.attention, **inputs(context=7), bias=bias[:2, :1, :30, :19].transpose(2, 3))


# ---- T5's relative position bias


@dtypes
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("context", [None, 7], ids=["one-segment", "context"])
def test_relative_position_bias(kernel: str, dtype: torch.dtype, bidirectional: bool, context: int | None) -> None:
    bias = RelativePositionBias(torch.randn(32, 4).to(dtype), bidirectional)
    assert_op_as_accurate(ops.attention, **inputs(context=context, dtype=dtype), bias=bias)


@pytest.mark.parametrize(
    ("rows", "bidirectional", "max_distance"),
    [(32, True, 128), (32, True, 20), (4, True, 2), (7, True, 11), (33, False, 64), (2, False, 2), (256, True, 1000)],
    ids=str,
)
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (3, 290), (290, 3)], ids=str)
def test_buckets(backend: str, rows: int, bidirectional: bool, max_distance: int, queries: int, keys: int) -> None:
    bias = RelativePositionBias(torch.randn(rows, 2), bidirectional, max_distance)
    assert_op_as_accurate(ops.attention, **inputs(1, 2, 2, queries, keys, width=8), bias=bias, scale=1.0)


@common_dtypes
def test_t5(kernel: str, dtype: torch.dtype) -> None:
    """Its sizes of scores: scale 1, the deviation of q.k is that of an unscaled product."""
    arguments = inputs(2, 4, 4, 141, 141, None, 64, dtype)
    bias = RelativePositionBias((4 * torch.randn(32, 4)).to(dtype))
    mask = torch.arange(141) < torch.tensor([[141], [77]])
    assert_op_as_accurate(ops.attention, **arguments, bias=bias, key_mask=mask, scale=1.0)


def test_strided_table(kernel: str) -> None:
    """One layer's columns of a table of all layers."""
    table = torch.randn(32, 12)[:, 4:8]
    assert_op_as_accurate(ops.attention, **inputs(), bias=RelativePositionBias(table), scale=1.0)


# ---- Normalised queries and keys


@dtypes
def test_normalized_queries_and_keys(kernel: str, dtype: torch.dtype) -> None:
    """As imagen-pytorch: 8 query heads, one head of keys, the context and null keys first, scale 8."""
    arguments = inputs(2, 8, 1, 64, 64, 12, 64, dtype)
    scales = {name: (1 + 0.3 * torch.randn(64)).to(dtype) for name in ("q_scale", "k_scale")}
    mask = torch.rand(2, 76) > 0.2
    assert_op_as_accurate(ops.attention, **arguments, **scales, key_mask=mask, scale=8.0)


@dtypes
def test_normalized_vectors_of_all_lengths(kernel: str, dtype: torch.dtype) -> None:
    arguments = inputs(context=7, dtype=dtype)
    for name in ("q", "k", "context_k"):
        arguments[name] *= 10 ** (4 * torch.rand(arguments[name].shape[:3])[..., None] - 2)
    scales = {name: (1 + 0.3 * torch.randn(16)).to(dtype) for name in ("q_scale", "k_scale")}
    assert_op_as_accurate(ops.attention, **arguments, **scales, scale=8.0)


def test_vectors_of_length_zero_stay_zero(kernel: str) -> None:
    arguments = inputs(context=7)
    for name in ("q", "k", "context_k"):
        arguments[name][:, :, 2] = 0
    scales = {name: torch.randn(16) for name in ("q_scale", "k_scale")}
    out = ops.attention(**arguments, **scales)
    assert out.isfinite().all()
    v = torch.cat((arguments["context_v"], arguments["v"]), dim=2)
    torch.testing.assert_close(out[:, :, 2], v.mean(2))


def test_vectors_below_the_smallest_length(kernel: str) -> None:
    """They are divided by 1e-12 whatever their length is, so that their gradient has all its directions."""
    arguments = inputs(context=7)
    for name in ("q", "k", "context_k"):
        arguments[name][:, :, 2] *= 1e-13
    scales = {name: torch.randn(16) for name in ("q_scale", "k_scale")}
    assert_op_as_accurate(ops.attention, **arguments, **scales)


# ---- Values


@dtypes
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_scores(kernel: str, dtype: torch.dtype, size: float) -> None:
    """Scores to several times `size`: all of a row but a few weights underflow."""
    arguments = inputs(context=7, dtype=dtype)
    assert_op_as_accurate(ops.attention, **arguments, scale=size / 4)


@dtypes
def test_scores_that_are_all_large_and_alike(kernel: str, dtype: torch.dtype) -> None:
    arguments = inputs(context=7, dtype=dtype)
    arguments["q"] = torch.full_like(arguments["q"], 8)
    arguments["k"], arguments["context_k"] = (8 + 0.1 * arguments[name] for name in ("k", "context_k"))
    assert_op_as_accurate(ops.attention, **arguments, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])  # in float64, the truth is round-off
def test_equal_keys(kernel: str, dtype: torch.dtype) -> None:
    """Weights are equal: the result is the mean of the values."""
    arguments = inputs(dtype=dtype)
    arguments["k"] = arguments["k"][:, :, :1].expand(-1, -1, 23, -1)
    assert_op_as_accurate(ops.attention, **arguments)


@dtypes
def test_one_key(kernel: str, dtype: torch.dtype) -> None:
    """The result is its value, whatever the query."""
    arguments = inputs(keys=1, dtype=dtype)
    out = ops.attention(**arguments, scale=50.0)
    assert torch.equal(out, arguments["v"].expand_as(out))


@pytest.mark.parametrize("scale", [0.0, -0.7, 1, 1e-6])
def test_scales(kernel: str, scale: float) -> None:
    assert_op_as_accurate(ops.attention, **inputs(context=7), scale=scale)


@pytest.mark.parametrize("name", ["q", "k", "v", "context_k"])
def test_a_nan_spoils_its_own_head_alone(backend: str, name: str) -> None:
    arguments = inputs(context=7)
    clean = ops.attention(**arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 2, 3, 4] = math.nan
    out = ops.attention(**arguments)
    reached = torch.zeros(out.shape, dtype=torch.bool)
    if name == "q":
        reached[1, 2, 3] = True
    elif name == "v":
        reached[1, 2, :, 4] = True
    else:
        reached[1, 2] = True
    assert out[reached].isnan().all()
    assert torch.equal(out[~reached], clean[~reached])


# ---- Any call


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    # Not float64: where a gradient is 0, its truth would be eager's own round-off.
    dtype = draw(st.sampled_from(DTYPES[:3]))
    kv_heads = draw(st.integers(1, 3))
    q_heads, batch = kv_heads * draw(st.integers(1, 3)), draw(st.integers(0, 3))
    width = 8 * draw(st.integers(1, 6))
    queries, keys, context = draw(st.integers(0, 40)), draw(st.integers(0, 70)), draw(st.integers(0, 40))

    def strided(count: int, length: int) -> Tensor:
        """A window into a larger tensor whose dimensions but the last lie in memory in any order."""
        order = draw(st.permutations(range(3)))
        pad = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        sizes = (batch, count, length)
        full = torch.randn([sizes[i] + pad[i] for i in order] + [width + 8 * pad[3]])
        full = full.permute([*(order.index(i) for i in range(3)), 3])
        return full[pad[0] :, pad[1] :, pad[2] :, 8 * pad[3] :].to(dtype)

    call: dict[str, Any] = {"q": strided(q_heads, queries), "k": strided(kv_heads, keys), "v": strided(kv_heads, keys)}
    if draw(st.booleans()):
        call |= {"context_k": strided(kv_heads, context), "context_v": strided(kv_heads, context)}
        keys += context
    parameter = draw(st.sampled_from(DTYPES[:3]))
    kind = draw(st.sampled_from(["none", "tensor", "table"]))
    if kind == "tensor":
        sizes = [size if draw(st.booleans()) else 1 for size in (batch, q_heads, queries, keys)]
        bias = torch.randn(sizes[draw(st.integers(0, 4)) :]).to(parameter)
        call["bias"] = bias.masked_fill(torch.rand(bias.shape) < 0.2, -math.inf) if draw(st.booleans()) else bias
    elif kind == "table":
        call["bias"] = RelativePositionBias(torch.randn(32, q_heads).to(parameter), draw(st.booleans()))
    if draw(st.booleans()):
        call["key_mask"] = torch.rand(batch, keys) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    if draw(st.booleans()):
        call |= {name: torch.randn(width).to(parameter) for name in ("q_scale", "k_scale")}
    call["scale"] = draw(st.sampled_from([None, 1.0, 8.0]))
    return call


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call(call: dict[str, Any]) -> None:
    assert_op_as_accurate(ops.attention, **call)


# ---- What results do not depend on


@pytest.mark.not_interpreted("the interpreter goes through programs one after the other, whatever the threads")
@common_dtypes
def test_result_does_not_depend_on_the_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    arguments = inputs(2, 3, 3, 130, 140, 33, 64, dtype)
    arguments["bias"] = RelativePositionBias(torch.randn(32, 3))
    leaves = [x.requires_grad_() for x in (*list(arguments.values())[:5], arguments["bias"].table)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            out = ops.attention(**arguments)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, out.detach())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def test_result_does_not_depend_on_the_batch(kernel: str) -> None:
    arguments = inputs(4, context=7)
    whole = ops.attention(**arguments)
    for i in range(4):
        alone = ops.attention(**{name: x[i : i + 1] for name, x in arguments.items()})
        assert torch.equal(whole[i : i + 1], alone)
