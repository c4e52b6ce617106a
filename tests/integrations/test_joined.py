"""Queries, keys and values in one product on a device: the same results, never from weights that are no more.

The tests take the CPU for such a device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import imagen_fast
from imagen_fast import ops
from imagen_fast.integrations import _kept, _packed, _time
from imagen_fast.integrations._graphed import GraphedForward
from imagen_fast.integrations._packed import Joined, PackedLinear
from imagen_fast.models import EfficientUNet, EfficientUNetConfig, T5Config, T5Encoder, UNet, UNetConfig

from .recorder import recording_here
from .unet_configs import IF, SD

STABLE = {**SD, "in_channels": 4, "out_channels": 4}
T5_SIZES = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_packed, _time):
        monkeypatch.setattr(module, "is_packed_by_onednn", lambda device: False)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch, on_a_device: None) -> list[int]:
    """Gets the number of layers of every product that was of several."""
    sizes: list[int] = []
    compute = _packed._joined_product

    def counted(owner: Any, layers: Any, x: Tensor) -> Tensor | None:
        result = compute(owner, layers, x)
        sizes.extend([len(layers)] if result is not None else [])
        return result

    monkeypatch.setattr(_packed, "_joined_product", counted)
    return sizes


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_unet() -> tuple[nn.Module, dict[str, Any]]:
    model = UNet(UNetConfig(16, (1, 2), 1, (1,), 8, text_dim=12, groups=4))
    return model, {"x": normal(2, 3, 8, 8, seed=1), "timestep": torch.tensor([3, 9]), "text": normal(2, 5, 12, seed=2)}


def reference_efficient_unet() -> tuple[nn.Module, dict[str, Any]]:
    model = EfficientUNet(EfficientUNetConfig(16, (1, 2), (1, 1), (1,), (1,), heads=4, text_dim=12, groups=4))
    inputs = {"x": normal(2, 6, 8, 8, seed=1), "timestep": torch.tensor([3, 9]), "text": normal(2, 5, 12, seed=2)}
    return model, {**inputs, "augmentation": torch.tensor([1, 2])}


def reference_t5() -> tuple[nn.Module, dict[str, Any]]:
    return T5Encoder(T5Config(**T5_SIZES)), {"input_ids": torch.arange(1, 19).view(2, 9)}


def transformers_t5() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(config), {"input_ids": torch.arange(1, 19).view(2, 9), "return_dict": False}


def diffusers_unet(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")
    text = normal(2, 5, 24, seed=2)
    sample = normal(2, config["in_channels"], 8, 8, seed=1)
    inputs = {"sample": sample, "timestep": 20, "encoder_hidden_states": text, "return_dict": False}
    return diffusers.UNet2DConditionModel(**config), inputs


# Each with the number of blocks whose queries, keys and values are one product, and of what stands beside the queries
MODELS: dict[str, tuple[Callable[[], Any], int, tuple[str, ...]]] = {
    "reference": (reference_unet, 4, ("to_q", "to_kv")),
    "efficient": (reference_efficient_unet, 2, ("to_q", "to_kv")),
    "t5": (reference_t5, 2, ("q", "k", "v")),
    "transformers": (transformers_t5, 2, ("q", "k", "v")),
    "if": (lambda: diffusers_unet(IF), 4, ("to_q", "to_k", "to_v")),
    "stable": (lambda: diffusers_unet(STABLE), 4, ("to_q", "to_k", "to_v")),
}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name][0]()
    for parameter in model.parameters():  # no branch that begins at zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval(), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def copies(model: nn.Module) -> list[Joined]:
    """All copies that blocks keep of their layers' weights, but for those of the time."""
    found = (value for module in model.modules() if isinstance(module, _packed.Fused) for value in values(module))
    return [value for value in found if isinstance(value, Joined)]


def weights_of(copy: Joined) -> int:
    """Bytes."""
    return copy.weight.nbytes + (0 if copy.bias is None else copy.bias.nbytes)


def values(module: nn.Module) -> list[Any]:
    return [] if isinstance(module, PackedLinear) else list(_kept.kept(module).values())


# ---- Results and memory


