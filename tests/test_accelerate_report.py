"""What accelerate reports and verifies, what it refuses, and what importing it costs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast import ops
from imagen_fast.accelerate import AccelerationError
from imagen_fast.integrations import _fused
from imagen_fast.models import (
    T5Encoder,
    UNet,
)
from imagen_fast.models.layers import ResnetBlock

from .small_models import BLOCK, UNET, accelerated, imagen, inputs, output, randomized, unet

# ---- Report


def test_report_of_a_cascade():
    model = imagen()
    report = imagen_fast.accelerate(model)
    for entry in report.swapped:
        module = model.get_submodule(entry.name)
        assert entry.fused_name == f"{type(module).__module__}.{type(module).__qualname__}"
        assert entry.class_name == f"{module.original.__module__}.{module.original.__qualname__}"
        assert entry.ops == module.ops
        assert entry.notes == ()
    fused = {name for name, module in model.named_modules() if isinstance(module, _fused.Fused)}
    assert {entry.name for entry in report.swapped} == fused
    parts = {".".join(name.split(".")[: 2 if name.startswith("unets") else 1]) for name in fused}
    assert parts == {"text_encoder", "unets.base", "unets.super"}
    assert report.left == ()
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["swapped"][0]["name"] == report.swapped[0].name
    lines = str(report).splitlines()
    assert lines[0] == f"Imagen: {len(fused)} modules on fused ops, 0 left as they were"
    assert any(line.split()[:4] == ["unets.base.down.*.resnet", "ResnetBlock", "FusedResnetBlock", "group_norm_act"]
               for line in lines)  # fmt: skip
    assert any(line.split()[:4] == ["text_encoder.blocks.*", "T5Block", "FusedT5Block", "rms_norm"] for line in lines)


def test_report_of_a_cascade_whose_encoder_has_nothing_to_swap():
    model = imagen()
    _empty(model.text_encoder)
    report = imagen_fast.accelerate(model)
    assert [(left.name, left.class_name) for left in report.left] == [
        ("text_encoder", "imagen_fast.models.t5.encoder.T5Encoder")
    ]
    lines = str(report).splitlines()
    assert any(line.startswith("text_encoder  T5Encoder  none of its modules has a fused form") for line in lines)


def _empty(encoder: T5Encoder) -> T5Encoder:
    encoder.blocks, encoder.final_norm = nn.ModuleList(), nn.Identity()
    return encoder


def test_sampling_with_a_cascade():
    model = imagen()
    eager = model.sample(["a cat", ""], seed=1, progress=False)
    imagen_fast.accelerate(model)
    fast = model.sample(["a cat", ""], seed=1, progress=False)
    for a, b in zip(eager, fast, strict=True):
        difference = torch.tensor(list(a.tobytes())).sub(torch.tensor(list(b.tobytes()))).abs().max()
        assert difference <= 1
    imagen_fast.restore(model)
    assert [p.tobytes() for p in model.sample(["a cat", ""], seed=1, progress=False)] == [p.tobytes() for p in eager]


def test_report_says_which_children_are_called():
    model = unet()
    handle = model.get_submodule(f"{BLOCK}.norm1").register_forward_hook(lambda m, a, y: None)
    notes = {entry.name: entry.notes for entry in imagen_fast.accelerate(model).swapped}
    assert notes.pop(BLOCK) == ("norm1 (GroupNorm) is called as it is: it has hooks",)
    assert not any(notes.values())
    with pytest.raises(AccelerationError, match=f"{BLOCK}: norm1"):
        imagen_fast.accelerate(model, strict=True)
    handle.remove()
    assert not any(entry.notes for entry in imagen_fast.accelerate(model, strict=True).swapped)


def test_model_with_nothing_to_swap():
    encoder = _empty(imagen().text_encoder)
    report = imagen_fast.accelerate(encoder)
    assert report.swapped == ()
    assert [left.reason for left in report.left] == ["none of its modules has a fused form"]
    assert "nothing to swap" in str(report)
    with pytest.raises(AccelerationError, match="fused form"):
        imagen_fast.accelerate(encoder, strict=True)


class OwnUNet(UNet):
    pass


def test_subclasses_of_served_models_are_served():
    model = randomized(OwnUNet(UNET))
    assert len(imagen_fast.accelerate(model).swapped) == len(imagen_fast.accelerate(unet()).swapped)
    assert type(model) is OwnUNet


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        pytest.param(nn.Linear(2, 2), r"got torch.nn.modules.linear.Linear.*Imagen, UNet, EfficientUNet", id="module"),
        pytest.param(nn.ModuleList([UNet(UNET)]), "holds a UNet, which can be passed instead", id="container"),
        pytest.param("model", "got builtins.str", id="string"),
    ],
)
def test_objects_that_are_not_served(obj, message):
    with pytest.raises(TypeError, match=message):
        imagen_fast.accelerate(obj)


def test_restore_takes_any_module_and_nothing_else():
    model = accelerated(unet())
    imagen_fast.restore(nn.Sequential(model))
    assert type(model.get_submodule(BLOCK)) is ResnetBlock
    with pytest.raises(TypeError, match="got builtins"):
        imagen_fast.restore("model")


# ---- verify


def test_verify_measures_every_module():
    model = imagen().train()
    report = imagen_fast.accelerate(model, verify=True)
    for entry in report.swapped:
        assert 0 < entry.accuracy.ours <= entry.accuracy.allowed, entry.name
        assert 0 < entry.accuracy.eager < 1e-5, entry.name
    assert "largest error" in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_verify_is_not_misled_by_dropout():
    model = randomized(UNet(dataclasses.replace(UNET, dropout=0.5))).train()
    assert all(entry.accuracy.eager < 1e-5 for entry in imagen_fast.accelerate(model, verify=True).swapped)


@pytest.mark.parametrize(
    ("build", "verify"),
    [
        pytest.param(unet, inputs(unet()), id="keywords"),
        pytest.param(unet, tuple(inputs(unet()).values()), id="positions"),
        pytest.param(imagen, "a cat", id="prompt"),
        pytest.param(imagen, ["a cat", "一只猫"], id="prompts"),
    ],
)
def test_verify_with_inputs(build, verify):
    report = imagen_fast.accelerate(build(), verify=verify)
    assert all(entry.accuracy is not None for entry in report.swapped)


@pytest.mark.parametrize("accelerated_before", [False, True], ids=["", "accelerated before"])
@pytest.mark.parametrize("value", [1.01, float("nan")], ids=["inaccurate", "nan"])
def test_verify_restores_where_accuracy_falls_short(monkeypatch, value, accelerated_before):
    model = unet()
    before = output(model)
    if accelerated_before:
        imagen_fast.accelerate(model)
    op = ops.group_norm_act
    monkeypatch.setattr(
        ops, "group_norm_act", lambda x, *args, **kwargs: op(x, *args, **kwargs) * (value if x.shape[1] == 16 else 1)
    )
    with pytest.raises(AccelerationError, match=rf"of UNet are less accurate(.|\n)*{BLOCK}: .*error|{BLOCK}: .*nan"):
        imagen_fast.accelerate(model, verify=True)
    assert torch.equal(output(model), before)
    assert not any(isinstance(module, _fused.Fused) for module in model.modules())


def test_verify_with_wrong_inputs_changes_nothing():
    model = unet()
    with pytest.raises(TypeError, match="verify must be True, a tuple"):
        imagen_fast.accelerate(model, verify=torch.zeros(1))
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\)"):
        imagen_fast.accelerate(model, verify=(torch.zeros(1, 4, 8, 8), torch.zeros(1)))
    assert not any(isinstance(module, _fused.Fused) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_verify_names_what_its_inputs_do_not_reach():
    class Shortened(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm_out(x)

    report = imagen_fast.accelerate(randomized(Shortened(UNET)), verify=(torch.randn(2, 16, 4, 4),))
    notes = {entry.name: entry.notes for entry in report.swapped}
    assert notes.pop("norm_out") == ()
    assert set(notes.values()) == {("verify did not reach it",)}


def test_verify_needs_weights():
    with torch.device("meta"):
        model = UNet(UNET)
    with pytest.raises(ValueError, match="meta device"):
        imagen_fast.accelerate(model, verify=True)
    assert type(model.get_submodule(BLOCK)) is ResnetBlock


# ---- Import


@pytest.mark.parametrize(
    "first",
    ["from imagen_fast.accelerate import Report", "from imagen_fast import accelerate, restore"],
)
def test_import_is_light_and_binds_the_function(first):
    code = f"""
import sys
{first}
import imagen_fast
for _ in range(2):
    assert type(imagen_fast.accelerate).__name__ == "function", imagen_fast.accelerate
    import imagen_fast.accelerate
from imagen_fast.accelerate import Report
assert imagen_fast.Report is Report
heavy = {{"transformers", "diffusers", "imagen_fast.models", "torch._dynamo.convert_frame"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
