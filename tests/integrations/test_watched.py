"""What keeps calls of a model from being repeated: code of which nobody knows what it does, and changes of any."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.integrations._graphed import GraphedForward
from imagen_fast.integrations._watched import Watched

from .test_graphs import build, inputs
from .unet_configs import IF, SD

diffusers = pytest.importorskip("diffusers")


def host(config: dict[str, Any] = SD) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**config).eval()


def call(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = model.config.encoder_hid_dim or model.config.cross_attention_dim
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8, 8), (2, 5, width)))
    with torch.no_grad():
        found: Tensor = model(sample, 7, text).sample
    return found


def replayed(model: Any) -> int:
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    return forward.replays.replayed


@pytest.mark.parametrize("config", [IF, SD], ids=["if", "sd"])
def test_the_code_of_hosts_is_known(config: dict[str, Any]) -> None:
    model = host(config)
    assert Watched(model).obstacle is None
    imagen_fast.accelerate(model)
    watched = Watched(model)
    assert watched.obstacle is None
    assert not watched.has_changed()


class Switch:
    """Of a user: whether pictures are changed is nothing that a record could know."""

    on = False

    def time(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = type(module).get_time_embed(module, *args, **kwargs)
        return found + 1 if self.on else found


def _method_of_the_instance(model: Any, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    def time(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return switch.time(self, *args, **kwargs)

    model.get_time_embed = MethodType(time, model)


def _method_of_an_object(model: Any, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    model.get_time_embed = functools.partial(switch.time, model)


def _method_of_the_class(model: Any, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(model).get_time_embed

    @functools.wraps(original)
    def time(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = original(self, *args, **kwargs)
        return found + 1 if switch.on else found

    monkeypatch.setattr(type(model), "get_time_embed", time)


def _forward_of_a_class(model: Any, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(model.mid_block.attentions[0].transformer_blocks[0])
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x, *a, **k: original(self, x * (2 if switch.on else 1), *a, **k))


PATCHES = [_method_of_the_instance, _method_of_an_object, _method_of_the_class, _forward_of_a_class]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__.strip("_"))
def test_code_of_users_is_run(
    patch: Callable[[Any, Switch, pytest.MonkeyPatch], None], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, switch = host(), Switch()
    imagen_fast.accelerate(model)
    if when == "after":
        for _ in range(4):
            call(model)
        assert replayed(model) == 1
    patch(model, switch, monkeypatch)
    before = [call(model) for _ in range(4)]
    switch.on = True
    assert not torch.allclose(call(model), before[-1])
    assert replayed(model) == (when == "after")


def test_a_patch_of_a_class_that_a_form_derives_from_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = host()
    imagen_fast.accelerate(model)
    for _ in range(4):
        before = call(model)
    cls = next(each for each in type(model.up_blocks[0]).__mro__ if each.__module__.startswith("diffusers"))
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x, *a, **k: original(self, 2 * x, *a, **k))
    assert not torch.allclose(call(model), before)


def test_a_block_that_is_compiled_is_run_as_it_is() -> None:
    model, plain = host(), host()
    imagen_fast.accelerate(model)
    model.mid_block.compile(backend="eager", fullgraph=True)
    for seed in range(4):
        torch.testing.assert_close(call(model, seed), call(plain, seed), rtol=1e-4, atol=1e-5)
    assert replayed(model) == 0
    assert any("is compiled" in reason for reason in vars(model)["forward"].replays.reasons)
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_module_that_is_scripted_is_run_as_it_is(when: str) -> None:
    model, plain = host(), host()
    if when == "before":
        model.conv_norm_out = torch.jit.script(model.conv_norm_out)
    imagen_fast.accelerate(model)
    if when == "after":
        call(model)
        model.conv_norm_out = torch.jit.script(model.conv_norm_out)
    for seed in range(4):
        torch.testing.assert_close(call(model, seed), call(plain, seed), rtol=1e-4, atol=1e-5)
    assert replayed(model) == 0


def test_a_part_that_is_invalidated_is_read_anew() -> None:
    model = build()
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            before = model(**inputs(0))
        weight = model.middle1.resnet.conv1.weight
        weight.data.view(-1)[1:2:1] += 100.0  # one number, of which nothing tells
        imagen_fast.invalidate(model.middle1)
        assert not torch.allclose(model(**inputs(0)), before)


def test_a_call_with_gradients_in_another_thread_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    imagen_fast.accelerate(model)
    has_changed = Watched.has_changed

    def meanwhile(self: Watched) -> bool:
        forward = vars(model)["forward"]
        forward._watched = forward._current = None  # it forgets what it knows, and waits for the lock of the records
        return has_changed(self)

    with torch.no_grad():
        model(**inputs(0))
        monkeypatch.setattr(Watched, "has_changed", meanwhile)
        for seed in range(3):
            assert isinstance(model(**inputs(seed)), Tensor)


def test_functions_without_a_module_are_known_by_where_they_are_defined() -> None:
    module = nn.Identity()
    module.function = lambda x: x
    module.function.__module__ = None
    assert "function of no library" in str(Watched(module).obstacle)
