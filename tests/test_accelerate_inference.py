"""The options of `accelerate` for inference: another dtype, packed weights and their limit, what the report says."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.integrations import _converted, _fused, _kept, _packed
from imagen_fast.ops import _conv3x3
from imagen_fast.testing import assert_model_as_accurate

from .integrations.unet_configs import SD

diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

CONFIG = {**SD, "sample_size": 16, "block_out_channels": (32, 64), "in_channels": 4, "out_channels": 4}


def build(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**CONFIG).eval().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator).to(dtype),
        "timestep": torch.tensor([10.3, 801.7]),
        "encoder_hidden_states": torch.randn(2, 9, 24, generator=generator).to(dtype),
    }


def run(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model(**inputs(dtype)).sample


def packed_in(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _packed.PackedLinear | _packed.PackedConv2d)]


# ---- dtype and memory_format


@pytest.mark.parametrize("memory_format", [None, torch.channels_last], ids=["nchw", "nhwc"])
def test_another_dtype_is_as_accurate_as_a_converted_model(memory_format: Any) -> None:
    model = build(torch.bfloat16).float()  # weights that both dtypes hold
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**inputs(torch.float64)).sample
        eager = copy.deepcopy(model).bfloat16()(**inputs(torch.bfloat16)).sample
    report = imagen_fast.accelerate(model, dtype=torch.bfloat16, memory_format=memory_format)
    ours = run(model)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert_model_as_accurate(ours.bfloat16(), eager, truth)
    assert report.bytes_of("converted") == sum(2 * p.numel() for p in model.parameters())


def test_weights_and_interface_stay() -> None:
    model = build()
    before, state = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    seen: list[torch.dtype] = []
    model.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model.register_forward_hook(lambda module, args, output: seen.append(output.sample.dtype))
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    assert not torch.equal(run(model), before)
    assert seen == [torch.bfloat16, torch.float32]
    assert model.dtype == torch.float32
    assert inspect.signature(model.forward) == inspect.signature(diffusers.UNet2DConditionModel(**CONFIG).forward)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    imagen_fast.restore(model)
    assert "forward" not in vars(model)
    assert torch.equal(run(model), before)


def test_with_gradients_a_model_keeps_its_dtype() -> None:
    model = build()
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    model(**inputs()).sample.square().sum().backward()
    ours = [p.grad for p in model.parameters()]
    plain = build()
    plain(**inputs()).sample.square().sum().backward()
    for gradient, expected in zip(ours, [p.grad for p in plain.parameters()], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_a_call_with_gradients_waits_for_one_of_another_thread_that_converts() -> None:
    model = build()
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    inside, leave = threading.Event(), threading.Event()

    def stay(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            inside.set()
            leave.wait(30)

    model.mid_block.register_forward_pre_hook(stay)
    sampling = threading.Thread(target=run, args=(model,))
    sampling.start()
    assert inside.wait(30)
    found: list[Any] = []

    def train() -> None:
        try:
            found.append(model(**inputs()).sample)
        except RuntimeError as error:  # of dtypes that do not go together
            found.append(error)

    training = threading.Thread(target=train)
    training.start()
    training.join(1)
    early = list(found)
    leave.set()
    sampling.join()
    training.join()
    assert early == []
    torch.testing.assert_close(found[0], build()(**inputs()).sample, rtol=1e-4, atol=1e-4)


def test_an_error_inside_leaves_the_weights() -> None:
    model = build()
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    handle = model.mid_block.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    handle.remove()


@pytest.mark.parametrize("change", ["in place", "state", "hidden"])
def test_changed_weights_are_converted_anew(change: str) -> None:
    model, plain = build(), build()
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    run(model)
    for m in (model, plain):
        with torch.no_grad():
            if change == "in place":
                m.conv_in.weight.mul_(1.5)
            elif change == "state":
                m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()})
            else:
                m.conv_in.weight.data[0, 0] += 0.5
                imagen_fast.invalidate(m)
    imagen_fast.accelerate(plain, dtype=torch.bfloat16)
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_compute_in_that_dtype_too(copied: Any) -> None:
    model = build()
    before = run(model)
    imagen_fast.accelerate(model, dtype=torch.bfloat16, memory_format=torch.channels_last)
    ours = run(model)
    twin = copied(model)
    with torch.no_grad():
        model.conv_in.weight.zero_()
    assert torch.equal(run(twin), ours)
    imagen_fast.restore(twin)
    assert torch.equal(run(twin), before)


def _wrap(model: nn.Module) -> None:
    """As Hugging Face's accelerate hooks a module."""
    model._old_forward = model.forward
    model.forward = lambda *args, **kwargs: model._old_forward(*args, **kwargs)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_wrapped_forward(order: str) -> None:
    model, plain = build(), build()
    before = run(model)
    imagen_fast.accelerate(plain, dtype=torch.bfloat16)
    if order == "before":
        _wrap(model)
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    if order == "after":
        _wrap(model)
    assert torch.equal(run(model), run(plain))
    imagen_fast.restore(model)
    assert torch.equal(run(model), before)
    del model.forward, model._old_forward


