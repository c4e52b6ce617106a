"""RMS norm: accuracy of every kernel, forward and backward, and what the op promises besides its numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import imagen_fast
from imagen_fast import _native, layout, ops, use_backend
from imagen_fast.testing import assert_as_accurate, assert_op_as_accurate

from .conftest import assert_saved_tensors_may_be_restrided

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
with_residual = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, residual: bool = True) -> dict[str, Any]:
    call = {"x": 1.7 * torch.randn(shape) + 0.4, "weight": 1 + torch.randn(shape[-1])}
    call |= {"residual": torch.randn(shape)} if residual else {}
    return {name: value.to(dtype) for name, value in call.items()}


@dtypes
@with_residual
@pytest.mark.parametrize("width", [1, 7, 16, 64, 333, 1472])
def test_dtypes_and_widths(kernel: str, dtype: torch.dtype, residual: bool, width: int) -> None:
    assert_op_as_accurate(ops.rms_norm, **arguments((2, 5, width), dtype, residual))


@with_residual
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (2, 3, 2, 24), (0, 24), (2, 0, 24), (77, 24)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...], residual: bool) -> None:
    assert_op_as_accurate(ops.rms_norm, **arguments(shape, residual=residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_of_the_weight_over_many_rows(kernel: str, dtype: torch.dtype) -> None:
    assert_op_as_accurate(ops.rms_norm, **arguments((3, 1371, 40), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_of_the_weight_over_very_many_equal_rows(capability: str, dtype: torch.dtype) -> None:
    """Sums of equal terms, whose roundings all go one way."""
    x = torch.full((2**18, 8), 0.1, dtype=dtype)

    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        y = ops.rms_norm(x, weight.requires_grad_())
        return torch.autograd.grad(y, weight, torch.ones_like(y))[0]

    ours = gradient(x, torch.ones(8))
    with use_backend("eager"):
        eager, truth = gradient(x, torch.ones(8)), gradient(x.double(), torch.ones(8).double())
    assert_as_accurate(ours, eager, truth)


def test_very_wide_rows_of_equal_values(capability: str) -> None:
    assert_op_as_accurate(ops.rms_norm, torch.full((2, 2**20), 0.1), torch.ones(2**20))


@pytest.mark.parametrize("weight_dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
def test_weight_of_another_dtype(kernel: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    call = arguments((2, 5, 40), dtype)
    assert_op_as_accurate(ops.rms_norm, **call | {"weight": call["weight"].to(weight_dtype)})


STRIDED = {
    "part-of-a-projection": lambda: torch.randn(2, 6, 72)[..., 24:48],
    "window": lambda: torch.randn(2, 9, 24)[:, 1:7],
    "every-other-row": lambda: torch.randn(2, 12, 24)[:, ::2],
    "sequence-first": lambda: torch.randn(6, 2, 24).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 6, 24).expand(2, 6, 24),
    "one-row-expanded": lambda: torch.randn(24).expand(2, 6, 24),
}
COPIED = {
    "transposed": lambda: torch.randn(2, 24, 6).transpose(1, 2),
    "every-other-channel": lambda: torch.randn(2, 6, 48)[..., ::2],
    "window-of-rank-4": lambda: torch.randn(2, 5, 4, 24)[:, 1:4, 1:3],
}


@pytest.mark.parametrize("kind", [*STRIDED, *COPIED])
def test_strides(backend: str, kind: str) -> None:
    x = (STRIDED | COPIED)[kind]()
    assert_op_as_accurate(ops.rms_norm, x, torch.randn(24))
    assert_op_as_accurate(ops.rms_norm, x, torch.randn(24), residual=torch.randn(x.shape))
    assert_op_as_accurate(ops.rms_norm, torch.randn(x.shape), torch.randn(24), residual=x)
    notes = imagen_fast.explain("rms_norm", x, torch.ones(24)).notes
    assert bool(notes) == (kind in COPIED)
    assert layout.has_dense_rows(ops.rms_norm(x, torch.ones(24)))


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_in_place(kernel: str, kind: str, dtype: torch.dtype) -> None:
    """x and the residual each lie in memory in a way of their own."""
    x = STRIDED[kind]().to(dtype)
    other = STRIDED["window" if kind == "sequence-first" else "sequence-first"]().to(dtype)
    assert_op_as_accurate(ops.rms_norm, x, torch.randn(24))
    assert_op_as_accurate(ops.rms_norm, x, torch.randn(24), residual=other)


@with_residual
def test_what_is_expanded_gives_a_contiguous_result(kernel: str, residual: bool) -> None:
    x = torch.randn(1, 6, 24).expand(2, 6, 24)
    results = ops.rms_norm(x, torch.randn(24), residual=torch.randn(2, 6, 24) if residual else None)
    for y in results if residual else (results,):
        assert y.is_contiguous()


@with_residual
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_no_rows(kernel: str, shape: tuple[int, ...], residual: bool) -> None:
    assert_op_as_accurate(ops.rms_norm, **arguments(shape, residual=residual))


def test_strided_weight(kernel: str) -> None:
    assert_op_as_accurate(ops.rms_norm, torch.randn(2, 5, 24), torch.randn(24, 3)[:, 1])


@dtypes
@pytest.mark.parametrize("size", [1e-4, 1.0, 200.0])
def test_sizes_of_values(kernel: str, dtype: torch.dtype, size: float) -> None:
    """The largest has squares that float16 does not hold."""
    x = (size * torch.randn(2, 5, 64)).to(dtype)
    assert_op_as_accurate(ops.rms_norm, x, torch.randn(64).to(dtype))


@pytest.mark.parametrize("value", [0.0, 3.7, -1e4, 1e-30])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_constants(kernel: str, value: float, eps: float) -> None:
    assert_op_as_accurate(ops.rms_norm, torch.full((2, 5, 40), value), torch.randn(40), eps=eps)


@with_residual
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(kernel: str, residual: bool, value: float) -> None:
    call = arguments((2, 5, 40), residual=residual)
    call["x"][1, 2, 7] = value
    y = ops.rms_norm(**call)
    y = y[0] if residual else y
    assert y.isfinite().all(-1).sum() == 9
    assert_op_as_accurate(ops.rms_norm, **call)


@dtypes
def test_the_sum_is_that_of_the_dtype(kernel: str, dtype: torch.dtype) -> None:
    """What is normalised is the sum as it is returned."""
    call = arguments((2, 5, 40), dtype)
    y, summed = ops.rms_norm(**call)
    assert torch.equal(summed, call["x"] + call["residual"])
    assert torch.equal(y, ops.rms_norm(summed, call["weight"]))


@pytest.mark.parametrize("part", [0, 1], ids=["norm", "sum"])
def test_gradients_of_one_result_alone(backend: str, part: int) -> None:
    call = {name: value.requires_grad_() for name, value in arguments((2, 5, 40)).items()}
    leaves = list(call.values())
    gradients = torch.autograd.grad(ops.rms_norm(**call)[part].square().sum(), leaves, allow_unused=True)
    with use_backend("eager"):
        expected = torch.autograd.grad(ops.rms_norm(**call)[part].square().sum(), leaves, allow_unused=True)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needed", ["x", "weight", "residual"])
def test_the_sum_requires_a_gradient_where_one_of_its_terms_does(backend: str, needed: str) -> None:
    call = arguments((2, 5, 40))
    call[needed].requires_grad_()
    y, summed = ops.rms_norm(**call)
    assert y.requires_grad
    assert summed.requires_grad == (needed != "weight")


def test_saved_tensors_may_come_back_in_other_strides(backend: str) -> None:
    call = {name: x.requires_grad_() for name, x in arguments((2, 5, 40)).items()}
    leaves, dy = list(call.values()), [torch.randn(2, 5, 40) for _ in range(2)]

    assert_saved_tensors_may_be_restrided(lambda: ops.rms_norm(**call), leaves, dy)


@pytest.mark.parametrize("needed", ["x", "weight", "residual"])
def test_the_gradient_of_one_tensor_alone_is_the_same(kernel: str, needed: str) -> None:
    call = {name: x.requires_grad_() for name, x in arguments((2, 5, 40), torch.bfloat16).items()}
    dy = [torch.randn(2, 5, 40).bfloat16() for _ in range(2)]
    every = dict(zip(call, torch.autograd.grad(ops.rms_norm(**call), list(call.values()), dy), strict=True))
    alone = {name: x if name == needed else x.detach() for name, x in call.items()}
    results = [y for y in ops.rms_norm(**alone) if y.requires_grad]
    (gradient,) = torch.autograd.grad(results, alone[needed], dy[: len(results)])
    assert torch.equal(gradient, every[needed])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_layer_norm_of_transformers(backend: str, weight_dtype: torch.dtype) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    norm = t5.T5LayerNorm(40, eps=1e-5).to(weight_dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 40).to(weight_dtype)
    torch.testing.assert_close(ops.rms_norm(x, norm.weight, eps=1e-5), norm(x))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    rank = draw(st.integers(1, 4))
    # The gradient of a row of a few values is what is left when all but everything cancels.
    shape = [*(draw(st.integers(0, 5)) for _ in range(rank - 1)), draw(st.integers(8, 90))]

    def strided() -> Tensor:
        order, pad = draw(st.permutations(range(rank))), draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        full = torch.randn([shape[i] + pad[i] for i in order]).permute([order.index(i) for i in range(rank)])
        return full[tuple(slice(pad[i], None) for i in range(rank))].to(dtype)

    weight_dtype = draw(st.sampled_from(DTYPES[3:] if dtype == torch.float64 else DTYPES[:3]))
    call: dict[str, Any] = {"x": strided(), "weight": torch.randn(shape[-1]).to(weight_dtype)}
    return call | ({"residual": strided()} if draw(st.booleans()) else {})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call(call: dict[str, Any]) -> None:
    assert_op_as_accurate(ops.rms_norm, **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU have none of these threads")
    call = {name: value.requires_grad_() for name, value in arguments((3, 501, 64), dtype).items()}
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            y, summed = ops.rms_norm(**call)
            results.append([y.detach(), summed, *torch.autograd.grad(y, list(call.values()), y.detach())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


X = torch.randn(2, 5, 8)
BAD = [
    pytest.param({"x": 1.0}, TypeError, "x must be a tensor, got float", id="x-float"),
    pytest.param({"x": X.int()}, TypeError, "x must be float16", id="x-int"),
    pytest.param({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension", id="x-scalar"),
    pytest.param({"x": X[..., :0], "weight": torch.ones(0)}, ValueError, "x must have a last dimension", id="x-empty"),
    pytest.param({"weight": None}, TypeError, "weight must be a tensor, got NoneType", id="weight-none"),
    pytest.param({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\).*got \(7,\)", id="short"),
    pytest.param({"weight": torch.ones(1, 8)}, ValueError, "weight must have shape", id="weight-rank"),
    pytest.param({"weight": torch.ones(8).double()}, TypeError, "weight must be float16", id="weight-float64"),
    pytest.param({"weight": torch.ones(8).to("meta")}, ValueError, "weight must be on cpu", id="weight-device"),
    pytest.param({"residual": 1.0}, TypeError, "residual must be a tensor", id="residual-float"),
    pytest.param({"residual": X[:1]}, ValueError, r"residual must have the shape of x, \(2, 5, 8\)", id="shape"),
    pytest.param({"residual": X.half()}, TypeError, "residual must be torch.float32, as x is", id="residual-dtype"),
    pytest.param({"residual": X.to("meta")}, ValueError, "residual must be on cpu", id="residual-device"),
    pytest.param({"eps": -1.0}, ValueError, "eps must be finite and not negative", id="eps-negative"),
    pytest.param({"eps": None}, TypeError, "eps must be a number", id="eps-none"),
    pytest.param({"eps": torch.tensor(1e-6)}, TypeError, "eps must be a number", id="eps-tensor"),
    pytest.param({"eps": np.float32(-1)}, ValueError, "eps must be finite and not negative", id="eps-numpy"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.rms_norm(**({"x": X, "weight": torch.ones(8)} | wrong))


@pytest.mark.parametrize("eps", [np.float32(1e-3), np.float64(1e-3), np.int64(1), Fraction(1, 4)], ids=repr)
def test_eps_may_be_any_real_number(backend: str, eps: Any) -> None:
    assert torch.equal(ops.rms_norm(X, torch.ones(8), eps=eps), ops.rms_norm(X, torch.ones(8), eps=float(eps)))


def double_arguments() -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (7,), (2, 3, 7))]


def call_with_residual(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(x, weight, residual=residual)


def test_gradcheck(kernel: str) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    assert torch.autograd.gradcheck(call_with_residual, double_arguments(), fast_mode=True)


@pytest.mark.parametrize("needed", range(3))
def test_a_gradient_for_one_tensor_alone(backend: str, needed: int) -> None:
    leaves = [x.detach() for x in double_arguments()]
    leaves[needed].requires_grad_()
    assert torch.autograd.gradcheck(call_with_residual, leaves, fast_mode=True)


def test_eager_has_a_second_derivative() -> None:
    with use_backend("eager"):
        assert torch.autograd.gradgradcheck(call_with_residual, double_arguments(), fast_mode=True)


def test_a_second_derivative_is_refused(kernel: str) -> None:
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 7), (7,)))
    (first,) = torch.autograd.grad(ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"rms_norm has no second derivative.*use_backend\(\"eager\"\)"):
        first.square().sum().backward()


def test_transforms_give_what_eager_gives() -> None:
    x, weight = torch.randn(4, 3, 8), torch.randn(8)
    per_sample = torch.vmap(torch.func.grad(lambda w, x: ops.rms_norm(x, w).sin().sum()), (None, 0))(weight, x)
    weight.requires_grad_()
    expected = torch.autograd.grad(ops.rms_norm(x[1], weight).sin().sum(), weight)[0]
    torch.testing.assert_close(per_sample[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "sequence-first", "part-of-a-projection"])
@with_residual
def test_opcheck(backend: str, dtype: torch.dtype, kind: str, residual: bool) -> None:
    if backend == "eager":
        pytest.skip("it has no operator")
    forward = getattr(torch.ops.imagen_fast, f"rms_norm_{backend}")
    backward = getattr(torch.ops.imagen_fast, f"rms_norm_backward_{backend}")
    x = (torch.randn(2, 6, 24) if kind == "contiguous" else STRIDED[kind]()).to(dtype)
    weight, added = torch.randn(24).to(dtype), torch.randn(2, 6, 24).to(dtype) if residual else None
    for requires_grad in (False, True):
        leaves = [None if p is None else p.detach().requires_grad_(requires_grad) for p in (x, weight, added)]
        torch.library.opcheck(forward.default, (*leaves, 1e-6))
    y, summed, rstd = forward(x, weight, added, 1e-6)
    for needs in (1, 2, 3):
        saved = summed if residual else x
        torch.library.opcheck(backward.default, (y, summed if residual else None, saved, rstd, weight, needs))


WRONG = {
    "rank": {"x": torch.ones(2, 8)},
    "weight-size": {"weight": torch.ones(7)},
    "weight-dtype": {"weight": torch.ones(8).double()},
    "rows": {"x": torch.ones(2, 8, 3).transpose(1, 2)},
    "residual-shape": {"residual": torch.ones(2, 2, 8)},
    "residual-width": {"residual": torch.ones(2, 3, 7)},
}


@pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built")
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_operators_called_directly_refuse_what_does_not_fit(change: dict[str, Tensor]) -> None:
    good: dict[str, Any] = {"x": torch.ones(2, 3, 8), "weight": torch.ones(8), "residual": torch.ones(2, 3, 8)}
    with pytest.raises(RuntimeError, match="rms_norm: "):
        torch.ops.imagen_fast.rms_norm_cpu(*(good | change).values(), 1e-6)


def test_autocast_leaves_dtypes_as_they_are(backend: str) -> None:
    x, weight = torch.randn(2, 5, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, summed = ops.rms_norm(x, weight, residual=x)
    assert y.dtype == summed.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtypes", ["bfloat16-float32", "float32-bfloat16", "float16-bfloat16", "bfloat16-float64"])
def test_autocast_casts_as_an_addition_does(backend: str, dtypes: str) -> None:
    x_dtype, residual_dtype = (getattr(torch, name) for name in dtypes.split("-"))
    x, residual = (torch.randn(2, 5, 8).to(dtype).requires_grad_() for dtype in (x_dtype, residual_dtype))
    weight = torch.randn(8, dtype=torch.float64 if residual_dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = x + residual
        y, summed = ops.rms_norm(x, weight, residual=residual)
    assert y.dtype == summed.dtype == expected.dtype
    assert torch.equal(summed, expected)
    assert torch.equal(y, ops.rms_norm(expected, weight))
    for leaf, gradient in zip((x, residual), torch.autograd.grad(y.sum(), (x, residual)), strict=True):
        assert gradient.dtype == leaf.dtype
    with pytest.raises(TypeError, match=f"residual must be {x_dtype}, as x is, got {residual_dtype}"):
        ops.rms_norm(x, torch.randn(8), residual=residual)


def test_autocast_between_linear_layers(backend: str) -> None:
    """The residual stream is float32, and what is added to it bfloat16."""
    linear, norm, x = torch.nn.Linear(8, 8), imagen_fast.nn.AddRMSNorm(8), torch.randn(2, 5, 8)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return norm(linear(x), x)

    assert [y.dtype for y in block(x)] == [torch.float32] * 2
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for y, expected in zip(compiled(x), block(x), strict=True):
        torch.testing.assert_close(y, expected)


def test_autocast_still_checks_the_residual() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for residual, error, message in (
            (1.0, TypeError, "residual must be a tensor"),
            (X.int(), TypeError, "residual must be float16"),
            (X[:1].half(), ValueError, "residual must have the shape of x"),
        ):
            with pytest.raises(error, match=message):
                ops.rms_norm(X, torch.ones(8), residual=residual)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend: str, compiler: str) -> None:
    if (backend, compiler) == ("eager", "inductor"):
        pytest.skip("plain PyTorch: a test of Inductor, and a slow one")
    torch._dynamo.reset()
    weight = torch.randn(24, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y, x = ops.rms_norm(x * 2, weight, residual=x)
        return y + ops.rms_norm(x[..., :24].relu(), weight)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((2, 5, 24), (3, 7, 24)):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for run in (block, compiled):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight])])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_meta_tensors() -> None:
    x = torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16)
    y, summed = ops.rms_norm(x, torch.empty(8, device="meta"), residual=x)
    assert y.shape == summed.shape == x.shape


def test_nothing_falls_back(kernel: str) -> None:
    with use_backend("auto", strict=True):
        ops.rms_norm(torch.randn(2, 5, 8), torch.randn(8))
