"""Sampling loops that are recorded as CUDA graphs of whole steps draw what they draw without."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import imagen_fast
from imagen_fast.integrations._graphed import GraphedForward

from ..models.conftest import tiny_imagen

PROMPTS = (["a cat", "一只猫"], ["a dog", ""], ["a rocket", "一个红苹果"])


def build(**options: Any) -> Any:
    model = tiny_imagen(super_resolution_text=True).to("cuda")
    imagen_fast.accelerate(model, **options)
    return model


def draw(model: Any, prompts: list[str], seed: int, **options: Any) -> np.ndarray:
    pictures = model.sample(prompts, seed=seed, **{"steps": [12, 6], "progress": False, **options})
    return np.stack([*map(np.asarray, pictures)]).astype(int)


def assert_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    """But for the rounding of another algorithm here and there."""
    assert found.std() > 5
    assert abs(found - wanted).mean() < 1


def pools(model: Any) -> list[Any]:
    forwards = [vars(unet)["forward"] for unet in model.unets.values()]
    assert all(isinstance(forward, GraphedForward) for forward in forwards)
    return [forward.pool for forward in forwards]


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 6], ids=["one-step", "six-steps"])
def test_replays_are_the_loop(solver: str, steps: int) -> None:
    ours, plain = build(graph_steps=steps), build(graphs="off")
    for round_, prompts in enumerate((*PROMPTS, PROMPTS[0])):
        found, wanted = (draw(model, prompts, 7 * (round_ % 3), solver=solver) for model in (ours, plain))
        assert_alike(found, wanted)
        if round_ == 0:
            first = found
    assert_alike(found, first)
    assert abs(first - draw(ours, PROMPTS[1], 0, solver=solver)).mean() > 3
    assert [pool.recorded for pool in pools(ours)] == [1, 1]
    assert [pool.reasons for pool in pools(ours)] == [[], []]


def test_in_bf16_and_channels_last() -> None:
    options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    ours, plain = build(**options), build(**options, graphs="off")
    for seed, prompts in enumerate(PROMPTS):
        assert abs(draw(ours, prompts, seed) - draw(plain, prompts, seed)).mean() < 4
    assert [pool.recorded for pool in pools(ours)] == [1, 1]


def test_a_progress_bar_counts_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    ours = build(graph_steps=6)
    for _ in range(3):
        draw(ours, PROMPTS[0], 0, progress=True)
        assert "18/18" in capsys.readouterr().err


def test_changed_weights_are_seen() -> None:
    ours, plain = build(), build(graphs="off")
    before = draw(ours, PROMPTS[0], 0)
    for model in (ours, plain):
        with torch.no_grad():
            model.unets["base"].conv_in.weight.mul_(1.5)
    found = draw(ours, PROMPTS[0], 0)
    assert_alike(found, draw(plain, PROMPTS[0], 0))
    assert abs(found - before).mean() > 1


def test_threads_with_streams_of_their_own_take_turns() -> None:
    ours = build()
    wanted = {seed: draw(ours, PROMPTS[0], seed) for seed in range(4)}
    found: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(start, 4, 2):
                found[seed] = draw(ours, PROMPTS[0], seed)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_alike(found[seed], wanted[seed])


def test_nothing_waits_for_the_device() -> None:
    """After the graphs are recorded the loops themselves read nothing back."""
    from imagen_fast.diffusion import Noise, sample_loop
    from imagen_fast.models.guided import GuidedUNet

    ours = build()
    plan = ours.config.plan(steps=[12, 6])[0]
    noise, unet = Noise([1, 2], "cuda"), ours.unets["base"]
    text, mask = torch.randn(2, 32, 16, device="cuda"), torch.ones(2, 32, dtype=torch.bool, device="cuda")
    first = torch.randn(2, 3, 8, 8, device="cuda")

    class Drawn:
        seeds = noise.seeds

        def __call__(self, *shape: int) -> torch.Tensor:
            return first

    def run() -> torch.Tensor:
        model = GuidedUNet(unet, text, mask, plan.guidance)
        return sample_loop(model, plan.table, Drawn(), (3, 8, 8), guidance=plan.guidance, threshold=plan.threshold)

    with torch.inference_mode():
        expected = [run() for _ in range(2)][-1]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)
