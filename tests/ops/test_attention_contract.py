"""What the op promises besides its numbers: errors, strides, autograd, autocast."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imagen_fast
from imagen_fast import RelativePositionBias, ops
from imagen_fast.ops import _attention_buckets
from imagen_fast.ops._attention_buckets import diagonal_buckets
from imagen_fast.reference.attention import materialized, relative_position_bucket
from imagen_fast.testing import assert_model_as_accurate, assert_op_as_accurate


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


def test_is_softmax_of_scores_times_values(backend: str) -> None:
    """Against the formula itself, written with loops."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    context_k, context_v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    table, mask = torch.randn(32, 4), torch.rand(2, 9) > 0.3
    q_scale, k_scale = torch.randn(8), torch.randn(8)
    out = ops.attention(
        q,
        k,
        v,
        context_k=context_k,
        context_v=context_v,
        bias=RelativePositionBias(table),
        key_mask=mask,
        scale=8.0,
        q_scale=q_scale,
        k_scale=k_scale,
    )
    for b in range(2):
        for h in range(4):
            for i in range(5):
                scores = []
                for j in range(9):
                    key = context_k[b, h // 2, j] if j < 3 else k[b, h // 2, j - 3]
                    score = 8 * (q[b, h, i] / q[b, h, i].norm() * q_scale) @ (key / key.norm() * k_scale)
                    if j >= 3:  # rows 0 to 7 of the table are the distances 0 to -7, 17 to 23 are 1 to 7
                        score = score + table[i - (j - 3) if j - 3 <= i else 16 + (j - 3) - i, h]
                    scores.append(score if mask[b, j] else torch.tensor(-torch.inf))
                values = torch.cat((context_v[b, h // 2], v[b, h // 2]))
                torch.testing.assert_close(out[b, h, i], torch.stack(scores).softmax(0) @ values)


# ---- T5's buckets


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("rows", "max_distance"), [(32, 128), (32, 20), (64, 1000), (10, 50)], ids=str)
def test_buckets_are_those_of_transformers(rows: int, bidirectional: bool, max_distance: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-3000, 3000)
    expected = t5.T5Attention._relative_position_bucket(distance, bidirectional, rows, max_distance)
    assert torch.equal(relative_position_bucket(distance, rows, bidirectional, max_distance), expected)


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (1, 1), (8, 8), (300, 7), (16, 17), (2, 129)], ids=str)
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
def test_bucket_of_a_diagonal(queries: int, keys: int, bidirectional: bool) -> None:
    bias = RelativePositionBias(torch.randn(32, 3), bidirectional)
    buckets = diagonal_buckets(bias, queries, keys)
    assert (buckets.dtype, buckets.shape) == (torch.int32, (queries + keys - 1,))
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    by_diagonal = bias.table[buckets[j - i + queries - 1].long()].permute(2, 0, 1)[None]
    assert torch.equal(by_diagonal, materialized(bias, queries, keys))
    with torch.inference_mode():
        assert torch.equal(diagonal_buckets(bias, queries, keys), buckets)


def test_buckets_that_are_kept_serve_where_none_may_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = RelativePositionBias(torch.randn(32, 3), max_distance=77)
    monkeypatch.setattr(_attention_buckets, "makes_tensors_to_keep", lambda _: False)  # as a CUDA graph is recorded
    fresh = diagonal_buckets(bias, 5, 9)
    monkeypatch.undo()
    kept = diagonal_buckets(bias, 5, 9)
    assert torch.equal(fresh, kept)
    assert fresh.data_ptr() != kept.data_ptr()
    monkeypatch.setattr(_attention_buckets, "makes_tensors_to_keep", lambda _: False)
    assert diagonal_buckets(bias, 5, 9).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0), (1, 0)], ids=str)
def test_diagonals_of_nothing(queries: int, keys: int) -> None:
    assert diagonal_buckets(RelativePositionBias(torch.randn(32, 3)), queries, keys).shape == (
        max(queries + keys - 1, 0),
    )


def test_position_bias_is_a_plain_value() -> None:
    bias = RelativePositionBias(torch.randn(32, 3))
    assert (bias.bidirectional, bias.max_distance) == (True, 128)
    for duplicate in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert torch.equal(duplicate.table, bias.table)


# ---- Strides


def packed(length: int, parts: int, heads: int = 4, width: int = 16) -> tuple[Tensor, ...]:
    """The parts of a packed projection (B, L, parts * heads * width), each (B, heads, L, width)."""
    projection = torch.randn(2, length, parts * heads * width)
    return tuple(x.transpose(1, 2) for x in projection.unflatten(-1, (parts, heads, width)).unbind(2))


