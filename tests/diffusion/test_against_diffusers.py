"""Every table against diffusers' scheduler of that name, step by step, on shared outputs and noise.

The scheduler's own float32 schedule goes into the table; what is compared differs by float32 round-off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_fast.diffusion import IF_TIMESTEPS, DynamicThreshold, StepTable
from imagen_fast.reference.sampler_step import sampler_step

diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

SHAPE = (2, 3, 8, 8)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


class Draws:
    """The noise that a scheduler draws, recorded: they ask `randn_tensor` for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Tensor] = []
        for name in ("ddpm", "ddim", "dpmsolver_multistep", "euler_discrete", "heun_discrete"):
            module = __import__(f"diffusers.schedulers.scheduling_{name}", fromlist=["x"])
            monkeypatch.setattr(module, "randn_tensor", self, raising=False)

    def __call__(self, shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        self.drawn.append(randn(1000 + len(self.drawn), *shape).to(dtype or torch.float32))
        return self.drawn[-1]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


def follow(
    scheduler: Any,
    table: StepTable,
    draws: Draws,
    *,
    threshold: Any = None,
    channels: int = 3,
    step: dict[str, Any] | None = None,
) -> None:
    """Step both from the same sample with the same outputs, and compare sample, x0, input scale and timestep."""
    assert len(table) == len(scheduler.timesteps)
    assert torch.as_tensor(table.initial_sigma) == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)
    theirs = ours = randn(0) * table.initial_sigma
    previous: Tensor | None = None
    for index, timestep in enumerate(scheduler.timesteps):
        assert float(table.timesteps[index]) == pytest.approx(float(timestep), rel=1e-5, abs=1e-4)
        scaled = scheduler.scale_model_input(theirs, timestep)
        torch.testing.assert_close(scaled, theirs * table.row(index)["input_scale"], rtol=1e-5, atol=1e-6)
        output = randn(100 + index, SHAPE[0], channels, *SHAPE[2:])
        before = len(draws.drawn)
        result = scheduler.step(output, timestep, theirs, **(step or {}))
        noise = draws.drawn[before] if len(draws.drawn) > before else torch.full(SHAPE, float("nan"))
        if not table.row(index)["noise_scale"] and not table.row(index)["x0_from_noise"]:
            noise = None
        ours, x0 = sampler_step(
            theirs, output, table, index, threshold=threshold, noise=noise, previous_x0=previous, return_x0=True
        )
        size = float(result.prev_sample.abs().max())
        torch.testing.assert_close(ours, result.prev_sample, rtol=2e-5, atol=2e-5 * max(size, 1))
        if getattr(result, "pred_original_sample", None) is not None:
            torch.testing.assert_close(x0, result.pred_original_sample, rtol=1e-4, atol=1e-4 * float(x0.abs().max()))
        theirs, previous = result.prev_sample, x0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction: str, variance: str, spacing: str, draws: Draws) -> None:
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=PREDICTIONS[prediction],
        variance_type=variance,
        timestep_spacing=spacing,
        clip_sample=False,
    )
    scheduler.set_timesteps(11)
    table = StepTable.ddpm(
        scheduler.alphas_cumprod, steps=11, prediction=prediction, variance=variance, spacing=spacing
    )
    follow(scheduler, table, draws, channels=6 if variance == "learned_range" else 3)


@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0})], ids=["ddpm", "ddim"])
def test_the_last_of_many_steps_round_as_the_scheduler_does(
    solver: str, options: dict[str, float], draws: Draws
) -> None:
    """There a float32 schedule's quotients of neighbours are so near to 1 that their rounding is seen in the sample."""
    schedulers = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
    scheduler = schedulers[solver](clip_sample=False)
    scheduler.set_timesteps(1000)
    table = getattr(StepTable, solver)(scheduler.alphas_cumprod, steps=1000, **options)
    for index in (997, 998):
        sample, output = randn(index), randn(2 * index)
        before = len(draws.drawn)
        theirs = scheduler.step(output, scheduler.timesteps[index], sample, **options).prev_sample
        ours, _ = sampler_step(sample, output, table, index, noise=draws.drawn[before])
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=3e-6)


