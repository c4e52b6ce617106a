"""accelerate and restore: nothing but the speed may change, whatever else is done to the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import imagen_fast
from imagen_fast import ops, testing
from imagen_fast.accelerate import AccelerationError
from imagen_fast.integrations import _fused, reference
from imagen_fast.models import (
    UNet,
)
from imagen_fast.models.layers import Attention, GroupNormSiLU, ResnetBlock, TextCondition

from .small_models import BLOCK, UNET, accelerated, efficient_unet, imagen, inputs, output, unet


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the channels of every call of `ops.group_norm_act`."""
    channels: list[int] = []
    op = ops.group_norm_act

    def counted(x: Tensor, *args, **kwargs) -> Tensor:
        channels.append(x.shape[1])
        return op(x, *args, **kwargs)

    monkeypatch.setattr(ops, "group_norm_act", counted)
    return channels


# ---- The result


def forward_and_gradients(
    model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, Tensor]:
    arguments = inputs(model, torch.bfloat16)  # rounded, so that all dtypes start from the same numbers
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
    arguments["x"] = arguments["x"].contiguous(memory_format=memory_format).requires_grad_()
    y = model(**arguments)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
    gradients = torch.autograd.grad(y, [arguments["x"], *model.parameters()], weights)
    return {
        "output": y.detach(),
        "gradient of x": gradients[0],
        "gradient of the parameters": torch.cat([g.flatten() for g in gradients[1:]]),
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build", [unet, efficient_unet])
def test_output_and_gradients_are_as_accurate_as_eager(build, dtype, memory_format):
    model = build().bfloat16().to(dtype)
    eager = forward_and_gradients(model, dtype, memory_format)
    truth = forward_and_gradients(copy.deepcopy(model).double(), torch.float64, memory_format)
    imagen_fast.accelerate(model)
    ours = forward_and_gradients(model, dtype, memory_format)
    for name, result in ours.items():
        testing.assert_model_as_accurate(result, eager[name], truth[name], name=name)


def test_every_group_norm_runs_on_the_op(calls):
    model = accelerated(unet())
    output(model)
    assert len(calls) == sum(isinstance(module, nn.GroupNorm) for module in model.modules())


@pytest.mark.parametrize("build", [unet, efficient_unet])
def test_attention_reads_text_and_pixels_where_they_are(build, monkeypatch):
    model, contexts, op = accelerated(build()), [], ops.attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
        contexts.append(kwargs["context_k"])
        return op(q, k, v, **kwargs)

    monkeypatch.setattr(ops, "attention", counted)
    output(model)
    assert len(contexts) == sum(isinstance(module, Attention) for module in model.modules())
    assert all(context is not None and context.shape[2] == 6 for context in contexts)


@pytest.mark.parametrize("self_attention", [True, False], ids=["self", "text-alone"])
@pytest.mark.parametrize("with_text", [True, False], ids=["text", "no-text"])
@pytest.mark.parametrize("heads", [2, 4, 8], ids=["width-16", "width-8", "width-4"])
def test_attention_of_every_form(self_attention, with_text, heads):
    if not (self_attention or with_text):
        pytest.skip("there is nothing to attend to")
    torch.manual_seed(0)
    layer = Attention(32, heads=heads, text_width=12, self_attention=self_attention, groups=4)
    nn.init.normal_(layer.to_out.weight)
    x, tokens = torch.randn(2, 32, 5, 7), torch.randn(2, 6, 12)
    text = TextCondition(tokens, torch.arange(6) < torch.tensor([[6], [1]])) if with_text else None
    expected = layer(x, text)
    layer.__class__ = reference.FusedAttention
    torch.testing.assert_close(layer(x, text), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [unet, efficient_unet])
def test_restored_model_is_bit_identical(build):
    model = build()
    before, classes = output(model), [type(module) for module in model.modules()]
    imagen_fast.accelerate(model)
    output(model)
    imagen_fast.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(output(model), before)


def test_nothing_is_seen_from_outside():
    model = unet()
    state, names, parameters = model.state_dict(), list(model.named_modules()), list(model.parameters())
    attributes = [set(vars(module)) for module in model.modules()]
    imagen_fast.accelerate(model)
    output(model)
    attributes[0].update(("forward", "_replicate_for_data_parallel"))  # the first repeats recorded calls
    assert type(model) is UNet
    assert list(model.named_modules()) == names
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[key].data_ptr() == tensor.data_ptr() for key, tensor in state.items())


def test_accelerate_and_restore_are_idempotent():
    model = unet()
    imagen_fast.restore(model)
    first = imagen_fast.accelerate(model)
    classes = [type(module) for module in model.modules()]
    assert imagen_fast.accelerate(model) == first
    assert [type(module) for module in model.modules()] == classes
    imagen_fast.restore(model)
    imagen_fast.restore(model)
    assert not any(isinstance(module, _fused.Fused) for module in model.modules())


