"""What depends on the text alone is computed once for each text, and never given for another one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.integrations import _text

from .unet_configs import IF, SD

diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

from imagen_fast.integrations import _diffusers_blocks  # noqa: E402  # imports diffusers

SUPER_RESOLUTION = {**IF, "mid_block_only_cross_attention": True, "only_cross_attention": True}
KINDS = {"if": IF, "if-sr": SUPER_RESOLUTION, "sd": SD}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def unet(kind: str) -> Any:
    return build(kind)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the class of every module that makes keys and values, or an embedding, of a text."""
    calls: list[str] = []
    project, pool = _diffusers_blocks.FusedAttention._of_text, _diffusers_blocks.TextTimeEmbedding.forward

    def counted_project(self: Any, text: Tensor, added: bool) -> Any:
        calls.append("attention")
        return project(self, text, added)

    def counted_pool(self: Any, text: Tensor) -> Any:
        calls.append("pooling")
        return pool(self, text)

    monkeypatch.setattr(_diffusers_blocks.FusedAttention, "_of_text", counted_project)
    monkeypatch.setattr(_diffusers_blocks.TextTimeEmbedding, "forward", counted_pool)
    return calls


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**KINDS[kind]).eval()


def prompt(seed: int = 0) -> Tensor:
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(seed))


def step(model: Any, text: Tensor, time: int = 10) -> Tensor:
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(time))
    return model(sample, torch.tensor([time, time]), text).sample


def assert_fresh(model: Any, text: Tensor) -> None:
    """A step is that of a copy that keeps nothing yet."""
    torch.testing.assert_close(step(model, text), step(copy.deepcopy(model), text), rtol=1e-4, atol=1e-5)


