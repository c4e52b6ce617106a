"""Weights packed for oneDNN: the same results, never from weights that are no more, and nothing seen from outside."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import imagen_fast
from imagen_fast import _native
from imagen_fast.integrations import _fused, _kept, _packed
from imagen_fast.ops import _conv3x3
from imagen_fast.testing import assert_as_accurate

pytestmark = pytest.mark.skipif(not _packed._has_onednn(torch.float32), reason="this PyTorch has no oneDNN")

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if _packed._has_onednn(dtype)]
NHWC = torch.channels_last


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the name of every call of oneDNN with a packed weight."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls.append(name)
            return getattr(torch.ops.mkldnn, name)(*args)

        def binary(*args: Any) -> Tensor:
            calls.append(f"{name}.binary")
            return getattr(torch.ops.mkldnn, name).binary(*args)

        call.binary = binary
        return call

    reorders = {n: getattr(torch.ops.mkldnn, n) for n in ("_reorder_linear_weight", "_reorder_convolution_weight")}
    runs = {name: counted(name) for name in ("_linear_pointwise", "_convolution_pointwise")}
    monkeypatch.setattr(_packed, "_ONEDNN", SimpleNamespace(**reorders, **runs))
    monkeypatch.setattr(_packed._product, "is_faster", lambda weight: False)
    return calls


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def packed(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer = layer.to(dtype)
    form = _packed.PackedLinear if isinstance(layer, nn.Linear) else _packed.PackedConv2d
    _fused.take_form(layer, form)
    return layer


def plain(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    _fused.give_back(twin)
    return twin


# ---- Results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "add"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear(dtype: torch.dtype, activation: str | None, bias: bool, used: list[str]) -> None:
    torch.manual_seed(0)
    layer = packed(nn.Linear(37, 19, bias), dtype)
    x, add = random(3, 5, 37, dtype=dtype).transpose(0, 1), random(5, 3, 19, dtype=dtype)
    then = {"add": add} if activation == "add" else {"activation": activation}
    ours = _packed.linear(layer, x, **then)
    assert used == ["_linear_pointwise.binary" if activation == "add" else "_linear_pointwise"]
    eager = _packed.linear(plain(layer), x, **then)
    then = {name: value.double() if isinstance(value, Tensor) else value for name, value in then.items()}
    truth = _packed.linear(plain(layer).double(), x.double(), **then)
    assert_as_accurate(ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["", "add"])
@pytest.mark.parametrize(
    "form",
    [
        {"padding": 1},
        {"stride": 2, "padding": (1, 0), "bias": False},
        {"dilation": 2, "groups": 3},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("layouts", ["both", "input", "weight", "none"])
def test_conv2d(dtype: torch.dtype, adds: bool, form: dict[str, Any], layouts: str) -> None:
    torch.manual_seed(0)
    layer = packed(nn.Conv2d(12, 18, **{"kernel_size": 3, **form}), dtype)
    x = random(2, 12, 9, 11, dtype=dtype)
    if layouts in ("both", "input"):
        x = x.contiguous(memory_format=NHWC)
    if layouts in ("both", "weight"):
        layer = layer.to(memory_format=NHWC)
    add = torch.randn_like(layer(x)) if adds else None
    ours, eager = _packed.conv2d(layer, x, add=add), _packed.conv2d(plain(layer), x, add=add)
    wide = None if add is None else add.double()
    assert_as_accurate(ours, eager, _packed.conv2d(plain(layer).double(), x.double(), add=wide))
    assert layer(x).stride() == plain(layer)(x).stride()


@pytest.mark.skipif(_native.unavailable_reason() is not None, reason="needs the cpu backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_large_3x3_conv2d_is_transformed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv3x3, "available", lambda _: True)  # also where matrix tiles are faster
    torch.manual_seed(0)
    layer = packed(nn.Conv2d(32, 48, 3, padding=1), dtype).to(memory_format=NHWC)
    for size, key in ((16, "transformed"), (4, "packed")):
        x = random(2, 32, size, size, dtype=dtype)
        add = random(2, 48, size, size, dtype=dtype)
        for residual in (None, add, add.contiguous(memory_format=NHWC)):
            _kept.drop(layer)
            ours, eager = _packed.conv2d(layer, x, add=residual), _packed.conv2d(plain(layer), x, add=residual)
            wide = None if residual is None else residual.double()
            assert_as_accurate(ours, eager, _packed.conv2d(plain(layer).double(), x.double(), add=wide))
            assert list(_kept.kept(layer)) == ([key] if key == "transformed" or _packed._has_onednn(dtype) else [])
    x = random(2, 32, 16, 16, dtype=dtype)
    before = layer(x)
    assert _packed.packed_bytes(layer, dtype) == _kept.kept(layer)["transformed"].weight.nbytes
    layer.weight[3].mul_(2)
    assert torch.equal(layer(x)[:, :3], before[:, :3])
    torch.testing.assert_close(layer(x), plain(layer)(x), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(layer(x), before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_linears_are_one_product(dtype: torch.dtype, used: list[str]) -> None:
    torch.manual_seed(0)
    layers = [packed(nn.Linear(24, width, bias), dtype) for width, bias in ((8, True), (16, False), (8, True))]
    x, owner = random(2, 7, 24, dtype=dtype), nn.Module()
    parts = _packed.linears(owner, layers, x)
    assert used == ["_linear_pointwise"]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    for part, layer in zip(parts, layers, strict=True):
        assert_as_accurate(part, plain(layer)(x), plain(layer).double()(x.double()))
    layers[1].register_forward_hook(lambda module, args, output: 2 * output)
    used.clear()
    assert torch.equal(_packed.linears(owner, layers, x)[1], 2 * parts[1])
    assert used == 3 * ["_linear_pointwise"]  # each by itself


# ---- When a packed weight is not used


def _with_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = layer(x)
        assert y.requires_grad
        return y.detach()


def _autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    return y.float()


def _counted(layer: nn.Module, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() > 0
    return y


def _eager(layer: nn.Module, x: Tensor) -> Tensor:
    with imagen_fast.use_backend("eager"):
        return layer(x)


WITHOUT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradients": _with_gradients,
    "autocast": _autocast,
    "flop counter": _counted,
    "vmap": lambda layer, x: torch.vmap(layer)(x[None])[0],
    "compile": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "backend": _eager,
    "float64": lambda layer, x: layer.double()(x.double()).float(),
    "nothing to do": lambda layer, x: layer(x[:0]) if layer(x[:0]).shape[0] == 0 else x,
}


@pytest.mark.parametrize("way", WITHOUT)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_layers_compute_as_ever(way: str, kind: str, used: list[str]) -> None:
    torch.manual_seed(0)
    layer = packed(nn.Linear(8, 12) if kind == "linear" else nn.Conv2d(8, 12, 3).to(memory_format=NHWC))
    x = random(2, 8, 8, 8).contiguous(memory_format=NHWC)
    expected = WITHOUT[way](plain(layer), x)
    assert used == []
    assert torch.equal(WITHOUT[way](layer, x), expected)
    assert used == []


def test_weights_made_in_inference_mode_are_not_packed(used: list[str]) -> None:
    with torch.inference_mode():
        layer = packed(nn.Linear(8, 12))
        x = random(2, 8)
        before = layer(x)
        layer.weight.mul_(2)  # which no one counts
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-5)
    assert used == []


def test_a_weight_packed_in_inference_mode_serves_outside(used: list[str]) -> None:
    layer, x = packed(nn.Linear(8, 12)), random(2, 8)
    with torch.inference_mode():
        inside = layer(x)
    assert torch.equal(layer(x), inside)
    assert used == 2 * ["_linear_pointwise"]


def _as_attribute(layer: nn.Module) -> None:
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.bias = bias


def _as_buffer(layer: nn.Module) -> None:
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.register_buffer("bias", bias)


NO_PARAMETERS: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.3),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "bias", Tripled()),
    "attribute": _as_attribute,
    "buffer": _as_buffer,
}


@pytest.mark.parametrize("change", NO_PARAMETERS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_bias_that_is_no_parameter_counts(change: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = packed(nn.Linear(8, 12) if kind == "linear" else nn.Conv2d(8, 12, 3).to(memory_format=NHWC))
    x = random(2, 8, 8, 8).contiguous(memory_format=NHWC)
    layer(x)
    NO_PARAMETERS[change](layer)
    torch.testing.assert_close(layer(x), plain(layer)(x))


def _around(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    input = nn.functional.pad(nn.functional.pad(input, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return nn.functional.conv2d(input, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("by", ["itself", "its block"])
def test_a_convolution_with_another_padding_of_its_own_keeps_it(by: str, used: list[str]) -> None:
    torch.manual_seed(0)
    layer = packed(nn.Conv2d(8, 12, 3, padding=1).to(memory_format=NHWC))
    x = random(2, 8, 8, 8).contiguous(memory_format=NHWC)
    run = layer if by == "itself" else lambda x: _packed.conv2d(layer, x)
    before = run(x)
    layer._conv_forward = MethodType(_around, layer)
    assert torch.equal(run(x), _around(layer, x, layer.weight, layer.bias))
    assert not torch.allclose(run(x), before, atol=1e-3)
    used.clear()
    layer._conv_forward = MethodType(nn.Conv2d._conv_forward, layer)  # the class's, put back
    assert torch.equal(run(x), before)
    assert used


# ---- Weights that change


def _step(layer: nn.Module, **options: Any) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        layer(torch.ones(1, layer.in_features)).square().sum().backward()
        optimizer.step()


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


def _one_number(layer: nn.Module) -> None:
    layer.weight.data[1, 3] += 5
    imagen_fast.invalidate(layer)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assigned state": lambda layer: layer.load_state_dict(
        {k: v + 1 for k, v in layer.state_dict().items()}, assign=True
    ),
    "in place": lambda layer: layer.weight[1, 3].add_(1),  # which is not among the numbers that are compared
    "bias in place": lambda layer: layer.bias[10].add_(1),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "hidden, all numbers": lambda layer: layer.weight.data.add_(0.01),
    "hidden, through numpy": lambda layer: layer.weight.detach().numpy().__iadd__(0.01),
    "hidden, one number, and invalidate": _one_number,
    "optimizer": _step,
    "fused optimizer": lambda layer: _step(layer, fused=True),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Tripled()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_a_change_is_seen(change: str, joined: bool, used: list[str]) -> None:
    torch.manual_seed(0)
    layers = [packed(nn.Linear(8, 12)), packed(nn.Linear(8, 4))] if joined else [packed(nn.Linear(8, 12))]
    owner, x = nn.Module(), random(3, 8)

    def run() -> Tensor:
        return torch.cat(_packed.linears(owner, layers, x), -1) if joined else _packed.linear(layers[0], x)

    before = run()
    assert used
    CHANGES[change](layers[0])
    if change.endswith("invalidate"):
        imagen_fast.invalidate(owner)
    expected = torch.cat([plain(layer)(x) for layer in layers], -1)
    assert not torch.allclose(before, expected, atol=1e-4), "the change does nothing: the test is void"
    torch.testing.assert_close(run(), expected)


# ---- Copies and memory


def test_copies_and_pickles_pack_for_themselves(used: list[str]) -> None:
    layer, x = packed(nn.Linear(8, 12)), random(3, 8)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.weight.mul_(1)
        assert torch.equal(twin(x), expected)
        assert _kept.kept(twin) is not _kept.kept(layer)
        twin.weight.zero_()
        assert torch.equal(twin(x), twin.bias.expand(3, -1))
    assert torch.equal(layer(x), expected)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_packed_weights_go_with_the_layer_and_with_its_form() -> None:
    layer, x = packed(nn.Linear(8, 12)), random(3, 8)
    layer(x)
    weight = weakref.ref(_kept.kept(layer)["packed"].weight)
    _fused.give_back(layer)
    gc.collect()
    assert weight() is None
    _fused.take_form(layer, _packed.PackedLinear)
    layer(x)
    weight = weakref.ref(_kept.kept(layer)["packed"].weight)
    del layer
    gc.collect()
    assert weight() is None
