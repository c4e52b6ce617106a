"""Noise schedules and the timesteps that samplers visit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from imagen_fast.diffusion import (
    IF_TIMESTEPS,
    cosine,
    cosine_start,
    karras_sigmas,
    linear_betas,
    spaced_timesteps,
    squaredcos_cap_v2,
)


@pytest.mark.parametrize("schedule", [squaredcos_cap_v2, linear_betas])
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_alphas_cumprod_fall_from_near_one(schedule, n):
    alphas = schedule(n)
    assert alphas.shape == (n,)
    assert alphas.dtype == torch.float64
    assert ((alphas > 0) & (alphas < 1)).all()
    assert (alphas.diff() < 0).all()


def test_linear_betas_are_ddpms():
    alphas = linear_betas(1000)
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + t * (2e-2 - 1e-4) / 999)
        assert alphas[t].item() == pytest.approx(product, rel=1e-12)


def test_cosine_schedule_follows_its_formula_until_the_cap():
    n = 1000
    alphas = squaredcos_cap_v2(n)

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 500, 990):
        assert alphas[t].item() == pytest.approx(f((t + 1) / n) / f(0), rel=1e-9)
    assert (1 - alphas[999] / alphas[998]).item() == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("leading", 4, [750, 500, 250, 0]),
        ("trailing", 4, [999, 749, 499, 249]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("leading", 1, [0]),
        ("trailing", 1, [999]),
        ("trailing", 1000, list(range(999, -1, -1))),
    ],
)
def test_spacings(spacing, steps, expected):
    assert spaced_timesteps(1000, steps, spacing) == expected


def test_an_offset_shifts_leading_timesteps():
    assert spaced_timesteps(1000, 4, "leading", offset=1) == [751, 501, 251, 1]


def test_timesteps_can_be_given():
    assert spaced_timesteps(1000, [999, 3, 0]) == [999, 3, 0]


@pytest.mark.parametrize("name", IF_TIMESTEPS)
def test_if_timesteps_have_the_length_in_their_name(name):
    timesteps = spaced_timesteps(1000, name)
    assert len(timesteps) == int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
    assert (timesteps[0], timesteps[-1]) == (999, 0)


def test_if_timesteps_are_diffusers():
    theirs = pytest.importorskip("diffusers.pipelines.deepfloyd_if.timesteps")
    for name, timesteps in IF_TIMESTEPS.items():
        assert list(timesteps) == getattr(theirs, f"{name}_timesteps")


@pytest.mark.parametrize("steps", [np.int64(4), np.int32(4), np.array([750, 500, 250, 0]), torch.tensor([9, 4])])
def test_steps_can_be_of_numpy_and_pytorch(steps):
    assert spaced_timesteps(1000, steps) in ([750, 500, 250, 0], [9, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, "fast28"), "fast27"),
        ((100, "fast27"), "the schedule has 100"),
        ((1000, 0), "steps"),
        ((1000, 1001), "steps"),
        ((1000, 10, "sideways"), "spacing"),
        ((1000, 1000, "leading", 1), "offset"),
        ((1000, 10, "leading", -1), "offset"),
        ((1000, [0, 5]), "steps must fall"),
        ((1000, [1000, 5]), "steps must fall"),
        ((1000, []), "steps must fall"),
        ((0, 1), "training timesteps"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(*arguments)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_karras_sigmas_begin_and_end_exactly(n):
    sigmas = karras_sigmas(n, 0.010001, 157.4).tolist()
    assert sigmas[0] == 157.4
    assert n == 1 or sigmas[-1] == 0.010001
    assert sigmas == sorted(sigmas, reverse=True)


@pytest.mark.parametrize("s", [-0.1, -1, math.nan])
def test_cosine_rejects_an_offset(s):
    for call in (lambda: cosine(10, s), lambda: cosine_start(s)):
        with pytest.raises(ValueError, match="s must be finite and not negative"):
            call()


@pytest.mark.parametrize("max_beta", [-1.0, 0.0, 2.0, math.nan])
def test_squaredcos_rejects_a_cap(max_beta):
    with pytest.raises(ValueError, match="max_beta must be above 0 and at most 1"):
        squaredcos_cap_v2(10, max_beta)


def test_linear_betas_reject_bad_ends():
    with pytest.raises(ValueError, match="beta"):
        linear_betas(10, 0.5, 0.1)
