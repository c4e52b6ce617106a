"""Accelerated models that are copied, compiled, exported, and run in the modes of PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast import testing
from imagen_fast.integrations import reference
from imagen_fast.models import (
    UNet,
)

from .small_models import BLOCK, UNET, accelerated, inputs, output, randomized, unet

# ---- Copies


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_accelerated_and_restored_on_their_own(copied):
    model = unet()
    eager = output(model)
    imagen_fast.accelerate(model)
    fast = output(model)
    twin = copied(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(output(twin), fast)
    imagen_fast.restore(twin)
    assert torch.equal(output(twin), eager)
    assert isinstance(model.get_submodule(BLOCK), reference.FusedResnetBlock)


# ---- Modes of PyTorch


def test_dropout_and_modes_stay():
    plain = randomized(UNet(dataclasses.replace(UNET, dropout=0.5)))
    model = accelerated(copy.deepcopy(plain))
    for training in (True, False):
        results = []
        for m in (plain, model):
            m.train(training)
            torch.manual_seed(3)
            results.append(output(m))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_inference_mode():
    model = accelerated(unet())
    with torch.inference_mode():
        inferred = model(**inputs(model))
    assert torch.equal(inferred, output(model))


def test_autocast():
    model = unet()
    truth = copy.deepcopy(model).double()(**inputs(model, torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = model(**inputs(model))
        ours = accelerated(model)(**inputs(model))
    testing.assert_model_as_accurate(ours, eager, truth)


def _graph(model: nn.Module) -> tuple[Callable[..., Tensor], list[torch.fx.GraphModule]]:
    """The model compiled without graph breaks, and what is compiled."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True), graphs


def _ops_in(graph: torch.fx.GraphModule) -> int:
    return sum("group_norm_act" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.skipif(imagen_fast._native.unavailable_reason() is not None, reason="needs the cpu backend")
def test_compile_without_graph_breaks_and_accelerate_afterwards():
    model = unet()
    compiled, graphs = _graph(model)
    with torch.no_grad():
        eager = compiled(**inputs(model))
        report = imagen_fast.accelerate(model, inference=False)  # a compiler packs for itself
        ours = compiled(**inputs(model))
    assert [_ops_in(graph) for graph in graphs] == [0, sum(isinstance(m, nn.GroupNorm) for m in model.modules())]
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, output(model))
    assert not report.left


@pytest.mark.skipif(imagen_fast._native.unavailable_reason() is not None, reason="needs the cpu backend")
def test_export_keeps_the_op():
    model = accelerated(unet().eval())
    exported = torch.export.export(model, (), inputs(model))
    assert _ops_in(exported.graph_module) == sum(isinstance(module, nn.GroupNorm) for module in model.modules())