def test_other_instances_stay():
    model, other = unet(), unet()
    imagen_fast.accelerate(model)
    assert type(other.get_submodule(BLOCK)) is ResnetBlock


# ---- What is done to a model before and after


class DoubledGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


class Negated(Tensor):
    """Another tensor than it looks to whoever computes with it, as quantized ones are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = tuple(-a.as_subclass(Tensor) if isinstance(a, Negated) else a for a in args)
        kwargs = {k: -v.as_subclass(Tensor) if isinstance(v, Negated) else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Marked(Tensor):
    """Whatever is computed from it is marked, too."""


def _replace_forward(norm: nn.Module) -> None:
    """As Hugging Face's accelerate hooks a module for offloading."""
    norm._old_forward = norm.forward
    norm.forward = functools.update_wrapper(
        functools.partial(lambda module, *args: 2 * module._old_forward(*args), norm), norm._old_forward
    )


def _negate(norm: nn.Module) -> None:
    weight = norm.weight.detach().as_subclass(Negated)
    del norm._parameters["weight"]
    norm._parameters["weight"] = weight


def _replace(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    norm = DoubledGroupNorm(4, model.get_submodule(name).num_channels)
    setattr(model.get_submodule(parent), child, norm)


def _detach_weight(model: nn.Module, name: str, as_buffer: bool = False) -> None:
    """As libraries do that keep all parameters in one flat tensor, and leave views of it in the modules."""
    norm = model.get_submodule(name)
    weight = 3 * norm.weight.detach()
    del norm.weight
    norm.register_buffer("weight", weight) if as_buffer else setattr(norm, "weight", weight)


def _double_backward(module, grad_input, grad_output):
    return tuple(2 * g for g in grad_input)


CHANGES: dict[str, Callable[[UNet, str], object]] = {
    "forward hook": lambda model, name: model.get_submodule(name).register_forward_hook(lambda m, a, y: 2 * y),
    "pre-hook": lambda model, name: model.get_submodule(name).register_forward_pre_hook(lambda m, a: a[0].relu()),
    "backward hook": lambda model, name: model.get_submodule(name).register_full_backward_hook(_double_backward),
    "backward pre-hook": lambda model, name: model.get_submodule(name).register_full_backward_pre_hook(
        lambda m, g: (2 * g[0],)
    ),
    "parametrization": lambda model, name: parametrize.register_parametrization(
        model.get_submodule(name), "weight", Tripled()
    ),
    "replaced forward": lambda model, name: _replace_forward(model.get_submodule(name)),
    "tensor subclass": lambda model, name: _negate(model.get_submodule(name)),
    "attribute in place of a parameter": _detach_weight,
    "buffer in place of a parameter": lambda model, name: _detach_weight(model, name, as_buffer=True),
    "another module": _replace,
    "eps": lambda model, name: setattr(model.get_submodule(name), "eps", 1.0),
    "new values": lambda model, name: model.get_submodule(name).weight.data.mul_(2),
    "new parameter": lambda model, name: setattr(
        model.get_submodule(name), "weight", nn.Parameter(3 * model.get_submodule(name).weight.detach())
    ),
}
NORMS = (f"{BLOCK}.norm1", f"{BLOCK}.norm2", "down.2.attention.norm", "norm_out")


def output_and_gradient(model: nn.Module) -> Tensor:
    arguments = inputs(model)
    x = arguments["x"].requires_grad_()
    y = model(**arguments)
    return torch.cat((y.detach().flatten(), torch.autograd.grad(y.square().sum(), x)[0].flatten()))


# Another module in the place of the output norm, which is fused itself, would only make another model.
@pytest.mark.parametrize(
    ("change", "norm"),
    [(change, norm) for change in CHANGES for norm in NORMS if (change, norm) != ("another module", "norm_out")],
)
def test_changes_to_a_norm_count_before_and_after(change, norm):
    plain, before, after = unet(), unet(), accelerated(unet())
    unchanged = output_and_gradient(plain)
    output_and_gradient(after)
    for model in (plain, before, after):
        CHANGES[change](model, norm)
    imagen_fast.accelerate(before)
    expected = output_and_gradient(plain)
    assert not torch.allclose(expected, unchanged, rtol=1e-2), "the change does nothing: the test is void"
    for model in (before, after):
        torch.testing.assert_close(output_and_gradient(model), expected, rtol=1e-4, atol=1e-4)
        imagen_fast.restore(model)
        assert torch.equal(output_and_gradient(model), expected)


def test_hook_can_be_removed_again(calls):
    model = accelerated(unet())
    output(model)
    all_norms = len(calls)
    handle = model.get_submodule(NORMS[0]).register_forward_hook(lambda m, a, y: None)
    calls.clear()
    output(model)
    assert len(calls) == all_norms - 1
    handle.remove()
    calls.clear()
    output(model)
    assert len(calls) == all_norms


@pytest.mark.parametrize("norm", NORMS)
def test_weights_of_a_tensor_subclass_do_not_reach_the_op(norm, calls):
    """The op has no rules for what they mean (quantized, distributed); the module that holds them has."""
    model = accelerated(unet())
    _negate(model.get_submodule(norm))
    output(model)
    assert len(calls) == sum(isinstance(module, nn.GroupNorm) for module in model.modules()) - 1


def test_inputs_of_a_tensor_subclass_do_not_reach_the_op(calls):
    model = accelerated(unet())
    x, embedding = torch.randn(2, 16, 8, 8).as_subclass(Marked), torch.randn(2, 64).as_subclass(Marked)
    assert isinstance(model.norm_out(model.get_submodule(BLOCK)(x, embedding)), Marked)
    assert calls == []


def test_parametrization_of_an_output_norm_outlives_restore():
    plain, model = unet(), accelerated(unet())
    for m in (plain, model):
        parametrize.register_parametrization(m.norm_out, "weight", Tripled())
    imagen_fast.restore(model)
    assert torch.equal(output(model), output(plain))
    parametrize.remove_parametrizations(model.norm_out, "weight")
    assert type(model.norm_out) is GroupNormSiLU


def test_hooks_on_all_modules_see_all_norms():
    model = accelerated(unet())
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m))):
        output(model)
    assert seen.count(nn.GroupNorm) == sum(type(module) is nn.GroupNorm for module in model.modules())


