"""The loop: its noise, its progress on a device that lags behind, models in noise levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imagen_fast.diffusion import Noise, StepTable, linear_betas, sample_loop
from imagen_fast.diffusion.noise import AUGMENTATION
from imagen_fast.diffusion.sampling import _Progress

ALPHAS = linear_betas(1000)
SHAPE = (3, 8, 8)

SOLVERS = {
    "ddpm": StepTable.ddpm(ALPHAS, steps=100, prediction="x0"),
    "ddim": StepTable.ddim(ALPHAS, steps=100, prediction="x0"),
    "ddim-eta": StepTable.ddim(ALPHAS, steps=100, prediction="x0", eta=1.0),
    "dpm": StepTable.dpm_solver_pp(ALPHAS, steps=100, prediction="x0"),
    "dpm-1": StepTable.dpm_solver_pp(ALPHAS, steps=100, prediction="x0", order=1),
    "dpm-sde": StepTable.dpm_solver_pp(ALPHAS, steps=100, prediction="x0", sde=True),
    "euler": StepTable.euler(ALPHAS, steps=100, prediction="x0", karras=True),
    "euler-churn": StepTable.euler(ALPHAS, steps=100, prediction="x0", churn=20.0, karras=True),
    "heun": StepTable.heun(ALPHAS, steps=50, prediction="x0", karras=True),
}
SECOND_ORDER = ("dpm", "dpm-sde", "heun")
MEAN, DEVIATION = 0.3, 0.5


class Gaussian:
    """The exact model of normal data: E[x0 | x_t], for samples √ᾱ x0 + √(1 − ᾱ) ε at the timestep that it is told."""

    def __call__(self, x, timesteps, guided):
        ratios = ((1 - ALPHAS) / ALPHAS).sqrt().numpy()  # interpolated as the solvers in noise levels do
        sigma = np.interp(timesteps[0].item(), np.arange(len(ratios)), ratios)
        noisy = x * (1 + sigma**2) ** 0.5  # x0 + σ ε
        weight = DEVIATION**2 / (DEVIATION**2 + sigma**2)
        return (MEAN + weight * (noisy - MEAN)).to(x.dtype), None


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_samples_the_distribution_that_the_model_knows(name):
    pictures = sample_loop(Gaussian(), SOLVERS[name], Noise(range(40)), SHAPE)
    assert pictures.mean() == pytest.approx(MEAN, abs=0.02)
    assert pictures.std() == pytest.approx(DEVIATION, rel=0.03 if name in SECOND_ORDER else 0.1)
    assert pictures.flatten(1).std(1).min() > 0.2  # and no picture is a constant


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_the_same_alone_or_in_a_batch(name):
    table = SOLVERS[name]
    together = sample_loop(Gaussian(), table, Noise([5, -1, 2**63]), SHAPE)
    for b, seed in enumerate([5, -1, 2**63]):
        torch.testing.assert_close(sample_loop(Gaussian(), table, Noise([seed]), SHAPE)[0], together[b])


def test_noise_differs_between_uses_stages_and_seeds():
    noise = Noise([1, 2])
    drawn = [noise(*SHAPE), noise(*SHAPE, use=AUGMENTATION), noise.of_stage(1)(*SHAPE), noise.of_stage(2)(*SHAPE)]
    flat = torch.cat([draw.flatten(1) for draw in drawn])
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.3  # 192 elements: 4 standard deviations
    torch.testing.assert_close(noise(*SHAPE), drawn[0], rtol=0, atol=0)


def test_seeds_count_modulo_two_to_the_64():
    torch.testing.assert_close(Noise([-1])(*SHAPE), Noise([2**64 - 1])(*SHAPE), rtol=0, atol=0)
    assert Noise([]).seeds.shape == (0,)
    assert Noise([])(*SHAPE).shape == (0, *SHAPE)


class LateEvent:
    """Of a device that finishes a step three steps later."""

    recorded = 0
    waited = 0

    def __init__(self, device):
        self.number = None

    def record(self, stream):
        assert stream == "the stream of cuda:1", "without one it is the current device's"
        self.number = LateEvent.recorded
        LateEvent.recorded += 1

    def query(self):
        return LateEvent.recorded - self.number > 3

    def synchronize(self):
        LateEvent.waited += 1


def test_progress_shows_what_the_device_has_finished(monkeypatch):
    monkeypatch.setattr(torch, "Event", LateEvent)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"the stream of {device}")
    done = []
    progress = _Progress(lambda: done.append(len(done)), torch.device("cuda:1"))
    seen = []
    for _ in range(10):
        progress.queued()
        seen.append(len(done))
    assert seen == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert LateEvent.waited == 0
    progress.finish()
    assert len(done) == 10
    assert LateEvent.waited == 3


@pytest.mark.parametrize("seeds", [[1.5], "12", 3, torch.tensor([1.5])], ids=str)
def test_seeds_are_integers(seeds):
    with pytest.raises(TypeError, match="seeds must be integers"):
        Noise(seeds)


def test_noise_is_drawn_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        noise = Noise([1, 2])
    torch.testing.assert_close(noise(*SHAPE), Noise([1, 2])(*SHAPE), rtol=0, atol=0)


def test_on_the_cpu_progress_is_at_once():
    done = []
    sample_loop(Gaussian(), SOLVERS["ddim"], Noise([1]), SHAPE, on_step=lambda: done.append(1))
    assert len(done) == 100