def test_packed_projections_are_read_in_place(backend: str) -> None:
    (q, k, v), (context_k, context_v) = packed(19, 3), packed(7, 2)
    arguments = {"context_k": context_k, "context_v": context_v}
    assert_op_as_accurate(ops.attention, q, k, v, **arguments)
    assert imagen_fast.explain("attention", q, k, v, **arguments).notes == ()


@pytest.mark.parametrize("inner", ["heads", "positions"])
def test_result_is_in_the_memory_order_of_q(backend: str, inner: str) -> None:
    (q, k, v) = packed(19, 3)
    q = q if inner == "heads" else q.contiguous()
    out = ops.attention(q, k, v)
    assert out.is_contiguous() == (inner == "positions")
    assert out.transpose(1, 2).is_contiguous() == (inner == "heads")


def test_keys_shared_by_all_samples_are_read_in_place(backend: str) -> None:
    """Null keys: one row, expanded to the batch. Their gradient is summed."""
    q, k, v = packed(19, 3)
    null_k, null_v = torch.randn(4, 1, 16, requires_grad=True), torch.randn(4, 1, 16, requires_grad=True)
    context = [x.expand(2, -1, -1, -1) for x in (null_k, null_v)]
    assert_op_as_accurate(ops.attention, q, k, v, context_k=context[0], context_v=context[1])
    out = ops.attention(q, k, v, context_k=context[0], context_v=context[1])
    assert [g.shape for g in torch.autograd.grad(out.sum(), [null_k, null_v])] == [(4, 1, 16)] * 2


@pytest.mark.parametrize("name", ["q", "k", "v", "context_k", "context_v"])
def test_other_strides_are_copied_and_explain_says_so(backend: str, name: str) -> None:
    arguments = dict(zip(("q", "k", "v"), packed(19, 3), strict=True))
    arguments |= dict(zip(("context_k", "context_v"), packed(7, 2), strict=True))
    arguments[name] = torch.randn(*arguments[name].shape[:3], 32)[..., ::2]
    assert_op_as_accurate(ops.attention, **arguments)
    note = f"{name} will be copied: its last dimension is not dense"
    assert imagen_fast.explain("attention", **arguments).notes == (note,)


def test_other_strides_of_parameters_are_copied_and_explain_says_so(backend: str) -> None:
    q, k, v = packed(19, 3)
    bias = RelativePositionBias(torch.randn(32, 8)[:, ::2])
    arguments = {"key_mask": (torch.rand(2, 38) > 0.3)[:, ::2], "bias": bias}
    arguments |= {"q_scale": torch.randn(32)[::2], "k_scale": torch.randn(16, 2)[:, 0]}
    assert_op_as_accurate(ops.attention, q, k, v, **arguments)
    assert imagen_fast.explain("attention", q, k, v, **arguments).notes == (
        *(f"{name} will be copied: its last dimension is not dense" for name in ("key_mask", "q_scale", "k_scale")),
        "bias.table will be copied: it is not contiguous",
    )


def test_what_is_copied_keeps_the_order_of_heads(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 5, 3, 16, 3, generator=generator).transpose(1, 2).unbind(4)
    assert_op_as_accurate(ops.attention, q, k, v)
    assert ops.attention(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("missing", ["samples", "queries"])
@pytest.mark.parametrize("strided", ["key_mask", "bias"])
def test_strides_of_nothing(kernel: str, missing: str, strided: str) -> None:
    """An empty tensor is contiguous whatever its strides, and so is never copied."""
    q, k, v = packed(5, 3)
    q, k, v = (q[:0], k[:0], v[:0]) if missing == "samples" else (q[:, :, :0], k, v)
    if strided == "key_mask":
        call: dict[str, Any] = {"key_mask": (torch.rand(2, 10) > 0.3)[: q.shape[0], ::2]}
    else:
        call = {"bias": torch.randn(2, 4, 5, 10)[: q.shape[0], :, : q.shape[2], ::2]}
    assert_op_as_accurate(ops.attention, q, k, v, **call)


def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    q, k, v = packed(19, 3)
    table = torch.randn(32, 4)
    bias = RelativePositionBias(table, max_distance=np.int64(20))
    expected = ops.attention(q, k, v, bias=RelativePositionBias(table, max_distance=20), scale=0.5)
    assert torch.equal(ops.attention(q, k, v, bias=bias, scale=np.float32(0.5)), expected)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "strided", "heads-inner"])
