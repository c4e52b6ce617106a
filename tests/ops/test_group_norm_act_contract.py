"""What the op promises besides its numbers: layouts, errors, autograd, autocast, torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import imagen_fast
from imagen_fast import _native, layout, ops
from imagen_fast.testing import assert_model_as_accurate, assert_op_as_accurate

from .conftest import assert_saved_tensors_may_be_restrided

needs_library = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Spy(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "every-other-row": lambda x: x[:, :, ::2],
    "cropped": lambda x: x[:, :, 1:-1, 1:-1],
    "transposed": lambda x: x.transpose(2, 3),
    "half-the-channels": lambda x: x[:, :8],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "half-the-channels-of-nhwc": lambda x: layout.channels_last(x)[:, :8],
    "cropped-nhwc": lambda x: layout.channels_last(x)[:, :, 1:-1, 1:-1],
}


@pytest.mark.parametrize(
    ("x", "names"),
    [
        (torch.randn(2, 8, 5, 3), ("contiguous",)),
        (layout.channels_last(torch.randn(2, 8, 5, 3)), ("channels_last",)),
        (layout.channels_last(torch.randn(2, 8, 5)), ()),
        (layout.channels_last(torch.randn(2, 8, 5, 3, 2)), ()),
        (torch.randn(4, 8, 5, 3)[1:3], ()),
        (torch.randn(1, 16, 5, 3)[:, :8], ()),
    ],
    ids=["nchw", "nhwc", "nlc", "ndhwc", "slice-of-the-batch", "channels-of-one-sample"],
)
def test_dense_layouts_are_read_in_place_and_kept(backend: str, x: Tensor, names: tuple[str, ...]) -> None:
    with Spy() as spy:
        y = ops.group_norm_act(x, 2)
    assert y.stride() == x.stride() or (y.is_contiguous() and x.is_contiguous())
    for name in names:
        assert y.is_contiguous(memory_format=getattr(torch, f"{name}_format" if name == "contiguous" else name))
    if backend == "cpu":
        assert [name for name in spy.names if name != "aten::transpose.int"] == ["imagen_fast::group_norm_act_cpu"]
    assert imagen_fast.explain("group_norm_act", x, 2).notes == ()


@pytest.mark.parametrize("kind", STRIDED)
def test_other_strides_are_copied_and_explain_says_so(backend: str, kind: str) -> None:
    x = STRIDED[kind](torch.randn(2, 16, 6, 5))
    assert_op_as_accurate(ops.group_norm_act, x, 4)
    y = ops.group_norm_act(x, 4)
    assert layout.is_dense(y)
    assert layout.is_channels_last(y) == ("nhwc" in kind)
    notes = imagen_fast.explain("group_norm_act", x, 4).notes
    assert notes == ("x will be copied: its strides are neither dense NCHW nor dense NHWC",)


@pytest.mark.parametrize("layout_of_x", ["nchw", "nhwc"])
@pytest.mark.parametrize("layout_of_dy", ["nchw", "nhwc", "expanded", "strided"])
def test_gradients_may_come_in_any_layout(backend: str, layout_of_x: str, layout_of_dy: str) -> None:
    x = torch.randn(2, 16, 6, 5)
    x = (layout.channels_last(x) if layout_of_x == "nhwc" else x).requires_grad_()
    dense = torch.randn(2, 16, 6, 5)
    dy = {
        "nchw": dense,
        "nhwc": layout.channels_last(dense),
        "expanded": torch.randn(2, 16, 1, 1).expand(2, 16, 6, 5),
        "strided": torch.randn(2, 16, 6, 10)[..., ::2],
    }[layout_of_dy]
    y = ops.group_norm_act(x, 4)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, dy.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(dx, expected)
    if backend == "cpu":
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_saved_tensors_may_come_back_in_other_strides(kernel: str, nhwc: bool) -> None:
    """As from hooks that offload or compress them. (PyTorch's own group norm reads such tensors wrongly.)"""
    x, dy = (torch.randn(2, 8, 5, 3) for _ in range(2))
    x, weight = (layout.channels_last(x) if nhwc else x).requires_grad_(), torch.randn(8, requires_grad=True)
    leaves = [x, weight]

    assert_saved_tensors_may_be_restrided(lambda: ops.group_norm_act(x, 2, weight), leaves, dy)


def test_input_is_not_written(backend: str) -> None:
    x = torch.randn(2, 16, 6, 5)
    before = x.clone()
    y = ops.group_norm_act(x, 4, activation=None)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


GOOD: dict[str, Any] = {"x": torch.randn(2, 8, 4, 4), "num_groups": 4}
C, BC = torch.randn(8), torch.randn(2, 8)

BAD = [
    pytest.param({"x": [1.0]}, TypeError, "x must be a tensor, got list", id="x-list"),
    pytest.param(
        {"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x must be float16.*got torch.int64", id="x-int"
    ),
    pytest.param({"x": torch.ones(2, 8, dtype=torch.complex64)}, TypeError, "x must be float16", id="x-complex"),
    pytest.param({"x": torch.ones(2, 8).to_sparse()}, TypeError, "x must be a dense", id="x-sparse"),
    pytest.param({"x": torch.ones(8)}, ValueError, r"x must have 2 to 5 dimensions.*\(8,\)", id="x-rank-1"),
    pytest.param({"x": torch.ones(2, 8, 1, 1, 1, 1)}, ValueError, "x must have 2 to 5", id="x-rank-6"),
    pytest.param({"x": torch.ones(2, 0, 3)}, ValueError, "0 channels of x", id="x-no-channels"),
    pytest.param({"num_groups": 3}, ValueError, "num_groups must divide the 8 channels of x, got 3", id="groups-3"),
    pytest.param({"num_groups": 16}, ValueError, "num_groups must divide", id="groups-16"),
    pytest.param({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0", id="groups-0"),
    pytest.param({"num_groups": -4}, ValueError, "num_groups must be at least 1", id="groups-negative"),
    pytest.param({"num_groups": 4.0}, TypeError, "num_groups must be an integer, got 4.0", id="groups-float"),
    pytest.param({"num_groups": True}, TypeError, "num_groups must be an integer", id="groups-bool"),
    pytest.param({"weight": 1.0}, TypeError, "weight must be a tensor or None, got float", id="weight-float"),
    pytest.param({"weight": C[:4]}, ValueError, r"weight must have shape \(8,\).*got \(4,\)", id="weight-short"),
    pytest.param({"weight": BC}, ValueError, r"weight must have shape \(8,\).*got \(2, 8\)", id="weight-rank-2"),
    pytest.param({"bias": C[:1]}, ValueError, r"bias must have shape \(8,\).*got \(1,\)", id="bias-one"),
    pytest.param({"weight": C.double()}, TypeError, "weight must be float16.*got torch.float64", id="weight-float64"),
    pytest.param({"x": GOOD["x"].double(), "bias": C}, TypeError, "bias must be float64.*float32", id="bias-narrow"),
    pytest.param({"bias": C.int()}, TypeError, "bias must be float16.*got torch.int32", id="bias-int"),
    pytest.param(
        {"weight": C.to("meta")}, ValueError, "weight must be on cpu, where x is, got meta", id="weight-device"
    ),
    pytest.param({"scale": BC.to("meta")}, ValueError, "scale must be on cpu", id="scale-device"),
    pytest.param({"weight": C.to_sparse()}, TypeError, "weight must be a dense", id="weight-sparse"),
    pytest.param({"shift": BC.to_mkldnn()}, TypeError, "shift must be a dense", id="shift-mkldnn"),
    pytest.param({"scale": 0.5}, TypeError, "scale must be a tensor or None, got float", id="scale-float"),
    pytest.param(
        {"scale": BC[:, :4]}, ValueError, r"scale must have shape \(2, 8\).*got \(2, 4\)", id="scale-channels"
    ),
    pytest.param({"scale": torch.ones(3, 8)}, ValueError, r"scale must have shape.*got \(3, 8\)", id="scale-batch"),
    pytest.param({"shift": torch.ones(2, 8, 1, 1)}, ValueError, r"shift must have.*\(2, 8, 1, 1\)", id="shift-rank-4"),
    pytest.param({"shift": torch.ones(2)}, ValueError, r"shift must have shape.*got \(2,\)", id="shift-batch-only"),
    pytest.param({"shift": BC.double()}, TypeError, "shift must be float16.*float64", id="shift-float64"),
    pytest.param({"activation": "slu"}, ValueError, "unknown activation 'slu'; did you mean 'silu'", id="activation"),
    pytest.param({"activation": "tanh_gelu"}, ValueError, "unknown activation", id="activation-nearest"),
    pytest.param({"activation": nn.SiLU()}, ValueError, "unknown activation SiLU", id="activation-module"),
    pytest.param({"activation": ["silu"]}, ValueError, r"unknown activation \['silu'\]; did you", id="activation-list"),
    pytest.param({"activation": torch.ones(2)}, ValueError, "unknown activation tensor", id="activation-tensor"),
    pytest.param({"num_groups": np.float32(4)}, TypeError, "num_groups must be an integer", id="groups-numpy-float"),
    pytest.param({"num_groups": np.int64(3)}, ValueError, "num_groups must divide", id="groups-numpy-3"),
    pytest.param({"eps": -1e-5}, ValueError, "eps must be finite and not negative, got -1e-05", id="eps-negative"),
    pytest.param({"eps": float("nan")}, ValueError, "eps must be finite", id="eps-nan"),
    pytest.param({"eps": float("inf")}, ValueError, "eps must be finite", id="eps-inf"),
    pytest.param({"eps": None}, TypeError, "eps must be a number, got None", id="eps-none"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.group_norm_act(**(GOOD | wrong))
    with pytest.raises(error, match=message):
        imagen_fast.explain("group_norm_act", **(GOOD | wrong))


def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    x = torch.randn(2, 8, 4, 4)
    y = ops.group_norm_act(x, np.int64(4), eps=np.float32(0.5))
    assert torch.equal(y, ops.group_norm_act(x, 4, eps=0.5))


def double_arguments() -> tuple[Tensor, ...]:
    x = torch.randn(2, 12, 3, 2)
    return tuple(
        p.double().requires_grad_()
        for p in (x, torch.randn(12), torch.randn(12), torch.randn(2, 12), torch.randn(2, 1))
    )


def call(x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, activation: str | None = "silu") -> Tensor:
    return ops.group_norm_act(x, 3, w, b, scale=s, shift=t, activation=activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", None])
def test_gradcheck(kernel: str, activation: str | None) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    assert torch.autograd.gradcheck(lambda *args: call(*args, activation), double_arguments(), fast_mode=True)


@pytest.mark.parametrize("needed", range(5))
def test_a_gradient_for_one_tensor_alone(backend: str, needed: int) -> None:
    arguments = [p.detach() for p in double_arguments()]
    arguments[needed].requires_grad_()
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("positions", [(1, 1), (1, 1, 1)], ids=str)
def test_gradients_of_parameters_alone_where_there_is_one_position(backend: str, positions: tuple[int, ...]) -> None:
    """One position is NCHW and channels-last at once, and PyTorch's own gradient of such a norm kills the process."""
    x = torch.randn(3, 48, *positions).to(memory_format=CHANNELS_LAST[len(positions)])
    weight, bias = (torch.randn(48).requires_grad_() for _ in range(2))
    given = ops.group_norm_act(x, 6, weight, bias)
    found = torch.autograd.grad(given, (weight, bias), torch.ones_like(given))
    wide = [p.detach().double().requires_grad_() for p in (weight, bias)]
    h = nn.functional.silu(nn.functional.group_norm(x.double().flatten(1), 6, *wide))
    for ours, truth in zip(found, torch.autograd.grad(h.sum(), wide), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_eager_has_a_second_derivative() -> None:
    with imagen_fast.use_backend("eager"):
        assert torch.autograd.gradgradcheck(call, double_arguments(), fast_mode=True)


@pytest.mark.parametrize("needed", range(5))
def test_cpu_says_that_it_has_no_second_derivative(kernel: str, needed: int) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    arguments = [p.detach() for p in double_arguments()]
    arguments[needed].requires_grad_()
    y = call(*arguments)
    (first,) = torch.autograd.grad(y.square().sum(), arguments[needed], create_graph=True)
    with pytest.raises(RuntimeError, match=r"group_norm_act has no second derivative.*use_backend\(\"eager\"\)"):
        first.square().sum().backward()


def test_backward_runs_on_the_backend_of_the_forward_pass() -> None:
    x = torch.randn(2, 8, 3, requires_grad=True)
    with imagen_fast.use_backend("eager"):
        y = ops.group_norm_act(x, 4)
    with Spy() as spy:
        y.sum().backward()
    assert not [name for name in spy.names if name.startswith("imagen_fast")]


def test_x_changed_in_place_after_the_call_is_noticed(backend: str) -> None:
    x = torch.randn(2, 8, 3)
    w = torch.randn(8, requires_grad=True)
    y = ops.group_norm_act(x, 4, w)
    x.zero_()
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_transforms_give_what_eager_gives(caplog: pytest.LogCaptureFixture) -> None:
    x, w = torch.randn(4, 2, 8, 3), torch.randn(8)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ops.group_norm_act(x, 4, w).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(w, x)
    expected = torch.stack([torch.func.grad(loss)(w, sample) for sample in x])
    torch.testing.assert_close(per_sample, expected)
    w.requires_grad_()
    torch.testing.assert_close(expected[0], torch.autograd.grad(loss(w, x[0]), w)[0])
    _, tangent = torch.func.jvp(lambda x: ops.group_norm_act(x, 4), (x[0],), (x[0],))
    assert tangent.abs().max() > 1e-6


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_leaves_x_and_parameters_as_they_are(
    backend: str, x_dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    x = torch.randn(2, 8, 3, 5).to(x_dtype).requires_grad_()
    affine = [torch.randn(8, requires_grad=True) for _ in range(2)]
    scale, shift = (torch.randn(2, 8).to(parameter_dtype).requires_grad_() for _ in range(2))
    outside = ops.group_norm_act(x, 4, *affine, scale=scale, shift=shift)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.group_norm_act(x, 4, *affine, scale=scale, shift=shift)
    assert y.dtype == x_dtype
    assert torch.equal(y, outside)
    y.float().square().sum().backward()
    for leaf in (x, *affine, scale, shift):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


def test_autocast_between_convolutions(backend: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
            self.norm = imagen_fast.nn.GroupNormAct(4, 16)
            self.project = nn.Linear(5, 32)

        def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
            scale, shift = self.project(embedding).chunk(2, dim=1)
            return self.second(self.norm(self.first(x), scale, shift))

    block = Block()
    x, embedding = torch.randn(2, 3, 12, 12), torch.randn(2, 5)
    with imagen_fast.use_backend("eager"), torch.autocast("cpu", torch.bfloat16):
        eager = block(x, embedding)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, embedding)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0
    with torch.no_grad():
        truth = block.double()(x.double(), embedding.double())
    assert_model_as_accurate(y, eager, truth)


def operator_arguments(dtype: torch.dtype, nhwc: bool, requires_grad: bool) -> tuple[Any, ...]:
    x = torch.randn(2, 8, 3, 5).to(dtype)
    x = layout.channels_last(x) if nhwc else x
    affine = [torch.randn(8).to(dtype) for _ in range(2)]
    modulation = torch.randn(2, 16).to(dtype).chunk(2, dim=1)
    tensors = [p.detach().requires_grad_(requires_grad) for p in (x, *affine, *modulation)]
    return tensors[0], 4, *tensors[1:], 1, 1e-5


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
class TestOpcheck:
    operators = torch.ops.imagen_fast

    @pytest.fixture(autouse=True)
    def _needs_the_library(self, kernel: str) -> None:
        pass

    @pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
    def test_forward(self, dtype: torch.dtype, nhwc: bool, requires_grad: bool) -> None:
        arguments = operator_arguments(dtype, nhwc, requires_grad)
        torch.library.opcheck(self.operators.group_norm_act_cpu.default, arguments)

    def test_forward_without_parameters(self, dtype: torch.dtype, nhwc: bool) -> None:
        x = operator_arguments(dtype, nhwc, True)[0]
        torch.library.opcheck(self.operators.group_norm_act_cpu.default, (x, 2, None, None, None, None, 0, 0.0))

    def test_backward(self, dtype: torch.dtype, nhwc: bool) -> None:
        x, groups, *rest = operator_arguments(dtype, nhwc, False)
        _, mean, rstd = self.operators.group_norm_act_cpu(x, groups, *rest)
        for needs in (0b11111, 0b00001, 0b01010, 0):
            arguments = (torch.randn_like(x), x, mean, rstd, groups, *rest[:-1], needs)
            torch.library.opcheck(self.operators.group_norm_act_backward_cpu.default, arguments)

    @pytest.mark.parametrize("shape", [(2, 8, 0), (0, 8, 3), (2, 8, 1, 1), (1, 8, 4, 1)], ids=str)
    def test_shapes_with_zeros_and_ones(self, dtype: torch.dtype, nhwc: bool, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape).to(dtype)
        x = layout.channels_last(x) if nhwc else x
        arguments = (x, 4, None, None, None, None, 1, 1e-5)
        torch.library.opcheck(self.operators.group_norm_act_cpu.default, arguments)
        _, mean, rstd = self.operators.group_norm_act_cpu(*arguments)
        arguments = (x, x, mean, rstd, *arguments[1:-1], 0b11111)
        torch.library.opcheck(self.operators.group_norm_act_backward_cpu.default, arguments)


@needs_library
@pytest.mark.parametrize("strides", [(8, 1, 8, 8), (8, 1, 1, 1), (99, 1, 7, 5)], ids=str)
def test_fake_outputs_have_the_strides_of_real_ones(strides: tuple[int, ...]) -> None:
    x = torch.randn(8).as_strided((1, 8, 1, 1), strides)
    y = torch.ops.imagen_fast.group_norm_act_cpu(x, 4, None, None, None, None, 1, 1e-5)[0]
    with FakeTensorMode() as mode:
        fake = torch.ops.imagen_fast.group_norm_act_cpu(mode.from_tensor(x), 4, None, None, None, None, 1, 1e-5)[0]
    assert y.stride() == fake.stride() == strides


FORWARD = {"x": torch.ones(2, 8, 3), "groups": 4} | dict.fromkeys(("weight", "bias", "scale", "shift")) | {"code": 1}
BACKWARD = {"dy": torch.ones(2, 8, 3), "mean": torch.zeros(2, 4), "rstd": torch.ones(2, 4)}
WRONG = {
    "rank": {"x": torch.ones(8)},
    "groups": {"groups": 0},
    "code": {"code": 4},
    "weight-size": {"weight": torch.ones(7)},
    "bias-rank": {"bias": torch.ones(2, 8)},
    "weight-dtype": {"weight": torch.ones(8).double()},
    "bias-dtype": {"bias": torch.ones(8).int()},
    "scale-rank": {"scale": torch.ones(8)},
    "shift-batch": {"shift": torch.ones(1, 8)},
    "dy-shape": {"dy": torch.ones(2, 8, 2)},
    "dy-dtype": {"dy": torch.ones(2, 8, 3).half()},
    "dy-layout": {"dy": torch.ones(2, 3, 8).transpose(1, 2)},
    "mean-size": {"mean": torch.zeros(2, 3)},
    "rstd-dtype": {"rstd": torch.ones(2, 4).double()},
}


@needs_library
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_operators_called_directly_refuse_what_does_not_fit(change: dict[str, Any]) -> None:
    x, *rest = (FORWARD | {key: value for key, value in change.items() if key in FORWARD}).values()
    dy, mean, rstd = (BACKWARD | {key: value for key, value in change.items() if key in BACKWARD}).values()
    with pytest.raises(RuntimeError, match=r"group_norm_act: |the CPU kernels take"):
        torch.ops.imagen_fast.group_norm_act_backward_cpu(dy, x, mean, rstd, *rest, 31)
    if change.keys() <= FORWARD.keys():
        with pytest.raises(RuntimeError, match=r"group_norm_act: |the CPU kernels take"):
            torch.ops.imagen_fast.group_norm_act_cpu(x, *rest, 1e-5)


@pytest.mark.parametrize("in_dim", [0, 1, 4])
def test_vmap(in_dim: int) -> None:
    x = torch.randn(2, 3, 8, 5, 5).movedim(1, in_dim)

    def run(part: Tensor) -> Tensor:
        imagen_fast.explain(ops.group_norm_act, part, 4)
        return ops.group_norm_act(layout.channels_last(part), 4) + ops.group_norm_act(layout.dense(part), 4)

    y = torch.vmap(run, in_dims=in_dim)(x)
    torch.testing.assert_close(y, torch.stack([2 * ops.group_norm_act(part, 4) for part in x.unbind(in_dim)]))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend: str, compiler: str) -> None:
    if (backend, compiler) == ("eager", "inductor"):
        pytest.skip("plain PyTorch: a test of Inductor, and a slow one")
    torch._dynamo.reset()
    w, b = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)

    def block(x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return ops.group_norm_act(x * 2, 4, w, b, scale=scale, shift=shift) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    for shape, nhwc in (((2, 8, 5, 3), False), ((3, 8, 4, 6), False), ((3, 8, 4, 6), True)):
        x = torch.randn(shape)
        x = (layout.channels_last(x) if nhwc else x).requires_grad_()
        leaves = [x, torch.randn(shape[0], 16, requires_grad=True), w, b]
        results = []
        for run in (block, compiled):
            y = run(*leaves[:2])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert results[0][0].stride() == results[1][0].stride()
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_compiles_with_an_input_that_is_copied(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: ops.group_norm_act(x[:, :, ::2], 4), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(run(x), ops.group_norm_act(x[:, :, ::2], 4))


def test_a_compiled_call_under_a_transform_is_traced_anew() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 8, 3)
    compiled = torch.compile(lambda x: ops.group_norm_act(x, 4), backend="aot_eager")
    compiled(x)
    expected = torch.func.grad(lambda x: ops.group_norm_act(x, 4).sin().sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda x: compiled(x).sin().sum())(x), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
            for f in (compiled, lambda x: ops.group_norm_act(x, 4))
        ]
    torch.testing.assert_close(*tangents)


def test_exports(backend: str) -> None:
    module = imagen_fast.nn.GroupNormAct(4, 8)
    x = torch.randn(2, 8, 6, 5)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    bigger = torch.randn(3, 8, 6, 5)
    torch.testing.assert_close(program.module()(bigger), module(bigger))


def test_number_of_groups_may_be_symbolic(backend: str) -> None:
    """As it is where no Dynamo stands between: in `make_fx` and in `torch.export` with strict=False."""
    x = torch.randn(2, 8, 3)
    traced = make_fx(lambda x: ops.group_norm_act(x, x.shape[1] // 2), tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), ops.group_norm_act(x, 4))


def test_meta_tensors() -> None:
    y = ops.group_norm_act(torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16), 4)
    assert (y.shape, y.dtype, y.device.type) == ((2, 8, 4, 4), torch.bfloat16, "meta")


def test_nothing_falls_back(kernel: str, caplog: pytest.LogCaptureFixture) -> None:
    with imagen_fast.use_backend("auto", strict=True), caplog.at_level(logging.WARNING, "imagen_fast"):
        ops.group_norm_act(torch.randn(2, 8, 4, 4), 4)
    assert not caplog.records