THRESHOLDS: dict[str, tuple[dict[str, Any], Any]] = {
    "clip": ({"clip_sample": True}, "static"),
    "if-stage-1": (
        {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5},
        DynamicThreshold(0.95, max_value=1.5),
    ),
    "if-stage-2": (
        {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.0},
        DynamicThreshold(0.95, max_value=1.0),
    ),
    "wide": (
        {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1e9},
        DynamicThreshold(0.7),
    ),
}


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_thresholds(solver: str, threshold: str, draws: Draws) -> None:
    settings, ours = THRESHOLDS[threshold]
    schedule = {"beta_schedule": "squaredcos_cap_v2", **settings}
    if solver == "ddpm":
        scheduler = diffusers.DDPMScheduler(**schedule, variance_type="learned_range")
        build: Callable[..., StepTable] = lambda *a, **k: StepTable.ddpm(*a, variance="learned_range", **k)  # noqa: E731
    else:
        scheduler, build = diffusers.DDIMScheduler(**schedule), StepTable.ddim
    scheduler.set_timesteps(9)
    table = build(scheduler.alphas_cumprod, steps=9)
    follow(scheduler, table, draws, threshold=ours, channels=6 if solver == "ddpm" else 3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("DDIMScheduler", StepTable.ddim),
        ("DPMSolverMultistepScheduler", StepTable.dpm_solver_pp),
        ("EulerDiscreteScheduler", StepTable.euler),
    ],
)
def test_every_number_of_steps_visits_the_same_timesteps(name: str, build: Callable[..., StepTable], spacing: str):
    scheduler = getattr(diffusers, name)(num_train_timesteps=100, timestep_spacing=spacing)
    for steps in range(1, 100):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps[:steps].tolist()  # rounding can leave room for one more, timestep -1
        ours = build(scheduler.alphas_cumprod, steps=steps, spacing=spacing).timesteps
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4), steps


@pytest.mark.parametrize("name", ["fast27", "super40"])
def test_if_timesteps(name: str, draws: Draws) -> None:
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False
    )
    scheduler.set_timesteps(timesteps=list(IF_TIMESTEPS[name]))
    table = StepTable.ddpm(scheduler.alphas_cumprod, steps=name, variance="learned_range")
    follow(scheduler, table, draws, channels=6)


@pytest.mark.parametrize("steps", [[999, 700, 350, 20, 0], [999, 800, 500, 450, 100]])
def test_ddpm_on_given_timesteps(steps: list[int], draws: Draws) -> None:
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False
    )
    scheduler.set_timesteps(timesteps=steps)
    follow(
        scheduler, StepTable.ddpm(scheduler.alphas_cumprod, steps=steps, variance="learned_range"), draws, channels=6
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction: str, eta: float, spacing: str, draws: Draws) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear",
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1 if spacing == "leading" else 0,
    )
    scheduler.set_timesteps(13)
    table = StepTable.ddim(
        scheduler.alphas_cumprod,
        steps=13,
        prediction=prediction,
        eta=eta,
        spacing=spacing,
        offset=1 if spacing == "leading" else 0,
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
    )
    follow(scheduler, table, draws, step={"eta": eta})


def test_ddim_with_the_noise_of_the_clipped_x0(draws: Draws) -> None:
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    scheduler.set_timesteps(10)
    table = StepTable.ddim(scheduler.alphas_cumprod, steps=10, clipped_epsilon=True)
    follow(scheduler, table, draws, threshold="static", step={"use_clipped_model_output": True})


@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [5, 17])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(("order", "sde"), [(1, False), (2, False), (1, True), (2, True)])
def test_dpm_solver_pp(order: int, sde: bool, solver_type: str, steps: int, final_sigma: str, draws: Draws) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear",
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        solver_order=order,
        solver_type=solver_type,
        final_sigmas_type=final_sigma,
    )
    scheduler.set_timesteps(steps)
    table = StepTable.dpm_solver_pp(
        scheduler.alphas_cumprod, steps=steps, order=order, sde=sde, solver_type=solver_type, final_sigma=final_sigma
    )
    follow(scheduler, table, draws)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_pp_spacings(prediction: str, spacing: str, karras: bool, draws: Draws) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        use_karras_sigmas=karras,
    )
    scheduler.set_timesteps(12)
    table = StepTable.dpm_solver_pp(
        scheduler.alphas_cumprod, steps=12, prediction=prediction, spacing=spacing, karras=karras
    )
    follow(scheduler, table, draws)