def test_gradients_may_come_in_any_layout(backend: str, layout: str) -> None:
    q, k, v = (x.detach().requires_grad_() for x in packed(19, 3))
    dense = torch.randn(2, 4, 19, 16)
    dout = {
        "contiguous": dense,
        "expanded": torch.randn(2, 4, 1, 1).expand_as(dense),
        "strided": torch.randn(2, 4, 19, 32)[..., ::2],
        "heads-inner": dense.transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]
    out = ops.attention(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), dout.clone(memory_format=torch.contiguous_format))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_inputs_are_not_written(backend: str) -> None:
    inputs = packed(19, 3)
    before = [x.clone() for x in inputs]
    ops.attention(*inputs, q_scale=torch.ones(16), k_scale=torch.ones(16))
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y)


# ---- Wrong arguments

Q, K, CONTEXT = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 6, 16), torch.randn(2, 2, 3, 16)
GOOD: dict[str, Any] = {"q": Q, "k": K, "v": K, "context_k": CONTEXT, "context_v": CONTEXT}
TABLE = torch.randn(32, 4)

BAD = [
    pytest.param({"q": [1.0]}, TypeError, "q must be a tensor, got list", id="q-list"),
    pytest.param({"q": Q.int()}, TypeError, "q must be float16.*got torch.int32", id="q-int"),
    pytest.param({"q": Q[0]}, ValueError, r"q must have shape \(batch, heads, queries, width\)", id="q-rank"),
    pytest.param({"q": Q[..., :12]}, ValueError, "q must have a head width.*multiple of 8.*got 12", id="width-12"),
    pytest.param({"q": torch.ones(2, 4, 5, 264)}, ValueError, "at most 256, got 264", id="width-264"),
    pytest.param({"q": Q[..., :0]}, ValueError, "q must have a head width", id="width-0"),
    pytest.param({"k": None}, TypeError, "k must be a tensor, got NoneType", id="k-none"),
    pytest.param({"k": K.half()}, TypeError, "k must be torch.float32, as q is, got torch.float16", id="k-dtype"),
    pytest.param({"k": K.to("meta")}, ValueError, "k must be on cpu, where q is, got meta", id="k-device"),
    pytest.param({"k": K[:1]}, ValueError, r"k must have shape \(2, heads, keys, 16\).*got \(1,", id="k-batch"),
    pytest.param({"k": K[..., :8]}, ValueError, "k must have shape", id="k-width"),
    pytest.param({"k": K[0]}, ValueError, "k must have shape", id="k-rank"),
    pytest.param(
        {"k": torch.ones(2, 3, 6, 16), "v": torch.ones(2, 3, 6, 16)},
        ValueError,
        "k must have a number of heads that divides the 4 heads of q, got 3",
        id="heads-3",
    ),
    pytest.param(
        {"k": torch.ones(2, 8, 6, 16), "v": torch.ones(2, 8, 6, 16)}, ValueError, "heads of q, got 8", id="heads-8"
    ),
    pytest.param({"k": K[:, :0], "v": K[:, :0]}, ValueError, "heads of q, got 0", id="heads-0"),
    pytest.param({"v": K[:, :, :5]}, ValueError, r"v must have the shape of k, \(2, 2, 6, 16\), got", id="v-shape"),
    pytest.param({"v": K.bfloat16()}, TypeError, "v must be torch.float32, as k is, got torch.bfloat16", id="v-dtype"),
    pytest.param({"v": K.to("meta")}, ValueError, "v must be on cpu", id="v-device"),
    pytest.param({"context_v": None}, ValueError, "context_v must be given together with context_k", id="no-context_v"),
    pytest.param({"context_k": None}, ValueError, "context_k must be given together with context_v", id="no-context_k"),
    pytest.param({"context_k": CONTEXT.double()}, TypeError, "context_k must be torch.float32", id="context-dtype"),
    pytest.param({"context_k": CONTEXT[:, :1]}, ValueError, "context_k must have the 2 heads of k", id="context-heads"),
    pytest.param({"context_k": CONTEXT[..., :8]}, ValueError, "context_k must have shape", id="context-width"),
    pytest.param(
        {"context_v": CONTEXT[:, :, :2]}, ValueError, "context_v must have the shape of", id="context_v-shape"
    ),
    pytest.param({"bias": 1.0}, TypeError, "bias must be a tensor, a RelativePositionBias or None", id="bias-float"),
    pytest.param({"bias": torch.ones(5, 9) > 0}, TypeError, "bias must be floating.*-inf", id="bias-bool"),
    pytest.param({"bias": torch.ones(5, 9).double()}, TypeError, "bias must be float16", id="bias-float64"),
    pytest.param({"bias": torch.ones(5, 6)}, ValueError, r"bias must broadcast to \(2, 4, 5, 9\)", id="bias-keys"),
    pytest.param({"bias": torch.ones(2, 5, 9)}, ValueError, "bias must broadcast", id="bias-heads"),
    pytest.param({"bias": torch.ones(1, 1, 1, 1, 1)}, ValueError, "bias must broadcast", id="bias-rank"),
    pytest.param({"bias": torch.ones(5, 9).to("meta")}, ValueError, "bias must be on cpu, where q", id="bias-device"),
    pytest.param(
        {"bias": RelativePositionBias(TABLE[:, :3])},
        ValueError,
        r"bias.table .*\(buckets, 4\).*got \(32, 3\)",
        id="heads",
    ),
    pytest.param({"bias": RelativePositionBias(TABLE[0])}, ValueError, "bias.table must have shape", id="table-rank"),
    pytest.param({"bias": RelativePositionBias(TABLE[:3])}, ValueError, "bias.table must have at least 4", id="rows-3"),
    pytest.param(
        {"bias": RelativePositionBias(TABLE[:1], False)}, ValueError, "bias.table must have at least 2", id="rows-1"
    ),
    pytest.param({"bias": RelativePositionBias(TABLE.double())}, TypeError, "bias.table must be", id="table-dtype"),
    pytest.param(
        {"bias": RelativePositionBias(TABLE.to("meta"))}, ValueError, "bias.table must be on", id="table-device"
    ),
    pytest.param(
        {"bias": RelativePositionBias(None)}, TypeError, "bias.table must be a tensor, got NoneType", id="none"
    ),
    pytest.param({"bias": RelativePositionBias(TABLE, 1)}, TypeError, "bias.bidirectional must be", id="bidirectional"),
    pytest.param(
        {"bias": RelativePositionBias(TABLE, True, 8)},
        ValueError,
        "bias.max_distance must be at least 9",
        id="distance",
    ),
    pytest.param(
        {"bias": RelativePositionBias(TABLE, True, 9.5)},
        TypeError,
        "bias.max_distance must be an integer",
        id="distance-float",
    ),
    pytest.param({"key_mask": [True]}, TypeError, "key_mask must be a tensor", id="mask-list"),
    pytest.param(
        {"key_mask": torch.ones(2, 9)}, TypeError, "key_mask must be bool.*got torch.float32", id="mask-dtype"
    ),
    pytest.param(
        {"key_mask": torch.ones(2, 6) > 0},
        ValueError,
        r"key_mask must have shape \(2, 9\).*got \(2, 6\)",
        id="mask-own",
    ),
    pytest.param({"key_mask": torch.ones(1, 9) > 0}, ValueError, "key_mask must have shape", id="mask-batch"),
    pytest.param(
        {"key_mask": torch.ones(2, 9, device="meta") > 0}, ValueError, "key_mask must be on", id="mask-device"
    ),
    pytest.param({"scale": "8"}, TypeError, "scale must be a number or None, got '8'", id="scale-str"),
    pytest.param({"scale": True}, TypeError, "scale must be a number", id="scale-bool"),
    pytest.param({"scale": np.bool_(True)}, TypeError, "scale must be a number", id="scale-numpy-bool"),
    pytest.param({"scale": torch.tensor(8.0)}, TypeError, "scale must be a number", id="scale-tensor"),
    pytest.param({"scale": float("inf")}, ValueError, "scale must be finite", id="scale-inf"),
    pytest.param(
        {"q_scale": torch.ones(16)}, ValueError, "k_scale must be given together with q_scale", id="no-k_scale"
    ),
    pytest.param(
        {"k_scale": torch.ones(16)}, ValueError, "q_scale must be given together with k_scale", id="no-q_scale"
    ),
    pytest.param(
        {"q_scale": torch.ones(16), "k_scale": torch.ones(8)},
        ValueError,
        r"k_scale must have shape \(16,\)",
        id="k_scale",
    ),
    pytest.param(
        {"q_scale": torch.ones(16).double(), "k_scale": torch.ones(16)},
        TypeError,
        "q_scale must be",
        id="q_scale-dtype",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.attention(**(GOOD | wrong))
    with pytest.raises(error, match=message):
        imagen_fast.explain("attention", **(GOOD | wrong))


# ---- Autograd

NAMES = ("q", "k", "v", "context_k", "context_v", "q_scale", "k_scale")


def double_arguments(form: str) -> tuple[Tensor, ...]:
    shapes = [(1, 4, 3, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 2, 8), (1, 2, 2, 8), (8,), (8,)]
    shapes += {"bias": [(4, 3, 1)], "table": [(8, 4)], "none": []}[form]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def call(*tensors: Tensor, form: str) -> Tensor:
    arguments: dict[str, Any] = dict(zip(NAMES, tensors, strict=False))
    if form != "none":
        arguments["bias"] = tensors[7] if form == "bias" else RelativePositionBias(tensors[7], max_distance=3)
    mask = torch.tensor([[True, False, True, True, True, False]])
    return ops.attention(**arguments, key_mask=mask, scale=1.5)


@pytest.mark.parametrize("form", ["none", "bias", "table"])
def test_gradcheck(kernel: str, form: str) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    assert torch.autograd.gradcheck(lambda *t: call(*t, form=form), double_arguments(form), fast_mode=True)


@pytest.mark.parametrize("form", ["bias", "table"])
def test_gradcheck_of_eager(form: str) -> None:
    with imagen_fast.use_backend("eager"):
        assert torch.autograd.gradcheck(lambda *t: call(*t, form=form), double_arguments(form), fast_mode=True)


@pytest.mark.parametrize("form", ["bias", "table"])
@pytest.mark.parametrize("needed", range(8))
def test_a_gradient_for_one_tensor_alone(backend: str, form: str, needed: int) -> None:
    arguments = [x.detach() for x in double_arguments(form)]
    arguments[needed].requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: call(*t, form=form), arguments, fast_mode=True)


def test_a_second_derivative_is_refused(kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in packed(5, 3))
    (first,) = torch.autograd.grad(ops.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention has no second derivative.*use_backend\(\"eager\"\)"):
        first.square().sum().backward()


def test_eager_has_a_second_derivative() -> None:
    arguments = double_arguments("table")
    with imagen_fast.use_backend("eager"), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *t: call(*t, form="table"), arguments, fast_mode=True)


def test_transforms_give_what_eager_gives() -> None:
    q, k, v = (torch.randn(3, 2, 4, 5, 8) for _ in range(3))
    table = torch.randn(32, 4)

    def loss(table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, bias=RelativePositionBias(table)).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(table, q, k, v)
    expected = torch.stack([torch.func.grad(loss)(table, *x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(per_sample, expected)
    table.requires_grad_()
    torch.testing.assert_close(expected[0], torch.autograd.grad(loss(table, q[0], k[0], v[0]), table)[0])


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key_mask"])
def test_derivatives_under_transforms_with_a_bias_that_needs_one(masked: bool) -> None:
    """Forward mode and reverse mode agree: <J t, w> = <t, J^T w>."""
    q, k, v, tangent = (torch.randn(2, 4, 5, 8, dtype=torch.float64) for _ in range(4))
    bias = torch.randn(4, 5, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4 + [False], [False] * 5]) if masked else None

    def run(q: Tensor) -> Tensor:
        return ops.attention(q, k, v, bias=bias, key_mask=mask)

    weights = torch.randn(q.shape, dtype=torch.float64)
    forward = (torch.func.jvp(run, (q,), (tangent,))[1] * weights).sum()
    gradient = torch.func.grad(lambda q: (run(q) * weights).sum())(q)
    torch.testing.assert_close(forward, (gradient * tangent).sum())
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad((run(leaf) * weights).sum(), leaf)[0])


# ---- Autocast


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key_mask"])
def test_autocast_leaves_the_bias_as_it_is(backend: str, masked: bool) -> None:
    q, bias = torch.randn(3, 2, 7, 8).bfloat16(), 30 * torch.randn(2, 7, 7)
    mask = torch.arange(7) < torch.tensor([[7], [5], [3]]) if masked else None
    expected = ops.attention(q, q, q, bias=bias, key_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.attention(q, q, q, bias=bias, key_mask=mask), expected)


def test_autocast_narrows_as_it_does_for_scaled_dot_product_attention(backend: str) -> None:
    q, k, v = packed(19, 3)
    k, table = k.bfloat16(), torch.randn(32, 4, requires_grad=True)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(*leaves, bias=RelativePositionBias(table))
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    for leaf, gradient in zip((*leaves, table), torch.autograd.grad(out.float().sum(), (*leaves, table)), strict=True):
        assert gradient.dtype == leaf.dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q.double(), q.double(), q.double()).dtype == torch.float64


def test_autocast_between_projections(backend: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
            self.scales = nn.Parameter(torch.randn(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2))
            h = ops.attention(q, k, v, q_scale=self.scales[0], k_scale=self.scales[1], scale=8.0)
            return self.out(h.transpose(1, 2).flatten(2))

    block, x = Block(), torch.randn(2, 12, 32)
    with imagen_fast.use_backend("eager"), torch.autocast("cpu", torch.bfloat16):
        eager = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
    with torch.no_grad():
        assert_model_as_accurate(out, eager, block.double()(x.double()))