def test_hooks_on_a_block_fire_once():
    model, fired = unet(), []
    model.get_submodule(BLOCK).register_forward_hook(lambda m, a, y: fired.append("before"))
    imagen_fast.accelerate(model)
    model.get_submodule(BLOCK).register_forward_pre_hook(lambda m, a: fired.append("after"))
    output(model)
    assert fired == ["after", "before"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_wrapped_forward_of_a_block_follows_its_class(when, calls):
    """As Hugging Face's accelerate wraps it: the bound method is kept on the instance and called."""
    plain, model = unet(), unet()
    _replace_forward(plain.get_submodule(BLOCK))
    expected = output(plain)
    if when == "after":
        imagen_fast.accelerate(model)
    _replace_forward(model.get_submodule(BLOCK))
    imagen_fast.accelerate(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    imagen_fast.restore(model)
    assert torch.equal(output(model), expected)


def test_forward_that_is_put_back_on_the_instance_is_the_class_s(calls):
    model = unet()
    norm = model.get_submodule(NORMS[0])
    norm.forward = norm.forward  # what removing such a wrapper leaves behind
    output(accelerated(model))
    assert len(calls) == sum(isinstance(module, nn.GroupNorm) for module in model.modules())


class OwnBlock(ResnetBlock):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return -super().forward(x, embedding)


def _own_class(model: UNet) -> None:
    model.get_submodule(BLOCK).__class__ = OwnBlock


def _own_forward(model: UNet) -> None:
    block = model.get_submodule(BLOCK)
    forward = block.forward
    block.forward = lambda *args: -forward(*args)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_own_class, "subclass of ResnetBlock", id="subclass"),
        pytest.param(_own_forward, "forward is replaced", id="forward"),
    ],
)
def test_blocks_that_are_not_the_original_are_left(change, reason):
    model = unet()
    change(model)
    before = output(model)
    (left,) = imagen_fast.accelerate(model).left
    assert left.name == BLOCK
    assert reason in left.reason
    assert not isinstance(model.get_submodule(BLOCK), _fused.Fused)
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    imagen_fast.restore(model)
    with pytest.raises(AccelerationError, match=rf"{BLOCK}.*{reason}"):
        imagen_fast.accelerate(model, strict=True)
    assert not any(isinstance(module, _fused.Fused) for module in model.modules())


def test_model_on_meta_that_is_loaded_later():
    with torch.device("meta"):
        model = UNet(UNET)
    imagen_fast.accelerate(model)
    model.load_state_dict(unet().state_dict(), assign=True)
    assert torch.equal(output(model), output(accelerated(unet())))


def test_parts_that_a_module_s_system_keeps_out_of_its_modules_are_found():
    system = imagen()
    holder, unets = nn.ModuleList([system]), dict(system.unets.items())
    del system.unets
    system.unets = unets  # a plain dictionary, as imagen-pytorch's cascades have a plain list while they train
    imagen_fast.accelerate(system)
    fused = [module for unet in unets.values() for module in unet.modules() if isinstance(module, _fused.Fused)]
    assert fused
    imagen_fast.restore(holder)
    assert not any(isinstance(module, _fused.Fused) for module in fused)