def test_a_text_is_projected_once(unet: Any, kind: str, made: list[str]) -> None:
    plain = copy.deepcopy(unet)
    report = imagen_fast.accelerate(unet)
    keeping = [s for s in report.swapped if "Text" in s.fused_name]
    step(unet, prompt())
    attentions = sum(isinstance(m, diffusers.models.attention_processor.Attention) for m in unet.modules())
    assert made.count("attention") == (attentions if kind != "sd" else attentions // 2)
    assert made.count("pooling") == (kind != "sd")
    assert len(keeping) == attentions + 2 * (kind != "sd")  # and the projection of the text
    made.clear()
    for time in (400, 900):
        torch.testing.assert_close(step(unet, prompt(), time), step(plain, prompt(), time), rtol=1e-4, atol=1e-4)
    assert [call for call in made if call == "attention"] == []
    made.clear()
    step(unet, prompt(1))
    assert "attention" in made


def test_two_texts_by_turns_are_projected_once_each(unet: Any, made: list[str]) -> None:
    imagen_fast.accelerate(unet)
    expected = [step(unet, prompt(seed)) for seed in (0, 1)]
    made.clear()
    for _ in range(2):
        for seed in (0, 1):
            assert torch.equal(step(unet, prompt(seed)), expected[seed])
    assert made == []
    assert not torch.equal(*expected)


@pytest.mark.parametrize("option", [{"cache_text": False}, {"inference": False}], ids=str)
def test_it_can_be_switched_off_and_on(unet: Any, option: dict[str, bool], made: list[str]) -> None:
    imagen_fast.accelerate(unet)
    imagen_fast.accelerate(unet, **option)
    step(unet, prompt())
    count = made.count("attention")
    step(unet, prompt())
    assert made.count("attention") == 2 * count > 0
    report = imagen_fast.accelerate(unet)
    assert any("Text" in swapped.fused_name for swapped in report.swapped)


def test_not_with_gradients(unet: Any, made: list[str]) -> None:
    plain = copy.deepcopy(unet)
    imagen_fast.accelerate(unet)
    step(unet, prompt())
    made.clear()
    with torch.enable_grad():
        gradients = []
        for model in (plain, unet):
            text = prompt().requires_grad_()
            step(model, text).square().sum().backward()
            gradients.append((text.grad, [p.grad for p in model.parameters()]))
    assert made
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


# ---- Never stale


def test_a_text_written_in_place(unet: Any) -> None:
    imagen_fast.accelerate(unet)
    text = prompt()
    before = step(unet, text)
    text[1, 4, 3] += 2
    assert_fresh(unet, text)
    assert not torch.equal(step(unet, text), before)
    text.data[0, 2] *= 3  # which PyTorch does not count; so texts are compared by value
    assert_fresh(unet, text)


def test_texts_of_inference_mode(unet: Any) -> None:
    imagen_fast.accelerate(unet)
    with torch.inference_mode():
        text = prompt()
        before = step(unet, text)
        text.mul_(1.5)
        assert_fresh(unet, text)
        assert not torch.equal(step(unet, text), before)
    step(unet, prompt())  # and what was kept there serves here


def test_a_text_with_nan_is_kept(made: list[str]) -> None:
    unet = build("sd")
    imagen_fast.accelerate(unet)
    text = prompt()
    text[0, 0, 0] = float("nan")
    step(unet, text)
    made.clear()
    assert step(unet, text)[0].isnan().all()
    assert made == []


def _text_layers(model: Any) -> list[nn.Module]:
    """Those whose results depend on the text alone."""
    names = (
        "norm_cross",
        "add_k_proj",
        "add_v_proj",
        "attn2.to_k",
        "attn2.to_v",
        "add_embedding.proj",
        "encoder_hid_proj",
    )
    return [module for name, module in model.named_modules() if name.endswith(names) and list(module.parameters(False))]


def _optimize(model: Any, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    with torch.enable_grad():
        step(model, prompt()).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def _hidden(model: Any) -> None:
    _text_layers(model)[-1].weight.data.view(-1)[3] += 1
    imagen_fast.invalidate(model)


def _merge(model: Any) -> None:
    for layer in _text_layers(model):
        layer.weight.data += 0.1


def _hook(model: Any) -> None:
    for layer in _text_layers(model):
        layer.register_forward_hook(lambda module, args, output: 1.1 * output)


WEIGHTS: dict[str, Callable[[Any], object]] = {
    "load_state_dict": lambda model: model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()}),
    "in place": lambda model: [layer.weight[:1].add_(0.5) for layer in _text_layers(model)],
    "new parameter": lambda m: [setattr(x, "weight", nn.Parameter(1.1 * x.weight)) for x in _text_layers(m)],
    "optimizer": _optimize,
    "fused optimizer": lambda model: _optimize(model, fused=True),
    "merged behind PyTorch's back": _merge,
    "hidden, and invalidate": _hidden,
    "hooks": _hook,
    "eps": lambda m: [setattr(x, "eps", 0.3) for x in m.modules() if isinstance(x, nn.GroupNorm | nn.LayerNorm)],
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_changed_weights(unet: Any, kind: str, change: str) -> None:
    assert len(_text_layers(unet)) >= 2
    imagen_fast.accelerate(unet)
    before = step(unet, prompt())
    WEIGHTS[change](unet)
    ours = step(unet, prompt())
    assert not torch.allclose(ours, before, atol=1e-5), "the change does nothing: the test is void"
    imagen_fast.restore(unet)
    torch.testing.assert_close(ours, step(unet, prompt()), rtol=1e-3, atol=1e-3)


def test_a_result_that_somebody_writes_to(made: list[str]) -> None:
    unet = build("if")
    imagen_fast.accelerate(unet)
    expected = step(unet, prompt())
    handle = unet.add_embedding.register_forward_hook(lambda module, args, output: output.zero_())
    assert not torch.equal(step(unet, prompt()), expected)
    handle.remove()
    assert torch.equal(step(unet, prompt()), expected)


def test_at_most_two_texts_are_kept() -> None:
    unet = build("sd")
    imagen_fast.accelerate(unet)
    for seed in range(5):
        step(unet, prompt(seed))
    attention = next(
        m for m in unet.modules() if isinstance(m, _diffusers_blocks.TextKeepingAttention) and m.is_cross_attention
    )
    assert len(_text.kept(attention)["text"]) == 2


# ---- LoRA


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="LoRA layers are peft's")