def test_a_replaced_forward_is_reported() -> None:
    model = build()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    report = imagen_fast.accelerate(model, dtype=torch.bfloat16)
    assert [(left.name, "forward is replaced" in left.reason) for left in report.left] == [("", True)]
    assert run(model).dtype == torch.float32
    assert report.bytes_of("converted") == 0


def test_each_call_sets_the_options() -> None:
    model = build()
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    imagen_fast.accelerate(model, inference=False)
    assert not any(isinstance(value, _converted.ConvertedForward) for value in vars(model).values())
    assert packed_in(model) == []
    assert any(isinstance(module, _fused.Fused) for module in model.modules())


def test_verify_in_another_dtype() -> None:
    model = build()
    report = imagen_fast.accelerate(model, dtype=torch.bfloat16, verify=True)
    assert all(1e-4 < swapped.accuracy.eager < 0.1 for swapped in report.swapped if swapped.ops)


# ---- Packed weights, and the report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_is_packed_and_counted(dtype: torch.dtype) -> None:
    model = build(dtype)
    report = imagen_fast.accelerate(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert packed_in(model) == layers
    assert {copied.kind for copied in report.copies} == {"packed"}
    least = sum(layer.weight.nbytes for layer in layers)
    # The most that they can take
    run(model.to(memory_format=torch.channels_last), dtype)
    copies = [copy for layer in layers for key, copy in _kept.kept(layer).items() if key == "transformed"]
    assert copies or not _conv3x3.available(dtype)
    assert report.bytes_of("packed") >= least + sum(copy.weight.nbytes for copy in copies) // 4
    assert f"{len(layers)} weights packed" in str(report)
    assert "repeated calls: of the model" in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert imagen_fast.accelerate(model) == report


def test_packed_weights_can_be_bounded() -> None:
    model = build()
    before = run(model)
    every = imagen_fast.accelerate(model)
    limit = every.bytes_of("packed") // 3
    report = imagen_fast.accelerate(model, pack_limit=limit)
    assert 0 < report.bytes_of("packed") <= limit
    assert sum(_packed.packed_bytes(layer, None) for layer in packed_in(model)) == report.bytes_of("packed")
    assert len([left for left in report.left if "pack_limit" in left.reason]) == len(every.copies) - len(report.copies)
    imagen_fast.accelerate(model, pack_limit=0, strict=True)
    assert packed_in(model) == []
    imagen_fast.restore(model)
    assert torch.equal(run(model), before)


def test_a_model_that_was_restored_is_freed_at_once() -> None:
    model = build()
    imagen_fast.accelerate(model)
    for _ in range(4):
        run(model)
    imagen_fast.restore(model)
    weight = weakref.ref(model.conv_in.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_model_of_layers_alone_has_nothing_to_swap() -> None:
    model = build()
    for module in list(model.children()):
        if isinstance(module, nn.ModuleList):
            del module[:]
    model.mid_block = None
    with pytest.raises(imagen_fast.AccelerationError if hasattr(imagen_fast, "AccelerationError") else RuntimeError):
        imagen_fast.accelerate(model, strict=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a floating"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "memory_format must be"),
        ({"pack_limit": -1}, TypeError, "pack_limit must be"),
        ({"graphs": "always"}, ValueError, "graphs must be"),
    ],
)
def test_wrong_options_change_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build()
    with pytest.raises(error, match=message):
        imagen_fast.accelerate(model, **options)
    assert not any(isinstance(module, _fused.Fused) for module in model.modules())