@pytest.mark.parametrize("name", MODELS)
def test_queries_keys_and_values_are_one_product(
    name: str, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(name)
    _, blocks, layers = MODELS[name]
    plain = copy.deepcopy(model)
    imagen_fast.accelerate(plain, inference=False)
    report = imagen_fast.accelerate(model)
    torch.testing.assert_close(run(model, inputs), run(plain, inputs), rtol=1e-4, atol=1e-5)
    assert products == blocks * [len(layers)]
    assert torch.equal(run(model, inputs), run(model, inputs))
    taken = {entry.name.rpartition(".")[2] for entry in report.copies}
    assert taken == set(layers)
    assert report.bytes_of("packed") == sum(weights_of(copy) for copy in copies(model)) > 0


@pytest.mark.parametrize("name", ["reference", "if", "t5"])
def test_the_op_reads_the_result_in_place(name: str, products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(name)
    imagen_fast.accelerate(model)
    shared: list[bool] = []
    attend = ops.attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        storages = {x.untyped_storage().data_ptr() for x in (q, k, v)}
        shared.append(len(storages) == 1 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1)
        return attend(q, k, v, **arguments)

    for module in ("imagen_fast.ops", "imagen_fast.integrations._fused.ops"):
        monkeypatch.setattr(f"{module}.attention", watched)
    run(model, inputs)
    assert shared == MODELS[name][1] * [True]


def test_what_a_prompt_becomes_is_kept_where_nothing_is_packed(
    on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build("if")
    imagen_fast.accelerate(model)
    project, calls = nn.Linear.forward, []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or project(self, x))
    for _ in range(3):
        run(model, inputs)
    assert calls.count(model.encoder_hid_proj) == 1


@pytest.mark.parametrize("name", ["reference", "stable"])
def test_in_another_dtype_the_copies_are_of_converted_weights(name: str, products: list[int]) -> None:
    model, inputs = build(name)
    plain = copy.deepcopy(model)
    bytes_in_fp32 = imagen_fast.accelerate(model).bytes_of("packed")
    report = imagen_fast.accelerate(model, dtype=torch.bfloat16)
    imagen_fast.accelerate(plain, dtype=torch.bfloat16, inference=False)
    torch.testing.assert_close(run(model, inputs), run(plain, inputs), rtol=5e-2, atol=5e-2)
    assert products
    assert 2 * report.bytes_of("packed") == bytes_in_fp32
    assert {copy.weight.dtype for copy in copies(model)} == {torch.bfloat16}


def test_the_memory_is_bounded_by_whole_blocks(products: list[int]) -> None:
    model, inputs = build("if")
    sizes = [entry.bytes for entry in imagen_fast.accelerate(model).copies]
    block = sum(sizes[:3])
    for limit, blocks in ((0, 0), (block - 1, 0), (block, 1), (3 * block - 1, 2), (None, 4)):
        report = imagen_fast.accelerate(model, pack_limit=limit)
        run(model, inputs)
        assert len(products) == blocks
        assert len([left for left in report.left if left.reason == "pack_limit is reached"]) == 4 - blocks
        assert report.bytes_of("packed") <= (sum(sizes) if limit is None else limit)
        products.clear()


def test_a_model_that_was_packed_on_the_cpu_joins_no_more_than_that(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model, inputs = build("t5")
    imagen_fast.accelerate(model)  # every layer on its own
    expected = run(model, inputs)
    products = request.getfixturevalue("products")
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert products == [3, 3]  # and no gated feed-forward


def test_restored_models_keep_nothing(products: list[int]) -> None:
    model, inputs = build("reference")
    before = run(model, inputs)
    imagen_fast.accelerate(model)
    run(model, inputs)
    assert copies(model)
    blocks = [module for module in model.modules() if isinstance(module, _packed.Fused)]
    imagen_fast.restore(model)
    assert not any(isinstance(value, Joined) for block in blocks for value in _kept.kept(block).values())
    assert torch.equal(run(model, inputs), before)


# ---- Weights that change, and layers that are called


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


def _parametrized(attention: Any) -> None:
    parametrize.register_parametrization(attention.to_q, "weight", Tripled())


def _adapter(attention: Any) -> None:
    lora = pytest.importorskip("peft", reason="the peft that fits needs Python 3.11")
    torch.manual_seed(0)
    config = lora.LoraConfig(r=2, lora_alpha=64, init_lora_weights=False)
    attention.to_q = lora.tuners.lora.Linear(
        attention.to_q, "a", config=config, r=2, lora_alpha=64, init_lora_weights=False
    )


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {  # and whether the product of several stays
    "in place": (lambda a: a.to_kv.weight[3, 1].add_(5), True),
    "new parameter": (lambda a: setattr(a.to_q, "weight", nn.Parameter(a.to_q.weight * 3)), True),
    "new data": (lambda a: setattr(a.to_q.weight, "data", a.to_q.weight.data * 3), True),
    "state": (lambda a: a.load_state_dict({k: 3 * v for k, v in a.state_dict().items()}), True),
    "assigned state": (lambda a: a.load_state_dict({k: 3 * v for k, v in a.state_dict().items()}, assign=True), True),
    "bias": (lambda a: setattr(a.to_q, "bias", nn.Parameter(torch.ones(32))), True),
    "hook": (lambda a: a.to_q.register_forward_hook(lambda module, args, output: output + 1), False),
    "pre-hook": (lambda a: a.to_kv.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), False),
    "parametrization": (_parametrized, False),
    "other layer": (lambda a: setattr(a, "to_q", nn.Linear(32, 32)), False),
    "adapter": (_adapter, False),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_seen(change: str, products: list[int]) -> None:
    model, _ = build("reference")
    nn.init.normal_(model.middle1.attention.to_q.weight)
    plain, x = copy.deepcopy(model), normal(2, 32, 4, 4, seed=1)
    imagen_fast.accelerate(model)
    imagen_fast.accelerate(plain, inference=False)
    ours, theirs = (each.middle1.attention for each in (model, plain))
    before = ours(x, None)
    apply, stays = CHANGES[change]
    products.clear()
    for attention in (ours, theirs):
        torch.manual_seed(1)
        apply(attention)
    after = ours(x, None)
    assert products == ([2] if stays else [])
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3), "the change does nothing: the test is void"
    torch.testing.assert_close(after, theirs(x, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["gradients", "autocast", "eager", "inference off", "tensors of inference mode"])
def test_when_layers_are_called(way: str, products: list[int]) -> None:
    model, inputs = build("reference")
    if way == "tensors of inference mode":
        with torch.inference_mode():
            for attention in (m for m in model.modules() if hasattr(m, "to_q")):
                attention.to_q.weight = nn.Parameter(attention.to_q.weight.clone(), requires_grad=False)
    imagen_fast.accelerate(model, inference=way != "inference off")
    if way == "gradients":
        model(**inputs).sum().backward()
        assert model.middle1.attention.to_q.weight.grad is not None
    elif way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model, inputs)
    elif way == "eager":
        with imagen_fast.use_backend("eager"):
            run(model, inputs)
    else:
        run(model, inputs)
    assert products == []
    assert copies(model) == []


def test_gradients_end_a_copy(products: list[int]) -> None:
    """A fused optimizer may follow, whose writes are not counted."""
    model, inputs = build("reference")
    imagen_fast.accelerate(model)
    run(model, inputs)
    assert copies(model)
    model(**inputs)
    assert copies(model) == []


def test_a_graph_reads_the_copy_as_long_as_it_is_replayed(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    recording_here(monkeypatch)
    model, inputs = build("reference")
    plain = copy.deepcopy(model)
    imagen_fast.accelerate(model)
    imagen_fast.accelerate(plain, inference=False)
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    assert forward.pool is not None
    for _ in range(4):
        torch.testing.assert_close(run(model, inputs), run(plain, inputs), rtol=1e-4, atol=1e-5)
    assert (forward.pool.recorded, forward.pool.replayed) == (1, 3)
    (graph,) = forward.pool._records.values()
    assert sum(isinstance(held, Joined) for held in graph.once._held) >= 4
    for each in (model, plain):
        with torch.no_grad():
            each.middle1.attention.to_q.weight.mul_(3)
    for _ in range(3):
        torch.testing.assert_close(run(model, inputs), run(plain, inputs), rtol=1e-4, atol=1e-5)
    assert forward.pool.recorded == 2
