"""Sampling loops of the reference cascade as graphs of whole steps: the same pictures, and nothing stale."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.diffusion import DynamicThreshold, Guidance, Noise, StepTable, linear_betas, sample_loop
from imagen_fast.integrations._graphed import GraphedForward, _divisor
from imagen_fast.integrations._graphs import GraphPool
from imagen_fast.models import EfficientUNet, EfficientUNetConfig, Imagen, UNet, UNetConfig
from imagen_fast.models.guided import GuidedUNet

from ..models.conftest import tiny_imagen
from .recorder import OperatorRecorder, recording_here

ALPHAS = linear_betas(1000)
TEXT = 12
BASE = UNetConfig(16, (1, 2), 1, (1,), 8, text_dim=TEXT, groups=4)
SUPER = EfficientUNetConfig(16, (1, 2), (1, 1), (1,), (1,), heads=4, text_dim=TEXT, groups=4)
SOLVERS = {
    "ddpm": lambda steps: StepTable.ddpm(ALPHAS, steps=steps, prediction="v"),
    "ddim": lambda steps: StepTable.ddim(ALPHAS, steps=steps, prediction="v"),
    "dpm": lambda steps: StepTable.dpm_solver_pp(ALPHAS, steps=steps, prediction="v"),
    "euler-churn": lambda steps: StepTable.euler(ALPHAS, steps=steps, prediction="v", churn=5.0),
    "heun": lambda steps: StepTable.heun(ALPHAS, steps=steps, prediction="v"),
}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> OperatorRecorder:
    return recording_here(monkeypatch)


def build(kind: str) -> UNet | EfficientUNet:
    torch.manual_seed(0)
    model = (UNet(BASE) if kind == "base" else EfficientUNet(SUPER)).eval()
    for parameter in model.parameters():  # no branch that begins at zero
        nn.init.normal_(parameter, std=0.1)
    return model


def pair(kind: str, **options: Any) -> tuple[Any, Any, GraphPool]:
    """The same U-Net with graphs and without, and the graphs."""
    ours, plain = build(kind), build(kind)
    plain_options = {name: value for name, value in options.items() if not name.startswith("graph_")}
    imagen_fast.accelerate(ours, **options)
    imagen_fast.accelerate(plain, **plain_options, graphs="off")
    return ours, plain, pool_of(ours)


def pool_of(model: Any) -> GraphPool:
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    assert forward.pool is not None
    return forward.pool


def draw(
    unet: Any,
    seeds: list[int],
    *,
    solver: str = "ddpm",
    steps: int = 4,
    guidance: float | Guidance = 2.0,
    text: int = 0,
    tokens: int = 32,
    on_step: Callable[[], object] | None = None,
    **options: Any,
) -> Tensor:
    """Pictures of one loop; the text and the picture of low resolution are random, by the number `text`."""
    generator, batch = torch.Generator().manual_seed(text), len(seeds)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(tokens).expand(batch, -1) < torch.tensor([[tokens], *[[2]] * (batch - 1)])
    given: dict[str, Any] = {}
    if isinstance(unet, EfficientUNet):
        given = {"low": random(batch, 3, 8, 8), "augmentation": torch.full((batch,), 100 + text)}
    with torch.inference_mode():
        scale = guidance.scale if isinstance(guidance, Guidance) else guidance
        model = GuidedUNet(unet, random(batch, tokens, TEXT), mask, scale, **given)
        table, options = SOLVERS[solver](steps), {"threshold": DynamicThreshold(0.9), **options}
        return sample_loop(model, table, Noise(seeds), (3, 8, 8), guidance=guidance, on_step=on_step, **options)


def same(ours: Any, plain: Any, seeds: list[int], **arguments: Any) -> Tensor:
    """What both draw, which must be the same bits."""
    found, wanted = draw(ours, seeds, **arguments), draw(plain, seeds, **arguments)
    assert found.isfinite().all()
    assert torch.equal(found, wanted)
    return found


# ---- The same pictures


@pytest.mark.parametrize(("kind", "solver"), [*(("base", solver) for solver in SOLVERS), ("super", "ddpm")])
def test_every_loop_after_its_first_step_is_replayed(recorder: OperatorRecorder, kind: str, solver: str) -> None:
    ours, plain, pool = pair(kind)
    evaluations = len(SOLVERS[solver](4))
    drawn = [same(ours, plain, seeds, text=text, solver=solver) for seeds, text in (([1], 0), ([2], 0), ([1], 1))]
    assert (pool.recorded, pool.replayed) == (1, 3 * evaluations - 1)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], draw(ours, [1], solver=solver))


@pytest.mark.parametrize("kind", ["base", "super"])
def test_in_another_dtype_and_memory_format(recorder: OperatorRecorder, kind: str) -> None:
    ours, plain, pool = pair(kind, dtype=torch.bfloat16, memory_format=torch.channels_last)
    for seeds in ([1, 2], [3, 4]):
        same(ours, plain, seeds)
    assert (pool.recorded, pool.replayed) == (1, 7)


def test_without_inference_mode(recorder: OperatorRecorder) -> None:
    """The text is a tensor of which writes are counted then, and what is made of it stands beside the graph."""
    ours, plain, pool = pair("base", dtype=torch.bfloat16)
    noise, mask = Noise([1]), torch.ones(1, 5, dtype=torch.bool)
    texts = [torch.randn(1, 5, TEXT, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.no_grad():
        for text in (*texts, texts[0], texts[0].mul_(2)):
            found, wanted = (
                sample_loop(GuidedUNet(unet, text, mask, 2.0), SOLVERS["ddim"](4), noise, (3, 8, 8), guidance=2.0)
                for unet in (ours, plain)
            )
            assert torch.equal(found, wanted)
    assert pool.recorded == 1


DIFFERENT: list[dict[str, Any]] = [
    {"seeds": [1, 2]},
    {"tokens": 64},
    {"steps": 3},
    {"solver": "ddim"},
    {"guidance": 1.0},
    {"guidance": Guidance(2.0, rescale=0.5)},
    {"threshold": "static"},
]


@pytest.mark.parametrize("other", DIFFERENT, ids=str)
def test_a_kind_of_loop_is_all_that_its_steps_depend_on(recorder: OperatorRecorder, other: dict[str, Any]) -> None:
    ours, plain, pool = pair("base")
    seeds = other.pop("seeds", [1])
    first = same(ours, plain, [1])
    second = same(ours, plain, seeds, **other)
    assert pool.recorded == 2
    assert first.shape != second.shape or not torch.equal(first, second)
    same(ours, plain, seeds, **other)
    assert pool.recorded == 2


def test_guidance_in_an_interval_has_a_graph_for_each_kind_of_step(recorder: OperatorRecorder) -> None:
    ours, plain, pool = pair("base")
    for seed in (1, 2):
        same(ours, plain, [seed], steps=9, guidance_interval=(0.5, 3.0))
    assert pool.recorded == 2
    assert pool.replayed == 2 * 9 - 2


def test_a_cascade_draws_the_same_pictures(recorder: OperatorRecorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.refused = set()  # whether a sentence is empty is read on the CPU
    ours, plain = (tiny_imagen(super_resolution_text=True) for _ in range(2))
    imagen_fast.accelerate(ours)
    imagen_fast.accelerate(plain, graphs="off")
    for prompts, seed in ((["a cat", "一只猫"], 3), (["a dog", ""], 4), (["a cat", "一只猫"], 3)):
        # Once with a bar, which counts every step, and once without
        for progress in (True, False):
            options = {"seed": seed, "steps": [6, 4], "progress": progress}
            found, wanted = (np.stack([*map(np.asarray, model.sample(prompts, **options))]) for model in (ours, plain))
            assert abs(found.astype(int) - wanted).max() <= 1  # texts are padded for graphs, which is rounding
        assert capsys.readouterr().err.count("10/10") >= 2
    pools = [pool_of(unet) for unet in ours.unets.values()]
    assert [pool.recorded for pool in pools] == [1, 1]
    assert [pool.replayed for pool in pools] == [6 * 6 - 1, 6 * 4 - 1]
    assert [pool.reasons for pool in pools] == [[], []]


def test_texts_of_about_a_length_share_a_graph(recorder: OperatorRecorder) -> None:
    ours, plain, pool = pair("base")
    for tokens in (5, 32, 17, 1):
        found, wanted = (draw(model, [1, 2], tokens=tokens) for model in (ours, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert pool.recorded == 1


# ---- How much is held


def test_the_pool_is_bounded_and_shared_with_single_calls(recorder: OperatorRecorder) -> None:
    ours, plain, pool = pair("base", graph_limit=2)
    assert pool.limit == 2
    for batch in (1, 2, 3, 1):
        same(ours, plain, list(range(batch)))
        assert len(pool) <= 2
    assert pool.recorded == 4
    with torch.inference_mode():
        for _ in range(2):
            ours(torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert (len(pool), pool.recorded) == (2, 5)


@pytest.mark.parametrize(("most", "steps", "together", "replays"), [(100, 4, 4, 1), (3, 4, 2, 2), (4, 5, 1, 5)])
def test_several_steps_in_one_graph(
    recorder: OperatorRecorder, most: int, steps: int, together: int, replays: int
) -> None:
    ours, plain, pool = pair("base", graph_steps=most)
    for seed in range(3):
        same(ours, plain, [seed], steps=steps, solver="dpm")
    assert pool.recorded == 1
    assert pool.replayed == 3 * replays - 1
    launches = len(recorder.recordings[0].calls)
    ours, plain, _ = pair("base")
    for _ in range(2):
        same(ours, plain, [1], steps=steps, solver="dpm")
    one = len(recorder.recordings[1].calls)
    assert launches == pytest.approx(together * one, rel=0.05)


def test_divisors() -> None:
    assert [_divisor(*pair) for pair in ((25, 1), (25, 10), (25, 25), (25, 100), (7, 6), (12, 7))] == [
        1,
        5,
        25,
        25,
        1,
        6,
    ]


def test_graphs_are_let_go(recorder: OperatorRecorder) -> None:
    ours, plain, pool = pair("base")
    same(ours, plain, [1])
    assert len(pool) == 1
    imagen_fast.invalidate(ours)
    assert len(pool) == 0
    same(ours, plain, [1])
    assert pool.recorded == 2
    imagen_fast.restore(ours)
    assert GuidedUNet(ours, torch.zeros(1, 5, TEXT), torch.ones(1, 5), 1.0).repeat is None


# ---- Nothing stale


def _in_place(model: Any) -> None:
    model.conv_in.weight.mul_(1.5)


def _moved(model: Any) -> None:
    model.conv_in.weight = nn.Parameter(model.conv_in.weight * 1.5)


def _attribute(model: Any) -> None:
    model.norm_out.eps = 0.5


def _child(model: Any) -> None:
    model.conv_out = nn.Conv2d(16, 3, 3, padding=1)
    nn.init.constant_(model.conv_out.weight, 0.1)
    nn.init.zeros_(model.conv_out.bias)


HALF = {"dtype": torch.bfloat16}
CHANGES = [
    pytest.param(change, options, id=f"{change.__name__.strip('_')}{'-bf16' if options else ''}")
    for change, options in (
        (_in_place, {}),
        (_in_place, HALF),
        (_moved, {}),
        (_moved, HALF),
        (_attribute, {}),
        (_child, {}),
    )
]


@pytest.mark.parametrize(("change", "options"), CHANGES)
@pytest.mark.parametrize("when", ["between loops", "between steps"])
@torch.no_grad()
def test_changes_are_seen(
    recorder: OperatorRecorder, change: Callable[[Any], None], options: dict[str, Any], when: str
) -> None:
    ours, plain, pool = pair("base", **options)
    before = same(ours, plain, [1])
    if when == "between loops":
        for model in (ours, plain):
            change(model)
        after = same(ours, plain, [1])
    else:
        found = []
        for model in (ours, plain):
            steps: list[int] = []

            def on_step(model: Any = model, steps: list[int] = steps) -> None:
                steps.append(1)
                if len(steps) == 2:
                    with torch.inference_mode(False), torch.no_grad():
                        change(model)

            found.append(draw(model, [1], on_step=on_step))
            assert len(steps) == 4
        after = found[0]
        assert torch.equal(*found)
    assert not torch.equal(before, after)
    assert pool.recorded == 2


@pytest.mark.parametrize("where", ["inside", "whole"])
def test_hooks_are_called_at_every_step(
    recorder: OperatorRecorder, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ours, plain, pool = pair("base")
    same(ours, plain, [1])
    calls: list[Any] = []
    for model in (ours, plain):
        hooked = model.middle1.resnet if where == "inside" else model
        hooked.register_forward_hook(lambda module, args, output: calls.append(module) or output + 0.1)
    same(ours, plain, [1])
    assert len(calls) == 8
    wanted = "has hooks" if where == "inside" else "steps of a loop are not recorded whole"
    assert [wanted in reason for reason in pool.reasons] == [True]
    assert sum(wanted in record.getMessage() for record in caplog.records) == 1


def test_a_hook_that_comes_between_steps_is_called(recorder: OperatorRecorder) -> None:
    ours, plain, _ = pair("base")
    same(ours, plain, [1])
    found, calls = [], []
    for model in (ours, plain):
        steps: list[int] = []

        def on_step(model: Any = model, steps: list[int] = steps) -> None:
            steps.append(1)
            if len(steps) == 2:
                model.conv_in.register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)

        found.append(draw(model, [1], on_step=on_step))
    assert torch.equal(*found)
    assert len(calls) == 2 * 2


@pytest.mark.parametrize("how", ["gradients", "eager", "autocast", "replaced"])
def test_when_no_graph_is_used(recorder: OperatorRecorder, how: str) -> None:
    ours, plain, pool = pair("base")
    same(ours, plain, [1])
    replayed = pool.replayed
    if how == "eager":
        with imagen_fast.use_backend("eager"):
            same(ours, plain, [1])
    elif how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(ours, plain, [1])
    elif how == "replaced":
        for model in (ours, plain):
            forward = model.forward
            model.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
        same(ours, plain, [1])
        assert pool.replayed > replayed  # single calls still are
        return
    else:
        for parameter in ours.parameters():
            parameter.requires_grad_(True)
        model = GuidedUNet(ours, torch.randn(1, 5, TEXT), torch.ones(1, 5, dtype=torch.bool), 2.0)
        assert sample_loop(model, SOLVERS["ddim"](2), Noise([1]), (3, 8, 8), guidance=2.0).requires_grad
    assert pool.replayed == replayed


def test_a_callback_may_draw_with_the_same_model(recorder: OperatorRecorder) -> None:
    ours, plain, _ = pair("base")
    same(ours, plain, [1])
    pictures: list[Tensor] = []
    found = [draw(model, [1], on_step=lambda model=model: pictures.append(draw(model, [2]))) for model in (ours, plain)]
    assert torch.equal(*found)
    assert len(pictures) == 8
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def test_what_no_graph_can_have_is_computed_step_by_step(recorder: OperatorRecorder) -> None:
    ours, plain, pool = pair("super")
    steps: list[int] = []
    found = []
    for unet in (ours, plain):
        level = nn.Parameter(torch.tensor([100]), requires_grad=False)
        with torch.no_grad():
            text, mask = torch.ones(1, 32, TEXT), torch.ones(1, 32, dtype=torch.bool)
            model = GuidedUNet(unet, text, mask, 1.0, low=torch.ones(1, 3, 8, 8), augmentation=level)
            found.append(sample_loop(model, SOLVERS["ddim"](4), Noise([1]), (3, 8, 8), on_step=lambda: steps.append(1)))
    assert torch.equal(*found)
    assert len(steps) == 8
    assert pool.reasons == ["an argument is a Parameter, not a plain tensor"]


def test_a_failure_of_recording_is_logged_once(recorder: OperatorRecorder, caplog: pytest.LogCaptureFixture) -> None:
    ours, plain, pool = pair("base")
    recorder.fails = RuntimeError("CUDA error: out of luck")
    for seed in (1, 2):
        same(ours, plain, [seed])
    assert [(r.levelname, "out of luck" in r.getMessage()) for r in caplog.records] == [("WARNING", True)]
    assert pool.recorded == 0


def test_copies_have_graphs_of_their_own(recorder: OperatorRecorder) -> None:
    ours, plain, pool = pair("base", graph_limit=3, graph_steps=2)
    same(ours, plain, [1], steps=4)
    twin = copy.deepcopy(ours)
    assert (pool_of(twin).limit, len(pool_of(twin)), len(pool)) == (3, 0, 1)
    for model in (twin, plain):
        with torch.no_grad():
            model.conv_in.weight.mul_(2)
    same(twin, plain, [1], steps=4)
    assert (pool_of(twin).recorded, pool.recorded) == (1, 1)


@pytest.mark.parametrize("option", ["graph_limit", "graph_steps"])
@pytest.mark.parametrize("value", [0, 1.5, True, "all"])
def test_limits_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a whole number from 1"):
        imagen_fast.accelerate(build("base"), **{option: value})


def test_the_cascade_is_an_imagen() -> None:
    assert isinstance(tiny_imagen(), Imagen)
