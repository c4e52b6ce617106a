"""Queries, keys and values as one product on a GPU: the same results, from a copy that is counted and bounded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imagen_fast
from imagen_fast.integrations._packed import PackedLinear

from ..integrations.test_joined import MODELS, build, copies, run, weights_of


def on_the_gpu(name: str) -> tuple[nn.Module, dict[str, object]]:
    model, inputs = build(name)
    model = model.to("cuda", torch.bfloat16)
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[key] = value.to("cuda", torch.bfloat16 if value.is_floating_point() else None)
    return model, inputs


@pytest.mark.parametrize("graphs", ["off", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_one_product_is_the_same_and_its_memory_is_counted(name: str, graphs: str) -> None:
    model, inputs = on_the_gpu(name)
    plain = copy.deepcopy(model)
    imagen_fast.accelerate(plain, inference=False)
    report = imagen_fast.accelerate(model, graphs=graphs)
    wanted = run(plain, inputs)
    for _ in range(3):
        found = run(model, inputs)
        torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2 * wanted.abs().max().item())
    _, blocks, layers = MODELS[name]
    assert len(copies(model)) == blocks
    assert report.bytes_of("packed") == sum(map(weights_of, copies(model)))
    assert {entry.name.rpartition(".")[2] for entry in report.copies} == set(layers)


def test_the_memory_is_bounded() -> None:
    model, inputs = on_the_gpu("reference")
    imagen_fast.accelerate(model)
    run(model, inputs)
    report = imagen_fast.accelerate(model, pack_limit=0, graphs="off")
    assert report.bytes_of("packed") == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    run(model, inputs)


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_a_changed_weight_is_seen(graphs: str) -> None:
    model, inputs = on_the_gpu("reference")
    plain = copy.deepcopy(model)
    imagen_fast.accelerate(model, graphs=graphs)
    imagen_fast.accelerate(plain, inference=False)
    for factor in (1.0, 5.0):
        for each in (model, plain):
            with torch.no_grad():
                for module in each.modules():
                    if hasattr(module, "to_kv"):
                        module.to_kv.weight.mul_(factor)
        for _ in range(3):
            wanted = run(plain, inputs)
            torch.testing.assert_close(run(model, inputs), wanted, rtol=5e-2, atol=5e-2 * wanted.abs().max().item())
