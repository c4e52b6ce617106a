"""Solvers as tables: against the papers' equations, and against models that know the answer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from imagen_fast.diffusion import (
    DynamicThreshold,
    Guidance,
    StepTable,
    karras_sigmas,
    linear_betas,
    squaredcos_cap_v2,
)
from imagen_fast.diffusion._variance_preserving import multistep
from imagen_fast.reference.sampler_step import sampler_step

ALPHAS = squaredcos_cap_v2(1000)
TWO_ZEROS = torch.tensor([0.9, 0.5, 0.0, 0.0])
TO_PURE_NOISE = torch.tensor([0.9, 0.5, 0.1, 0.0])
PREDICTIONS = ("epsilon", "v", "x0")


NAN = math.nan


def output_of(prediction: str, x0: torch.Tensor, sample: torch.Tensor, timestep: int) -> torch.Tensor:
    """What a model that knows x0 predicts."""
    signal, sigma = ALPHAS[timestep].sqrt(), (1 - ALPHAS[timestep]).sqrt()
    epsilon = (sample - signal * x0) / sigma
    return {"epsilon": epsilon, "x0": x0, "v": signal * epsilon - sigma * x0}[prediction]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "build",
    [
        StepTable.ddpm,
        StepTable.ddim,
        lambda *a, **k: StepTable.ddim(*a, eta=0.7, **k),
        lambda *a, **k: StepTable.ddim(*a, clipped_epsilon=True, **k),
    ],
    ids=["ddpm", "ddim", "ddim-eta", "ddim-clipped"],
)
def test_a_model_that_knows_x0_leads_there(build, prediction, spacing):
    table = build(ALPHAS, steps=10, prediction=prediction, spacing=spacing)
    x0, sample = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for index, timestep in enumerate(table.timesteps):
        output = output_of(prediction, x0, sample, timestep)
        sample, predicted = sampler_step(sample, output, table, index, noise=randn(2, 3, 4, 4, seed=index + 2))
        torch.testing.assert_close(predicted, x0, rtol=1e-6, atol=1e-6)
    # The last step adds no noise; DDIM with eta > 0 has none to add there either, for it ends at ᾱ = 1.
    torch.testing.assert_close(sample, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_over_all_timesteps_is_equation_7(prediction):
    """μ̃ = √ᾱ_{t−1} β_t / (1 − ᾱ_t) x0 + √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) x_t, with variance β̃_t."""
    table = StepTable.ddpm(ALPHAS, steps=1000, prediction=prediction)
    x0, sample, noise = randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=1), randn(1, 3, 2, 2, seed=2)
    for t in (999, 400, 1):
        alpha_bar, previous = ALPHAS[t], ALPHAS[t - 1]
        alpha = alpha_bar / previous
        mean = previous.sqrt() * (1 - alpha) / (1 - alpha_bar) * x0
        mean = mean + alpha.sqrt() * (1 - previous) / (1 - alpha_bar) * sample
        variance = (1 - previous) / (1 - alpha_bar) * (1 - alpha)
        output = output_of(prediction, x0, sample, t)
        following, _ = sampler_step(sample, output, table, 999 - t, noise=noise)
        torch.testing.assert_close(following, mean + variance.sqrt() * noise, rtol=1e-7, atol=1e-7)


def test_variances_of_ddpm():
    rows = {v: StepTable.ddpm(ALPHAS, steps=50, variance=v).row(10) for v in ("fixed_small", "fixed_large")}
    learned = StepTable.ddpm(ALPHAS, steps=50, variance="learned_range").row(10)
    assert rows["fixed_small"]["noise_scale"] < rows["fixed_large"]["noise_scale"]
    assert learned["min_log_variance"] == pytest.approx(
        2 * torch.tensor(rows["fixed_small"]["noise_scale"]).log().item()
    )
    assert learned["max_log_variance"] == pytest.approx(
        2 * torch.tensor(rows["fixed_large"]["noise_scale"]).log().item()
    )


def test_learned_variance_interpolates_log_variances():
    table = StepTable.ddpm(ALPHAS, steps=50, variance="learned_range")
    small = StepTable.ddpm(ALPHAS, steps=50, variance="fixed_small")
    large = StepTable.ddpm(ALPHAS, steps=50, variance="fixed_large")
    sample, output, noise = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1), randn(2, 3, 2, 2, seed=2)
    for level, fixed in ((-1.0, small), (1.0, large)):
        with_variance = torch.cat((output, torch.full_like(output, level)), dim=1)
        ours, _ = sampler_step(sample, with_variance, table, 7, noise=noise)
        expected, _ = sampler_step(sample, output, fixed, 7, noise=noise)
        torch.testing.assert_close(ours, expected)


def test_eta_one_has_ddpms_variance():
    ddim, ddpm = StepTable.ddim(ALPHAS, steps=50, eta=1.0), StepTable.ddpm(ALPHAS, steps=50)
    for index in (0, 20, 48):
        assert ddim.row(index)["noise_scale"] == pytest.approx(ddpm.row(index)["noise_scale"])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_takes_what_it_needs_and_no_more(prediction):
    """A coefficient that is 0 in exact arithmetic is 0, for then its tensor is not read."""
    row = StepTable.ddim(ALPHAS, steps=5, prediction=prediction).row(1)
    assert (row["next_from_sample"] == 0) == (prediction == "epsilon")


def test_v_can_start_from_pure_noise():
    table = StepTable.ddpm(TO_PURE_NOISE, steps=4, prediction="v")
    assert (table.row(0)["x0_from_sample"], table.row(0)["x0_from_output"]) == (0.0, -1.0)
    assert table.rows[:, :10].isfinite().all()
    assert table.row(0)["sigma"] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("schedule", [squaredcos_cap_v2, linear_betas])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
def test_karras_levels_may_end_where_the_noise_is_already(schedule, dtype, solver_type, sde):
    """The last step goes from sigma_min to sigma_min: the sample stays as it is, and no noise is added."""
    for n in (2, 50, 1000):
        for steps in (2, 3, 14, 15, 40):
            table = StepTable.dpm_solver_pp(
                schedule(n).to(dtype),
                steps=min(steps, n),
                sde=sde,
                solver_type=solver_type,
                karras=True,
                final_sigma="sigma_min",
            )
            assert table.rows.isfinite().all()
            last = table.row(len(table) - 1)
            names = ("next_from_sample", "next_from_x0", "next_from_previous_x0", "noise_scale")
            assert [last[name] for name in names] == [1, 0, 0, 0]


def test_noise_that_rises_by_rounding_adds_none():
    table = StepTable.of_rows(
        multistep([1, 0], [0.5, 0.1, 0.1 + 2e-17], "epsilon", order=2, sde=True, solver_type="heun", ends_low=False)
    )
    assert table.rows.isfinite().all()
    assert table.row(1)["noise_scale"] == 0


def test_ddim_may_end_in_more_noise():
    """No noise is added then; the noise that is there is scaled."""
    table = StepTable.ddim(ALPHAS, steps=[10], eta=1.0, final_alpha_cumprod=0.5)
    names = ("next_from_output", "next_from_x0", "noise_scale")
    assert [table.row(0)[name] for name in names] == pytest.approx([0.5**0.5, 0.5**0.5, 0])


def test_rows_name_the_noise_level():
    table = StepTable.dpm_solver_pp(ALPHAS, steps=8, spacing="trailing")
    for index, timestep in enumerate(table.timesteps):
        alpha = ALPHAS[timestep].item()
        assert table.row(index)["sigma"] == pytest.approx(((1 - alpha) / alpha) ** 0.5)
    heun = StepTable.heun(ALPHAS, steps=4)
    for index in range(len(heun)):
        assert heun.row(index)["input_scale"] == pytest.approx((heun.row(index)["sigma"] ** 2 + 1) ** -0.5)


def test_timesteps_can_be_told_in_other_numbers():
    table = StepTable.ddim(ALPHAS, steps=2).with_timesteps([0.25, -1])
    assert table.timesteps == (0.25, -1)
    assert [table.row(i)["timestep"] for i in range(2)] == [0.25, -1]


def test_a_replaced_table_tells_its_own_timesteps():
    table = StepTable.ddim(ALPHAS, steps=2)
    table.told(torch.device("cpu"))
    replaced = dataclasses.replace(table, timesteps=(7, 6))
    assert replaced.told(torch.device("cpu")).tolist() == [7, 6]


@pytest.mark.parametrize("build", [StepTable.ddim, StepTable.euler, StepTable.dpm_solver_pp])
def test_tables_are_made_on_the_cpu_whatever_the_default_device(build):
    options = {"steps": 3} if build == StepTable.ddim else {"steps": 3, "karras": True}
    with torch.device("meta"):
        table = build(ALPHAS, **options)
        told = table.with_timesteps([3, 2, 1]).told(torch.device("cpu"))
    assert torch.equal(table.rows, build(ALPHAS, **options).rows)
    assert told.tolist() == [3, 2, 1]


def test_uses_and_length():
    ddim, ddpm = StepTable.ddim(ALPHAS, steps=5), StepTable.ddpm(ALPHAS, steps=5)
    assert len(ddim) == len(ddpm) == 5
    assert not ddim.uses("noise_scale")
    assert ddpm.uses("noise_scale")
    assert ddpm.row(4)["noise_scale"] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StepTable.ddpm(ALPHAS, steps=5, prediction="noise"), ValueError, "prediction"),
        (lambda: StepTable.ddpm(ALPHAS, steps=5, variance="none"), ValueError, "variance"),
        (lambda: StepTable.ddim(ALPHAS, steps=5, eta=2.0), ValueError, "eta"),
        (lambda: StepTable.ddim(ALPHAS[None], steps=5), ValueError, "alphas_cumprod"),
        (lambda: StepTable.ddpm(torch.ones(4), steps=2), ValueError, "below 1"),
        (lambda: StepTable.ddpm(torch.tensor([0.5, float("nan")]), steps=2), ValueError, "below 1"),
        (lambda: StepTable.ddpm(TO_PURE_NOISE, steps=2, spacing="trailing"), ValueError, "pure noise"),
        (lambda: StepTable.euler(TO_PURE_NOISE, steps=2), ValueError, "pure noise"),
        (lambda: StepTable.dpm_solver_pp(TO_PURE_NOISE, steps=2), ValueError, "pure noise"),
        (lambda: StepTable.dpm_solver_pp(ALPHAS, steps=1000), ValueError, "between 1 and 999"),
        (lambda: StepTable.dpm_solver_pp(ALPHAS, steps=1000, spacing="leading"), ValueError, "between 1 and 999"),
        (lambda: StepTable.dpm_solver_pp(ALPHAS, steps=1001, spacing="trailing"), ValueError, "between 1 and 1000"),
        (lambda: StepTable.dpm_solver_pp(ALPHAS, steps=1001, karras=True), ValueError, "between 1 and 1000"),
        (lambda: StepTable.dpm_solver_pp(ALPHAS, steps=5, karras=True, rounding="up"), ValueError, "rounding"),
        (lambda: StepTable.ddim(ALPHAS, steps=5).with_timesteps([1.0]), ValueError, "timesteps must be 5"),
        (lambda: StepTable.ddim(ALPHAS, steps=5).with_timesteps([NAN] * 5), ValueError, "timesteps"),
        (lambda: StepTable.ddim(ALPHAS, steps=[5.7, 1.2]), ValueError, "whole numbers"),
        (lambda: StepTable.ddim(ALPHAS, steps=True), ValueError, "steps"),
        (lambda: StepTable.ddim(ALPHAS, steps=5, final_alpha_cumprod=2.0), ValueError, "final_alpha_cumprod"),
        (lambda: StepTable.ddpm(ALPHAS, steps=5, final_alpha_cumprod=-1.0), ValueError, "final_alpha_cumprod"),
        (lambda: StepTable.ddim(ALPHAS, steps=5, final_alpha_cumprod=0.0), ValueError, "final_alpha_cumprod"),
        (lambda: StepTable.ddpm(TWO_ZEROS, steps=4, prediction="v"), ValueError, "alphas_cumprod must be above 0"),
        (lambda: StepTable.dpm_solver_pp(ALPHAS, steps=True), ValueError, "steps"),
        *(
            (lambda build=build, steps=steps: build(ALPHAS, steps=steps), TypeError, "steps must be how many")
            for build in (StepTable.ddpm, StepTable.ddim, StepTable.dpm_solver_pp, StepTable.euler, StepTable.heun)
            for steps in (5.0, None, torch.tensor(5))
        ),
        *(
            (
                lambda build=build, offset=offset: build(ALPHAS, steps=5, spacing="leading", offset=offset),
                TypeError,
                "offset must be an integer",
            )
            for build in (StepTable.ddpm, StepTable.ddim, StepTable.dpm_solver_pp, StepTable.euler, StepTable.heun)
            for offset in (0.5, NAN)
        ),
        (lambda: StepTable.euler(ALPHAS, steps=2, spacing="leading", offset=501), ValueError, "offset"),
        (lambda: StepTable.heun(ALPHAS, steps=2, spacing="leading", offset=-1), ValueError, "offset"),
        (lambda: StepTable.euler(ALPHAS, steps=[NAN]), ValueError, "steps"),
        (lambda: StepTable.euler(ALPHAS, steps=2, churn=NAN), ValueError, "churn"),
        (lambda: StepTable.euler(ALPHAS, steps=2, churn=-1.0), ValueError, "churn"),
        (lambda: StepTable.edm(torch.tensor([NAN, 2.0])), ValueError, "sigmas"),
        (lambda: StepTable.edm(torch.tensor([3.0, NAN, 2.0])), ValueError, "sigmas"),
        (lambda: StepTable.edm(torch.tensor([math.inf, 2.0])), ValueError, "sigmas"),
        (lambda: StepTable.edm([2.0, 1.0]), TypeError, "sigmas must be a tensor"),
        (lambda: StepTable.edm(torch.tensor([2.0, 1.0]), sigma_data=NAN), ValueError, "sigma_data"),
        (lambda: StepTable.edm(torch.tensor([2.0, 1.0]), churn_noise=-1.0), ValueError, "churn_noise"),
        (lambda: karras_sigmas(3, rho=0.0), ValueError, "rho"),
        (lambda: karras_sigmas(3, sigma_max=math.inf), ValueError, "sigma_max"),
        (lambda: Guidance("strong"), TypeError, "scale must be a number"),
        (lambda: Guidance(2.0, NAN), ValueError, "rescale"),
        (lambda: Guidance(2.0, 0.0, "yes"), TypeError, "remove_parallel"),
        (lambda: DynamicThreshold(None), TypeError, "percentile must be a number"),
        (lambda: DynamicThreshold(0.9, NAN), ValueError, "min_value"),
        (lambda: DynamicThreshold(0.9, 1.0, NAN), ValueError, "max_value"),
        (lambda: StepTable.ddim(ALPHAS, steps=5).row(5), IndexError, "index"),
        (lambda: StepTable.ddim(ALPHAS, steps=5).row(-1), IndexError, "index"),
    ],
)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()
