"""What the op promises besides its numbers: layouts, errors, autograd, autocast, torch.compile."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast import _native, layout, ops
from imagen_fast.testing import assert_op_as_accurate

from .conftest import assert_saved_tensors_may_be_restrided

needs_library = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 5, 3), (2, 8, 5, 3, 2)], ids=str)
def test_dense_layouts_are_kept(backend: str, shape: tuple[int, ...], nhwc: bool) -> None:
    x = torch.randn(shape)
    x = layout.channels_last(x) if nhwc else x
    assert ops.channel_rms_norm_act(x, torch.ones(8)).stride() == x.stride()
    assert imagen_fast.explain("channel_rms_norm_act", x, torch.ones(8)).notes == ()


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_other_strides_are_copied_and_explain_says_so(backend: str, nhwc: bool) -> None:
    x = torch.randn(2, 16, 6, 5)
    x = (layout.channels_last(x) if nhwc else x)[:, :, ::2]
    assert_op_as_accurate(ops.channel_rms_norm_act, x, torch.randn(16))
    assert layout.is_channels_last(ops.channel_rms_norm_act(x, torch.ones(16))) == nhwc
    notes = imagen_fast.explain("channel_rms_norm_act", x, torch.ones(16)).notes
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
    y = ops.channel_rms_norm_act(x, torch.ones(16))
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, dy.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(dx, expected)


C, BC = torch.randn(8), torch.randn(2, 8)
GOOD: dict[str, Any] = {"x": torch.randn(2, 8, 4, 4), "weight": C}
BAD = [
    pytest.param({"x": [1.0]}, TypeError, "x must be a tensor, got list", id="x-list"),
    pytest.param({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x must be float16.*int64", id="x-int"),
    pytest.param({"x": torch.ones(2, 8).to_sparse()}, TypeError, "x must be a dense", id="x-sparse"),
    pytest.param({"x": torch.ones(8)}, ValueError, r"x must have 2 to 5 dimensions.*\(8,\)", id="x-rank-1"),
    pytest.param({"x": torch.ones(2, 8, 1, 1, 1, 1)}, ValueError, "x must have 2 to 5", id="x-rank-6"),
    pytest.param({"x": torch.ones(2, 0, 3)}, ValueError, "at least one channel", id="x-no-channels"),
    pytest.param({"weight": None}, TypeError, "weight must be a tensor, got NoneType", id="weight-none"),
    pytest.param({"weight": C[:4]}, ValueError, r"weight must have shape \(8,\).*got \(4,\)", id="weight-short"),
    pytest.param({"weight": C[:, None, None]}, ValueError, r"\(8, 1, 1\); pass weight.flatten\(\)", id="weight-c11"),
    pytest.param({"weight": C.double()}, TypeError, "weight must be float16.*got torch.float64", id="weight-float64"),
    pytest.param({"x": GOOD["x"].double()}, TypeError, "weight must be float64.*float32", id="weight-narrow"),
    pytest.param({"weight": C.to("meta")}, ValueError, "weight must be on cpu", id="weight-device"),
    pytest.param({"scale": 0.5}, TypeError, "scale must be a tensor or None, got float", id="scale-float"),
    pytest.param({"scale": BC[:, :4]}, ValueError, r"scale must have shape \(2, 8\).*\(2, 4\)", id="scale-channels"),
    pytest.param({"shift": torch.ones(2, 8, 1, 1)}, ValueError, r"shift must have.*\(2, 8, 1, 1\)", id="shift-rank-4"),
    pytest.param({"shift": BC.double()}, TypeError, "shift must be float16.*float64", id="shift-float64"),
    pytest.param({"activation": "slu"}, ValueError, "unknown activation 'slu'; did you mean 'silu'", id="activation"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.channel_rms_norm_act(**(GOOD | wrong))
    with pytest.raises(error, match=message):
        imagen_fast.explain("channel_rms_norm_act", **(GOOD | wrong))


def double_arguments() -> tuple[Tensor, ...]:
    shapes = ((2, 12, 3, 2), (12,), (2, 12), (2, 1))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def call(x: Tensor, w: Tensor, s: Tensor, t: Tensor, activation: str | None = "silu") -> Tensor:
    return ops.channel_rms_norm_act(x, w, scale=s, shift=t, activation=activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", None])
def test_gradcheck(kernel: str, activation: str | None) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    assert torch.autograd.gradcheck(lambda *args: call(*args, activation), double_arguments(), fast_mode=True)


@pytest.mark.parametrize("needed", range(4))
def test_a_gradient_for_one_tensor_alone(backend: str, needed: int) -> None:
    arguments = [p.detach() for p in double_arguments()]
    arguments[needed].requires_grad_()
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


def test_eager_has_a_second_derivative() -> None:
    with imagen_fast.use_backend("eager"):
        assert torch.autograd.gradgradcheck(call, double_arguments(), fast_mode=True)


@pytest.mark.parametrize("needed", range(4))
def test_cpu_says_that_it_has_no_second_derivative(kernel: str, needed: int) -> None:
    if kernel in ("cuda", "triton"):
        pytest.skip("kernels for the GPU take no float64")
    arguments = [p.detach() for p in double_arguments()]
    arguments[needed].requires_grad_()
    y = call(*arguments)
    (first,) = torch.autograd.grad(y.square().sum(), arguments[needed], create_graph=True)
    with pytest.raises(RuntimeError, match=r"channel_rms_norm_act has no second derivative.*use_backend\(\"eager\"\)"):
        first.square().sum().backward()


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_leaves_x_and_parameters_as_they_are(backend: str, x_dtype: torch.dtype) -> None:
    leaves = [torch.randn(2, 8, 3, 5).to(x_dtype), torch.randn(8), torch.randn(2, 8).bfloat16(), torch.randn(2, 8)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outside = call(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*leaves)
    assert y.dtype == x_dtype
    assert torch.equal(y, outside)
    y.float().square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


def operator_arguments(dtype: torch.dtype, nhwc: bool, shape: tuple[int, ...] = (2, 8, 3, 5)) -> tuple[Any, ...]:
    x = torch.randn(shape).to(dtype)
    x = layout.channels_last(x) if nhwc else x
    return x, torch.randn(8).to(dtype), *torch.randn(shape[0], 16).to(dtype).chunk(2, dim=1), 1


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
class TestOpcheck:
    @pytest.fixture(autouse=True)
    def _operators(self, kernel: str) -> None:
        backend = kernel.partition("-")[0]
        self.operator = getattr(torch.ops.imagen_fast, f"channel_rms_norm_act_{backend}").default
        self.backward_operator = getattr(torch.ops.imagen_fast, f"channel_rms_norm_act_backward_{backend}").default

    @pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
    def test_forward(self, dtype: torch.dtype, nhwc: bool, requires_grad: bool) -> None:
        *tensors, activation = operator_arguments(dtype, nhwc)
        tensors = [t.detach().requires_grad_(requires_grad) for t in tensors]
        torch.library.opcheck(self.operator, (*tensors, activation))

    @pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 8, 0), (0, 8, 3), (2, 8, 1, 1), (1, 8, 4, 1)], ids=str)
    def test_backward(self, dtype: torch.dtype, nhwc: bool, shape: tuple[int, ...]) -> None:
        x, *rest = operator_arguments(dtype, nhwc, shape)
        _, rstd = self.operator(x, *rest)
        for needs in (0b1111, 0b0001, 0b0110):
            arguments = (torch.randn_like(x), x, rstd, *rest, needs)
            torch.library.opcheck(self.backward_operator, arguments)


FORWARD: dict[str, Any] = {"x": torch.ones(2, 8, 3), "weight": torch.ones(8), "scale": None, "shift": None, "code": 1}
BACKWARD = {"dy": torch.ones(2, 8, 3), "rstd": torch.ones(2, 3)}
WRONG = {
    "rank": {"x": torch.ones(8)},
    "code": {"code": 4},
    "weight-size": {"weight": torch.ones(7)},
    "weight-dtype": {"weight": torch.ones(8).double()},
    "scale-rank": {"scale": torch.ones(8)},
    "shift-batch": {"shift": torch.ones(1, 8)},
    "dy-shape": {"dy": torch.ones(2, 8, 2)},
    "dy-layout": {"dy": torch.ones(2, 3, 8).transpose(1, 2)},
    "rstd-size": {"rstd": torch.zeros(2, 4)},
    "rstd-dtype": {"rstd": torch.ones(2, 3).double()},
}


@needs_library
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_operators_called_directly_refuse_what_does_not_fit(change: dict[str, Any]) -> None:
    forward = (FORWARD | {key: value for key, value in change.items() if key in FORWARD}).values()
    dy, rstd = (BACKWARD | {key: value for key, value in change.items() if key in BACKWARD}).values()
    x, *rest = forward
    with pytest.raises(RuntimeError, match="channel_rms_norm_act: "):
        torch.ops.imagen_fast.channel_rms_norm_act_backward_cpu(dy, x, rstd, *rest, 15)
    if change.keys() <= FORWARD.keys():
        with pytest.raises(RuntimeError, match="channel_rms_norm_act: "):
            torch.ops.imagen_fast.channel_rms_norm_act_cpu(*forward)


def test_compiles_whole_with_dynamic_shapes(backend: str) -> None:
    torch._dynamo.reset()
    w = torch.randn(8, requires_grad=True)

    def block(x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return ops.channel_rms_norm_act(x * 2, w, scale=scale, shift=shift) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape, nhwc in (((2, 8, 5, 3), False), ((3, 8, 4, 6), False), ((3, 8, 4, 6), True)):
        x = torch.randn(shape)
        x = (layout.channels_last(x) if nhwc else x).requires_grad_()
        leaves = [x, torch.randn(shape[0], 16, requires_grad=True), w]
        results = []
        for run in (block, compiled):
            y = run(*leaves[:2])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert results[0][0].stride() == results[1][0].stride()
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_transforms_give_what_eager_gives() -> None:
    x, w = torch.randn(4, 2, 8, 3), torch.randn(8)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ops.channel_rms_norm_act(x, w).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(w, x)
    w.requires_grad_()
    for sample, gradient in zip(x, per_sample, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(w, sample), w)[0])


def test_meta_tensors() -> None:
    x, weight = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16), torch.empty(8, device="meta")
    y = ops.channel_rms_norm_act(x, weight)
    assert (y.shape, y.dtype, y.device.type) == ((2, 8, 4, 4), torch.bfloat16, "meta")


def test_nothing_falls_back(kernel: str, caplog: pytest.LogCaptureFixture) -> None:
    with imagen_fast.use_backend("auto", strict=True), caplog.at_level(logging.WARNING, "imagen_fast"):
        ops.channel_rms_norm_act(torch.randn(2, 8, 4, 4), torch.ones(8))
    assert not caplog.records


class TestModule:
    def test_computes_the_op(self) -> None:
        module = imagen_fast.nn.ChannelRMSNormAct(8, activation="gelu")
        nn.init.normal_(module.weight)
        x, scale, shift = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(2, 8)
        expected = ops.channel_rms_norm_act(x, module.weight, scale=scale, shift=shift, activation="gelu")
        assert torch.equal(module(x, scale, shift), expected)

    def test_is_made_on_a_device_and_in_a_dtype(self) -> None:
        module = imagen_fast.nn.ChannelRMSNormAct(8, device="meta", dtype=torch.bfloat16)
        assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.bfloat16)
        assert list(module.state_dict()) == ["weight"]

    def test_repr_tells_its_settings(self) -> None:
        assert repr(imagen_fast.nn.ChannelRMSNormAct(8)) == "ChannelRMSNormAct(8, activation='silu')"

    @pytest.mark.parametrize(
        ("wrong", "message"), [({"num_channels": 0}, "num_channels"), ({"activation": "relu6"}, "'relu6'")]
    )
    def test_wrong_settings_are_named(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            imagen_fast.nn.ChannelRMSNormAct(**({"num_channels": 8} | wrong))


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_saved_tensors_may_come_back_in_other_strides(backend: str, nhwc: bool) -> None:
    x, dy = (torch.randn(2, 8, 5, 3) for _ in range(2))
    x, weight = (layout.channels_last(x) if nhwc else x).requires_grad_(), torch.randn(8, requires_grad=True)
    leaves = [x, weight]

    assert_saved_tensors_may_be_restrided(lambda: ops.channel_rms_norm_act(x, weight), leaves, dy)
