from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import imagen_fast
from imagen_fast.nn import GroupNormAct


@pytest.mark.parametrize("affine", [True, False])
def test_state_dict_is_that_of_group_norm(affine: bool) -> None:
    theirs, ours = nn.GroupNorm(4, 8, affine=affine), GroupNormAct(4, 8, affine=affine)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name))


def test_computes_group_norm_and_activation() -> None:
    theirs = nn.GroupNorm(4, 8, eps=1e-3)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    x, scale, shift = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(2, 8)
    ours = GroupNormAct.from_group_norm(theirs, activation="gelu")
    torch.testing.assert_close(ours(x), F.gelu(theirs(x)))
    modulated = theirs(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(ours(x, scale, shift), F.gelu(modulated))


def test_from_group_norm_shares_parameters_and_mode() -> None:
    theirs = nn.GroupNorm(4, 8).eval()
    ours = GroupNormAct.from_group_norm(theirs)
    assert ours.weight is theirs.weight
    assert ours.bias is theirs.bias
    assert not ours.training
    assert GroupNormAct.from_group_norm(nn.GroupNorm(4, 8, affine=False)).weight is None
    with pytest.raises(TypeError, match="LayerNorm"):
        GroupNormAct.from_group_norm(nn.LayerNorm(8))  # type: ignore[arg-type]


def test_is_made_on_a_device_and_in_a_dtype() -> None:
    module = GroupNormAct(4, 8, device="meta", dtype=torch.bfloat16)
    assert module.weight is not None
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.bfloat16)


def test_copies_and_pickles() -> None:
    module = GroupNormAct(4, 8, activation=None)
    x = torch.randn(2, 8, 5)
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(duplicate(x), module(x))


def test_repr_tells_its_settings() -> None:
    assert repr(GroupNormAct(4, 8)) == "GroupNormAct(4, 8, activation='silu', eps=1e-05, affine=True)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_groups": 3}, "num_groups must divide num_channels = 8, got 3"),
        ({"num_groups": 0}, "num_groups"),
        ({"activation": "relu6"}, "unknown activation 'relu6'"),
        ({"eps": -1.0}, "eps must be finite"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imagen_fast.nn.GroupNormAct(**({"num_groups": 4, "num_channels": 8} | wrong))


def test_add_rms_norm_is_that_of_t5() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    theirs, ours = t5.T5LayerNorm(8, eps=1e-3), imagen_fast.nn.AddRMSNorm(8, eps=1e-3)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, residual), (theirs(x + residual), x + residual))
    assert repr(ours) == "AddRMSNorm(8, eps=0.001)"
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        imagen_fast.nn.AddRMSNorm(0)


def test_gated_gelu_of_two_tensors_or_one() -> None:
    packed = torch.randn(2, 5, 16)
    gate, value = packed.chunk(2, dim=-1)
    for approximate in ("tanh", "none"):
        module = imagen_fast.nn.GatedGELU(approximate)
        assert torch.equal(module(packed), module(gate, value))
        torch.testing.assert_close(module(packed), F.gelu(gate, approximate=approximate) * value)
    assert repr(imagen_fast.nn.GatedGELU()) == "GatedGELU(approximate='tanh')"
    with pytest.raises(ValueError, match="unknown approximate"):
        imagen_fast.nn.GatedGELU("sigmoid")


def test_can_be_traced_by_torchscript_with_gradients() -> None:
    module, x = GroupNormAct(4, 8), torch.randn(2, 8, 5, 5)
    traced = torch.jit.trace(module, x)
    y = torch.randn(3, 8, 4, 4)
    assert torch.equal(traced(y), module(y))
    wanted = torch.autograd.grad(module(y).square().sum(), [*module.parameters()])
    for ours, expected in zip(
        torch.autograd.grad(traced(y).square().sum(), [*module.parameters()]), wanted, strict=True
    ):
        torch.testing.assert_close(ours, expected)


_LOADED = """
import sys, torch, imagen_fast.ops
x = torch.linspace(-2, 2, 2 * 8 * 5 * 5).view(2, 8, 5, 5)
print(torch.export.load(sys.argv[1]).module()(x).square().sum().item())
"""


def test_an_exported_program_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    module = GroupNormAct(4, 8).eval().requires_grad_(False)
    x = torch.linspace(-2, 2, 2 * 8 * 5 * 5).view(2, 8, 5, 5)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "norm.pt2")
    ran = subprocess.run(
        [sys.executable, "-c", _LOADED, str(tmp_path / "norm.pt2")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(module(x).square().sum().item(), rel=1e-5)