@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("spacing", "karras"), [("trailing", False), ("trailing", True), ("leading", True), ("linspace", True)]
)
def test_dpm_solver_pp_in_as_many_steps_as_timesteps(
    spacing: str, karras: bool, final_sigma: str, draws: Draws
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=50, timestep_spacing=spacing, use_karras_sigmas=karras, final_sigmas_type=final_sigma
    )
    scheduler.set_timesteps(50)
    table = StepTable.dpm_solver_pp(
        scheduler.alphas_cumprod, steps=50, spacing=spacing, karras=karras, final_sigma=final_sigma
    )
    follow(scheduler, table, draws)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n", [100, 1000])
def test_dpm_solver_pp_rounds_karras_timesteps_as_the_scheduler_does(n: int, schedule: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=n, beta_schedule=schedule, use_karras_sigmas=True
    )
    rounding = "down" if schedule == "squaredcos_cap_v2" else "nearest"
    for steps in (*range(1, 30), 50, 100):
        scheduler.set_timesteps(steps)
        table = StepTable.dpm_solver_pp(scheduler.alphas_cumprod, steps=steps, karras=True, rounding=rounding)
        assert list(table.timesteps) == scheduler.timesteps.tolist(), steps
        levels = [table.row(i)["sigma"] for i in range(steps)]
        assert levels == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5), steps


def test_dpm_solver_pp_that_ends_in_order_1(draws: Draws) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(euler_at_final=True, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(20)
    table = StepTable.dpm_solver_pp(scheduler.alphas_cumprod, steps=20, euler_at_final=True, final_sigma="sigma_min")
    assert table.row(18)["next_from_previous_x0"]
    assert not table.row(19)["next_from_previous_x0"]
    follow(scheduler, table, draws)


def test_dpm_solver_pp_ignores_variance_channels(draws: Draws) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(variance_type="learned_range")
    scheduler.set_timesteps(6)
    follow(scheduler, StepTable.dpm_solver_pp(scheduler.alphas_cumprod, steps=6), draws, channels=6)


def test_dpm_solver_pp_with_dynamic_thresholding(draws: Draws) -> None:
    settings, threshold = THRESHOLDS["if-stage-1"]
    settings = {name: value for name, value in settings.items() if name != "clip_sample"}
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", **settings)
    scheduler.set_timesteps(10)
    follow(scheduler, StepTable.dpm_solver_pp(scheduler.alphas_cumprod, steps=10), draws, threshold=threshold)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler(prediction: str, spacing: str, karras: bool, draws: Draws) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        use_karras_sigmas=karras,
    )
    scheduler.set_timesteps(11)
    table = StepTable.euler(scheduler.alphas_cumprod, steps=11, prediction=prediction, spacing=spacing, karras=karras)
    follow(scheduler, table, draws)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_with_churn(prediction: str, draws: Draws) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(11)
    churn = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.01}
    table = StepTable.euler(
        scheduler.alphas_cumprod,
        steps=11,
        prediction=prediction,
        churn=3.0,
        churn_min=0.1,
        churn_max=8.0,
        churn_noise=1.01,
    )
    assert table.uses("x0_from_noise") or prediction == "x0"
    follow(scheduler, table, draws, step=churn)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_heun(prediction: str, karras: bool, draws: Draws) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type=PREDICTIONS[prediction], use_karras_sigmas=karras
    )
    scheduler.set_timesteps(8)
    table = StepTable.heun(scheduler.alphas_cumprod, steps=8, prediction=prediction, karras=karras)
    assert len(table) == 15
    assert table.uses("next_from_previous_x0")
    follow(scheduler, table, draws)
