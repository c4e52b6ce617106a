"""Up paths that read skip connections where they are give the very numbers that they give with a concatenation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

import diffusers

import imagen_fast
from imagen_fast import _native
from imagen_fast.integrations import _diffusers_blocks, _packed, _skips, reference
from imagen_fast.models import EfficientUNet, EfficientUNetConfig, UNet, UNetConfig

from .unet_configs import IF, SD

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built here")


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets a number for every block that reads two tensors; also on machines where that is not faster."""
    monkeypatch.setattr(_packed._product, "is_faster", lambda weight: weight.dtype == torch.bfloat16)
    calls: list[int] = []

    def norm_act(*args: Any) -> Tensor:
        calls.append(1)
        return _skips.norm_act(*args)

    for module in (_diffusers_blocks, reference):
        monkeypatch.setattr(module, "norm_act", norm_act)
    return calls


def concatenating(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(x: Tensor, skip: Tensor, *args: Any) -> tuple[Tensor, None]:
        return torch.cat((x, skip), dim=1), None

    for module in (_diffusers_blocks, reference):
        monkeypatch.setattr(module, "parts", parts)


def with_random_weights(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 4) ** 0.5)
    return model.eval().bfloat16().to(memory_format=torch.channels_last)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def base() -> tuple[nn.Module, dict[str, Tensor], int]:
    torch.manual_seed(0)
    model = UNet(
        UNetConfig(channels=16, multipliers=(1, 2), blocks=1, attention_levels=(1,), head_width=8, text_dim=12)
    )
    given = {"x": normal(2, 3, 8, 8), "timestep": torch.tensor([3, 900]), "text": normal(2, 5, 12, seed=1)}
    return with_random_weights(model), given, 4


def efficient() -> tuple[nn.Module, dict[str, Tensor], int]:
    torch.manual_seed(0)
    config = EfficientUNetConfig(
        **{"channels": 16, "multipliers": (1, 2), "blocks": (1, 2), "heads": 2, "text_dim": None},
        **{"self_attention_levels": (), "cross_attention_levels": ()},
    )
    given = {"x": normal(2, 6, 16, 16), "timestep": torch.tensor([3, 900]), "augmentation": torch.tensor([1, 30])}
    return with_random_weights(EfficientUNet(config)), given, 3


def of_diffusers(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor], int]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**config)
    given = {"sample": normal(2, 3, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": normal(2, 5, 24)}
    blocks = sum(len(block.resnets) for block in model.up_blocks)
    return with_random_weights(model), given, blocks


KINDS = {
    "base": base,
    "efficient": efficient,
    "IF": lambda: of_diffusers(IF),
    "SD": lambda: of_diffusers(SD),
}


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    found = model(**given)
    return found if isinstance(found, Tensor) else found.sample


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers(kind: str, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, blocks = KINDS[kind]()
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    imagen_fast.accelerate(ours, graphs="off")
    imagen_fast.accelerate(plain, graphs="off")
    with torch.no_grad():
        found = output(ours, given)
        assert len(counted) == blocks
        concatenating(monkeypatch)
        assert torch.equal(found, output(plain, given))
        assert len(counted) == blocks


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_two_are_concatenated(kind: str, counted: list[int]) -> None:
    model, given, _ = KINDS[kind]()
    imagen_fast.accelerate(model, graphs="off")
    assert output(model, given).requires_grad
    with torch.no_grad():
        floats = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
        output(copy.deepcopy(model).float(), floats)
        with imagen_fast.use_backend("eager"):
            output(model, given)
    assert counted == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_the_concatenation(when: str, counted: list[int]) -> None:
    model, given, blocks = KINDS["IF"]()
    plain = copy.deepcopy(model)
    shapes: list[Any] = []
    for each in (plain, model):
        if when == "after" and each is model:
            imagen_fast.accelerate(model, graphs="off")
        each.up_blocks[0].resnets[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    if when == "before":
        imagen_fast.accelerate(model, graphs="off")
    with torch.no_grad():
        for each in (plain, model):
            output(each, given)
    assert shapes[0] == shapes[1]
    assert 0 < len(counted) < blocks  # the other up blocks go on


def test_free_u(counted: list[int]) -> None:
    model, given, _ = KINDS["SD"]()
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    imagen_fast.accelerate(ours, graphs="off")
    for each in (ours, plain):
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with torch.no_grad():
        torch.testing.assert_close(output(ours, given), output(plain, given), rtol=0.05, atol=0.05)
    assert counted == []


@pytest.mark.parametrize("kind", ["IF", "SD"])
def test_blocks_keep_their_names_and_are_pickled(kind: str) -> None:
    model, _, _ = KINDS[kind]()
    names = [type(block).__name__ for block in model.up_blocks]
    imagen_fast.accelerate(model)
    assert [type(block).__name__ for block in model.up_blocks] == names
    assert all(isinstance(block, _diffusers_blocks._ReadsSkips) for block in model.up_blocks)
    again = pickle.loads(pickle.dumps(model.up_blocks))
    assert [type(block) for block in again] == [type(block) for block in model.up_blocks]


def test_a_skip_is_a_tensor_to_all_but_cat() -> None:
    x, y = normal(1, 2, 3, 3), normal(1, 4, 3, 3, seed=1)
    joined = torch.cat([x, _skips.Skip(y)], dim=1)
    assert isinstance(joined, _skips.Joined)
    assert joined.hidden is x
    assert joined.skip is y
    assert torch.equal(torch.cat([_skips.Skip(y), x], dim=1), torch.cat([y, x], dim=1))
    assert torch.equal(torch.cat([x, _skips.Skip(x)]), torch.cat([x, x]))
    assert torch.equal(torch.add(_skips.Skip(x), 1, alpha=2), x + 2)
