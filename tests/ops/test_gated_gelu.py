"""Gated GELU: accuracy of every kernel, forward and backward, and what the op promises besides its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import imagen_fast
from imagen_fast import _native, layout, ops, use_backend
from imagen_fast.testing import assert_op_as_accurate

from .conftest import assert_saved_tensors_may_be_restrided

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
approximations = pytest.mark.parametrize("approximate", ["tanh", "none"])
forms = pytest.mark.parametrize("packed", [False, True], ids=["two-tensors", "packed"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, packed: bool = False) -> dict[str, Any]:
    if packed:
        return {"gate": (2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)}
    return {name: (2 * torch.randn(shape)).to(dtype) for name in ("gate", "value")}


@dtypes
@approximations
@forms
@pytest.mark.parametrize("width", [1, 7, 64, 333, 2816])
def test_dtypes_and_widths(kernel: str, dtype: torch.dtype, approximate: str, packed: bool, width: int) -> None:
    assert_op_as_accurate(ops.gated_gelu, **arguments((2, 3, width), dtype, packed), approximate=approximate)


@forms
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 2, 24), (0, 24), (2, 0, 24), (2, 3, 0), (0,)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...], packed: bool) -> None:
    assert_op_as_accurate(ops.gated_gelu, **arguments(shape, packed=packed))


STRIDED = {
    "part-of-a-projection": lambda: torch.randn(2, 6, 72)[..., 24:48],
    "window": lambda: torch.randn(2, 9, 24)[:, 1:7],
    "sequence-first": lambda: torch.randn(6, 2, 24).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 6, 24).expand(2, 6, 24),
}
COPIED = {
    "transposed": lambda: torch.randn(2, 24, 6).transpose(1, 2),
    "every-other-channel": lambda: torch.randn(2, 6, 48)[..., ::2],
    "window-of-rank-4": lambda: torch.randn(2, 5, 4, 24)[:, 1:4, 1:3],
}


@pytest.mark.parametrize("kind", [*STRIDED, *COPIED])
def test_strides(backend: str, kind: str) -> None:
    x = (STRIDED | COPIED)[kind]()
    assert_op_as_accurate(ops.gated_gelu, x)
    assert_op_as_accurate(ops.gated_gelu, x, torch.randn(x.shape))
    assert_op_as_accurate(ops.gated_gelu, torch.randn(x.shape), x)
    assert bool(imagen_fast.explain("gated_gelu", x).notes) == (kind in COPIED)
    assert layout.has_dense_rows(ops.gated_gelu(x))


@forms
def test_what_is_expanded_gives_a_contiguous_result(kernel: str, packed: bool) -> None:
    gate = torch.randn(1, 6, 24).expand(2, 6, 24)
    y = ops.gated_gelu(gate, None if packed else torch.randn(2, 6, 24))
    assert y.is_contiguous()


@forms
@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_in_place(kernel: str, kind: str, packed: bool, dtype: torch.dtype) -> None:
    """Both tensors, and so both gradients, lie in memory in a way of their own."""
    gate = STRIDED[kind]().to(dtype)
    other = "window" if kind == "sequence-first" else "sequence-first"
    assert_op_as_accurate(ops.gated_gelu, gate, None if packed else STRIDED[other]().to(dtype))


@forms
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (2, 3, 0)], ids=str)
def test_no_elements(kernel: str, shape: tuple[int, ...], packed: bool) -> None:
    assert_op_as_accurate(ops.gated_gelu, **arguments(shape, packed=packed))


@pytest.mark.parametrize("needed", ["gate", "value"])
def test_the_gradient_of_one_tensor_alone_is_the_same(kernel: str, needed: str) -> None:
    call = {name: x.requires_grad_() for name, x in arguments((2, 5, 40), torch.bfloat16).items()}
    dy = torch.randn(2, 5, 40).bfloat16()
    both = dict(zip(call, torch.autograd.grad(ops.gated_gelu(**call), list(call.values()), dy), strict=True))
    alone = {name: x if name == needed else x.detach() for name, x in call.items()}
    (gradient,) = torch.autograd.grad(ops.gated_gelu(**alone), alone[needed], dy)
    assert torch.equal(gradient, both[needed])


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_saved_tensors_may_come_back_in_other_strides(backend: str, packed: bool) -> None:
    call = {name: x.requires_grad_() for name, x in arguments((2, 5, 24), packed=packed).items() if x is not None}
    leaves, dy = list(call.values()), torch.randn(2, 5, 24)

    assert_saved_tensors_may_be_restrided(lambda: ops.gated_gelu(**call), leaves, dy)


def test_halves_of_one_tensor_are_what_it_packs(kernel: str) -> None:
    packed = torch.randn(2, 5, 48)
    assert torch.equal(ops.gated_gelu(packed), ops.gated_gelu(*packed.chunk(2, dim=-1)))
    torch.testing.assert_close(ops.gated_gelu(packed, approximate="none"), F.gelu(packed[..., :24]) * packed[..., 24:])


@approximations
def test_far_from_zero(kernel: str, approximate: str) -> None:
    gate = torch.tensor([-1e4, -200.0, -20.0, -5.0, 5.0, 20.0, 200.0, 1e4, torch.inf, torch.nan]).repeat(40)
    assert_op_as_accurate(ops.gated_gelu, gate[:320].view(8, 40)[..., :8], torch.randn(8, 8), approximate=approximate)
    y = ops.gated_gelu(gate, torch.ones(400), approximate=approximate)
    assert torch.equal(y.isnan(), gate.isnan())
    assert torch.equal(y.isinf(), gate.isinf())


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    packed, rank = draw(st.booleans()), draw(st.integers(1, 4))
    shape = [*(draw(st.integers(0, 5)) for _ in range(rank - 1)), 2 * draw(st.integers(0, 50))]

    def strided() -> Tensor:
        order, pad = draw(st.permutations(range(rank))), draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        full = torch.randn([shape[i] + pad[i] for i in order]).permute([order.index(i) for i in range(rank)])
        return full[tuple(slice(pad[i], None) for i in range(rank))].to(dtype)

    approximate = draw(st.sampled_from(["tanh", "none"]))
    return {"gate": strided(), "approximate": approximate} | ({} if packed else {"value": strided()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call(call: dict[str, Any]) -> None:
    assert_op_as_accurate(ops.gated_gelu, **call)


X = torch.randn(2, 5, 8)
BAD = [
    pytest.param({"gate": [1.0]}, TypeError, "gate must be a tensor, got list", id="gate-list"),
    pytest.param({"gate": X.int()}, TypeError, "gate must be float16", id="gate-int"),
    pytest.param({"gate": torch.tensor(1.0), "value": None}, ValueError, "gate must have at least one", id="scalar"),
    pytest.param({"gate": X[..., :7], "value": None}, ValueError, "gate must have an even last size.*got 7", id="odd"),
    pytest.param({"value": 1.0}, TypeError, "value must be a tensor", id="value-float"),
    pytest.param({"value": X[..., :7]}, ValueError, r"value must have the shape of gate, \(2, 5, 8\)", id="shape"),
    pytest.param({"value": X.double()}, TypeError, "value must be torch.float32, as gate is", id="value-dtype"),
    pytest.param({"value": X.to("meta")}, ValueError, "value must be on cpu, where gate is", id="value-device"),
    pytest.param({"approximate": "tan"}, ValueError, "unknown approximate 'tan'; did you mean 'tanh'", id="name"),
    pytest.param({"approximate": None}, ValueError, "unknown approximate", id="approximate-none"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.gated_gelu(**({"gate": X, "value": X} | wrong))


def test_under_autocast_the_wider_dtype_counts(backend: str) -> None:
    gate, value = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gated_gelu(gate, value)
    assert torch.equal(y, ops.gated_gelu(gate.float(), value))
    assert y.dtype == torch.float32


def double_arguments(packed: bool) -> list[Tensor]:
    shapes = [(2, 3, 14)] if packed else [(2, 3, 7)] * 2
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@approximations
@forms
def test_gradcheck(kernel: str, approximate: str, packed: bool) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    leaves = double_arguments(packed)
    run = (lambda x: ops.gated_gelu(x, None, approximate)) if packed else (lambda *x: ops.gated_gelu(*x, approximate))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("needed", range(2))
def test_a_gradient_for_one_tensor_alone(backend: str, needed: int) -> None:
    leaves = [x.detach() for x in double_arguments(False)]
    leaves[needed].requires_grad_()
    assert torch.autograd.gradcheck(ops.gated_gelu, leaves, fast_mode=True)


def test_eager_has_a_second_derivative() -> None:
    with use_backend("eager"):
        assert torch.autograd.gradgradcheck(ops.gated_gelu, double_arguments(False), fast_mode=True)


def test_a_second_derivative_is_refused(kernel: str) -> None:
    x = torch.randn(2, 3, 14, requires_grad=True)
    (first,) = torch.autograd.grad(ops.gated_gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gated_gelu has no second derivative.*use_backend\(\"eager\"\)"):
        first.square().sum().backward()


def test_transforms_give_what_eager_gives() -> None:
    x = torch.randn(4, 3, 8)
    gradient = torch.vmap(torch.func.grad(lambda x: ops.gated_gelu(x).sin().sum()))(x)
    leaf = x[1].requires_grad_()
    torch.testing.assert_close(gradient[1], torch.autograd.grad(ops.gated_gelu(leaf).sin().sum(), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "sequence-first", "part-of-a-projection"])
@forms
def test_opcheck(backend: str, dtype: torch.dtype, kind: str, packed: bool) -> None:
    if backend == "eager":
        pytest.skip("it has no operator")
    forward = getattr(torch.ops.imagen_fast, f"gated_gelu_{backend}")
    backward = getattr(torch.ops.imagen_fast, f"gated_gelu_backward_{backend}")
    gate = (torch.randn(2, 6, 24) if kind == "contiguous" else STRIDED[kind]()).to(dtype)
    value = None if packed else torch.randn(2, 6, 24).to(dtype)
    for requires_grad in (False, True):
        leaves = [None if x is None else x.detach().requires_grad_(requires_grad) for x in (gate, value)]
        torch.library.opcheck(forward.default, (*leaves, True))
    dy = torch.randn_like(forward(gate, value, True))
    for needs in (1, 2, 3):
        torch.library.opcheck(backward.default, (dy, gate, value, True, needs))


WRONG = {
    "rank": (torch.ones(2, 8), None),
    "odd": (torch.ones(2, 3, 7), None),
    "value-shape": (torch.ones(2, 3, 8), torch.ones(2, 3, 7)),
    "value-dtype": (torch.ones(2, 3, 8), torch.ones(2, 3, 8).half()),
    "rows": (torch.ones(2, 8, 3).transpose(1, 2), None),
}


@pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built")
@pytest.mark.parametrize(("gate", "value"), WRONG.values(), ids=WRONG)
def test_operators_called_directly_refuse_what_does_not_fit(gate: Tensor, value: Tensor | None) -> None:
    with pytest.raises(RuntimeError, match="gated_gelu: "):
        torch.ops.imagen_fast.gated_gelu_cpu(gate, value, True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend: str, compiler: str) -> None:
    if (backend, compiler) == ("eager", "inductor"):
        pytest.skip("plain PyTorch: a test of Inductor, and a slow one")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.gated_gelu(2 * x) + 1, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((2, 5, 24), (3, 7, 24)):
        x = torch.randn(shape, requires_grad=True)
        y, expected = compiled(x), ops.gated_gelu(2 * x) + 1
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)))


def test_meta_tensors() -> None:
    assert ops.gated_gelu(torch.empty(2, 5, 8, device="meta")).shape == (2, 5, 4)


def test_nothing_falls_back(kernel: str) -> None:
    with use_backend("auto", strict=True):
        ops.gated_gelu(torch.randn(2, 5, 8))