def add_lora(model: Any, peft: Any, name: str = "one", seed: int = 3) -> None:
    targets = ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "conv1", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters(unet: Any, kind: str, order: str, peft: Any) -> None:
    plain = copy.deepcopy(unet)
    untouched = step(plain, prompt())
    if order == "after":
        imagen_fast.accelerate(unet)
        step(unet, prompt())
    for model in (plain, unet):
        add_lora(model, peft)
    imagen_fast.accelerate(unet)

    def check() -> Tensor:
        expected = step(plain, prompt())
        for _ in range(2):
            torch.testing.assert_close(step(unet, prompt()), expected, rtol=1e-3, atol=1e-3)
        return expected

    def both(change: Callable[[Any], object]) -> Tensor:
        for model in (plain, unet):
            change(model)
        return check()

    def scale(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("one", 0.4)

    results = [untouched, check()]
    results.append(both(scale))
    results.append(both(lambda model: add_lora(model, peft, "two", 4)))
    results.append(both(lambda model: model.set_adapter("one")))
    results.append(both(lambda model: model.disable_adapters()))
    results.append(both(lambda model: (model.enable_adapters(), model.set_adapter("two"))))
    results.append(both(lambda model: model.fuse_lora(adapter_names=["two"])))
    results.append(both(lambda model: model.unload_lora()))  # the base layers keep what was merged
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.pairwise(results[:6]))
    torch.testing.assert_close(results[5], untouched, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[-1], results[-2], rtol=1e-3, atol=1e-3)
    imagen_fast.restore(unet)
    assert torch.equal(step(unet, prompt()), step(plain, prompt()))


def test_the_scale_of_adapters_in_a_call_and_a_new_prompt(unet: Any, peft: Any) -> None:
    """The model sets it for the duration of the call; a record of such calls is none."""
    add_lora(unet, peft)
    plain = copy.deepcopy(unet)
    imagen_fast.accelerate(unet)
    for number in range(8):
        given = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number)), 10, prompt(number // 4))
        ours, expected = (m(*given, cross_attention_kwargs={"scale": 0.3}).sample for m in (unet, plain))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


# ---- Attributes


def _name(module: nn.Module) -> str:
    return getattr(type(module), "original", type(module)).__name__


def _halve(model: Any, cls: str, names: tuple[str, ...]) -> int:
    """Halves attributes of all modules of a class, and doubles those that start with "dim"; gives how many."""
    changed = [module for module in model.modules() if _name(module) == cls]
    for module in changed:
        for name in names:
            value = getattr(module, name)
            setattr(module, name, value * 2 if name.startswith("dim") else value / 2 if value < 1 else value // 2)
    return len(changed)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        ("Attention", ("heads",)),
        ("AttentionPooling", ("num_heads", "dim_per_head")),
        ("GroupNorm", ("num_groups",)),
        ("GroupNorm", ("eps",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_attributes_are_seen(unet: Any, cls: str, names: tuple[str, ...]) -> None:
    plain = copy.deepcopy(unet)
    imagen_fast.accelerate(unet, graphs="off")
    before = step(unet, prompt())
    changed = [_halve(model, cls, names) for model in (unet, plain)][1]
    after = step(unet, prompt())
    torch.testing.assert_close(after, step(plain, prompt()), rtol=1e-4, atol=1e-5)
    assert torch.equal(after, before) != (changed > 0)


def test_a_bias_that_is_a_plain_tensor_is_read_at_every_call() -> None:
    layer, text = nn.Linear(4, 4), torch.randn(2, 3, 4)
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.bias = bias
    with torch.no_grad():
        for _ in range(2):
            found = _text.of_text(layer, "text", (layer,), (text,), lambda: layer(text))
            assert torch.equal(found, layer(text))
            bias.add_(1)
