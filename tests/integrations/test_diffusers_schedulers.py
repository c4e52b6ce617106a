"""diffusers' schedulers on `ops.sampler_step`: the same samples from the same generator, and the way back."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast import ops
from imagen_fast.accelerate import AccelerationError

diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

SHAPE = (2, 3, 8, 8)
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
IF = {
    **COSINE,
    "variance_type": "learned_range",
    "clip_sample": False,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}

# Class, configuration, what `step` is given, and the channels of the output
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "ddpm": ("DDPMScheduler", {}, {}, 3),
    "ddpm-log": ("DDPMScheduler", {"variance_type": "fixed_small_log"}, {}, 3),
    "ddpm-large": ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {}, 3),
    "if-1": ("DDPMScheduler", {**IF, "sample_max_value": 1.5}, {}, 6),
    "if-2": ("DDPMScheduler", {**IF, "sample_max_value": 1.0}, {}, 6),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}, 3),
    "ddim-v": ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}, {}, 3),
    "ddim-eta": ("DDIMScheduler", {}, {"eta": 0.6}, 3),
    "ddim-clipped": ("DDIMScheduler", COSINE, {"eta": 1.0, "use_clipped_model_output": True}, 3),
    "dpm": ("DPMSolverMultistepScheduler", {}, {}, 3),
    "dpm-1": ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "sigma_min"}, {}, 3),
    "dpm-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}, {}, 3),
    "dpm-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, 3),
    "dpm-sde-min": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {},
        3,
    ),
    "dpm-if": (
        "DPMSolverMultistepScheduler",
        {**COSINE, "variance_type": "learned_range", "thresholding": True},
        {},
        6,
    ),
    "euler": ("EulerDiscreteScheduler", {}, {}, 3),
    "euler-v": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {}, 3),
    "euler-x0": ("EulerDiscreteScheduler", {"prediction_type": "sample", "use_exponential_sigmas": True}, {}, 3),
    "euler-log-churn": ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {"s_churn": 4.0}, 3),
    "euler-churn": ("EulerDiscreteScheduler", {}, {"s_churn": 4.0, "s_tmin": 0.1, "s_noise": 1.01}, 3),
}


def build(kind: str, steps: int | None = 9) -> Any:
    name, config, *_ = KINDS[kind]
    scheduler = getattr(diffusers, name)(**{key: value for key, value in config.items() if value is not None})
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(scheduler: Any, kind: str, dtype: torch.dtype = torch.float32, start: int = 0, switch: Any = None) -> Tensor:
    """Sample with a model whose output depends on its input a little, from a generator of the loop's own."""
    _, _, kwargs, channels = KINDS[kind]
    generator = torch.Generator().manual_seed(7)
    sample = (randn(0, *SHAPE) * float(scheduler.init_noise_sigma)).to(dtype)
    for number, timestep in enumerate(scheduler.timesteps[start:]):
        if switch is not None:
            switch(number, scheduler)
        scaled = scheduler.scale_model_input(sample, timestep)
        output = randn(100 + number, SHAPE[0], channels, *SHAPE[2:])
        output[:, :3] += 0.1 * scaled.float()
        sample = scheduler.step(
            output.to(dtype), timestep, sample, **accepted(scheduler, kwargs, generator)
        ).prev_sample
    return torch.cat((sample.flatten(), torch.randn(1, generator=generator).to(dtype)))  # and where the generator is


def accepted(scheduler: Any, kwargs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """What pipelines pass on: what the signature of `step` takes."""
    parameters = inspect.signature(scheduler.step).parameters
    offered = {**kwargs, "generator": generator}
    assert set(offered) <= set(parameters)
    return offered


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that `ops.sampler_step` has stepped through."""
    taken: list[int] = []
    original = ops.sampler_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(args[3])
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "sampler_step", counted)
    return taken


def assert_same(ours: Tensor, theirs: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))
    assert ours[-1] == theirs[-1]  # as much was drawn


@pytest.mark.parametrize("kind", KINDS)
def test_same_samples(kind: str, steps_taken: list[int]) -> None:
    theirs, ours = build(kind), build(kind)
    report = imagen_fast.accelerate(ours)
    assert [swapped.ops for swapped in report.swapped] == [("sampler_step",)]
    assert_same(loop(ours, kind), loop(theirs, kind))
    assert len(steps_taken) == 9
    assert type(ours) is type(theirs)
    assert ours.config == theirs.config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["if-1", "ddim-eta", "dpm", "euler"])
def test_same_samples_in_16_bits(kind: str, dtype: torch.dtype, steps_taken: list[int]) -> None:
    """As near to the scheduler's float32 loop as the scheduler itself, or nearer."""
    truth = loop(build(kind), kind)
    theirs = loop(build(kind), kind, dtype)
    scheduler = build(kind)
    imagen_fast.accelerate(scheduler)
    ours = loop(scheduler, kind, dtype)
    assert ours.dtype == theirs.dtype
    assert len(steps_taken) == 9
    error = (ours - truth).abs().max()
    assert error <= 2 * (theirs - truth).abs().max() + 8 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("kind", ["if-1", "ddim-eta", "dpm", "dpm-sde", "euler-churn"])
def test_they_can_take_turns(kind: str, steps_taken: list[int]) -> None:
    def switch(number: int, scheduler: Any) -> None:
        if number % 3 == 0:
            imagen_fast.accelerate(scheduler)
        elif number % 3 == 2:
            imagen_fast.restore(scheduler)

    assert_same(loop(build(kind), kind, switch=switch), loop(build(kind), kind))
    assert len(steps_taken) == 6


@pytest.mark.parametrize("kind", ["if-1", "ddim-eta", "dpm", "euler-churn"])
def test_a_loop_may_start_later(kind: str, steps_taken: list[int]) -> None:
    theirs, ours = build(kind), build(kind)
    imagen_fast.accelerate(ours)
    assert_same(loop(ours, kind, start=4), loop(theirs, kind, start=4))
    assert len(steps_taken) == 5


@pytest.mark.parametrize("kind", ["if-1", "ddim", "dpm", "euler"])
def test_other_numbers_of_steps_later(kind: str) -> None:
    theirs, ours = build(kind), build(kind)
    imagen_fast.accelerate(ours)
    for steps in (4, 7):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert_same(loop(ours, kind), loop(theirs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_restored(kind: str, steps_taken: list[int]) -> None:
    scheduler = build(kind)
    before = set(vars(scheduler))
    imagen_fast.accelerate(scheduler)
    imagen_fast.restore(scheduler)
    assert set(vars(scheduler)) == before
    assert torch.equal(loop(scheduler, kind), loop(build(kind), kind))
    assert not steps_taken


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", ["if-1", "dpm"])
def test_copies_are_accelerated_too_and_stand_alone(kind: str, duplicate: Any, steps_taken: list[int]) -> None:
    scheduler = build(kind)
    imagen_fast.accelerate(scheduler)
    loop(scheduler, kind)
    twin = duplicate(scheduler)
    assert twin.step.owner is twin
    twin.set_timesteps(5)
    assert len(scheduler.timesteps) == 9
    steps_taken.clear()
    expected = build(kind, 5)
    assert_same(loop(twin, kind), loop(expected, kind))
    assert len(steps_taken) == 5
    imagen_fast.restore(twin)
    assert "step" in vars(scheduler)


def test_saved_configurations_are_unchanged(tmp_path) -> None:
    plain, accelerated = build("if-1"), build("if-1")
    imagen_fast.accelerate(accelerated)
    plain.save_pretrained(tmp_path / "plain")
    accelerated.save_pretrained(tmp_path / "accelerated")
    name = "scheduler_config.json"
    assert (tmp_path / "plain" / name).read_text() == (tmp_path / "accelerated" / name).read_text()
    loaded = diffusers.DDPMScheduler.from_pretrained(tmp_path / "accelerated")
    assert "step" not in vars(loaded)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type 'learned'"),
        ("DDPMScheduler", {"clip_sample_range": 2.0}, "clips to 2.0"),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.5}, "dynamic threshold"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "dpmsolver"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            "flow matching",
        ),
        ("PNDMScheduler", {}, "none of its modules has a fused form"),
    ],
)
def test_unusual_configurations_are_left_and_named(name: str, config: dict[str, Any], reason: str) -> None:
    scheduler = getattr(diffusers, name)(**config)
    report = imagen_fast.accelerate(scheduler)
    assert not report.swapped
    assert reason in report.left[0].reason
    assert "step" not in vars(scheduler)
    with pytest.raises(AccelerationError, match="cannot be accelerated"):
        imagen_fast.accelerate(scheduler, strict=True)


@pytest.mark.parametrize(
    ("kind", "foreign"),
    [
        ("dpm", {"clip_sample": True, "clip_sample_range": 1.0}),
        ("dpm", {"clip_sample": True, "clip_sample_range": 2.0}),
        ("dpm", {"clip_sample": True}),  # of a release that had no range yet
        ("euler", {"clip_sample": True, "clip_sample_range": 1.0}),
        ("euler", {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.5}),
    ],
)
def test_limits_of_another_scheduler_are_not_its_own(
    kind: str, foreign: dict[str, Any], steps_taken: list[int]
) -> None:
    """`from_config` keeps the keys of the scheduler that the configuration is from."""

    def inherited() -> Any:
        scheduler = getattr(diffusers, KINDS[kind][0]).from_config({"beta_schedule": "linear", **foreign})
        scheduler.set_timesteps(9)
        assert foreign.items() <= scheduler.config.items()
        return scheduler

    ours = inherited()
    assert imagen_fast.accelerate(ours).swapped
    assert_same(loop(ours, kind), loop(inherited(), kind))
    assert len(steps_taken) == 9


def test_a_subclass_is_left() -> None:
    class Mine(diffusers.DDPMScheduler):
        pass

    (left,) = imagen_fast.accelerate(Mine()).left
    assert "subclass of DDPMScheduler" in left.reason


def test_what_does_not_fit_is_the_schedulers_own_step(steps_taken: list[int]) -> None:
    scheduler = build("ddpm")
    imagen_fast.accelerate(scheduler)
    sample, output = randn(0, *SHAPE).double(), randn(1, *SHAPE).double()
    following = scheduler.step(output, scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(1))
    expected = build("ddpm").step(output, scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(1))
    assert torch.equal(following.prev_sample, expected.prev_sample)
    with pytest.raises(IndexError):  # theirs, of a timestep that is not among its own
        scheduler.step(output.float(), 7, sample.float())
    assert not steps_taken


@pytest.mark.parametrize("told", [int, lambda t: t.clone()], ids=["int", "another-tensor"])
def test_timesteps_may_be_numbers_or_other_tensors(told: Any, steps_taken: list[int]) -> None:
    scheduler, expected = build("ddim"), build("ddim")
    imagen_fast.accelerate(scheduler)
    sample, output = randn(0, *SHAPE), randn(1, *SHAPE)
    for timestep in scheduler.timesteps:
        ours = scheduler.step(output, told(timestep), sample, return_dict=False)
        theirs = expected.step(output, timestep, sample, return_dict=False)
        assert len(ours) == len(theirs) == 2
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert steps_taken == list(range(9))


@pytest.mark.parametrize(
    ("kind", "steps", "stride"), [("ddpm", 9, 2), ("ddpm", None, 300), ("ddim", 9, 2)], ids=["ddpm", "unset", "ddim"]
)
def test_timesteps_may_be_a_strided_view(kind: str, steps: int | None, stride: int) -> None:
    ours, theirs = build(kind, steps), build(kind, steps)
    imagen_fast.accelerate(ours)
    for scheduler in (ours, theirs):
        scheduler.timesteps = scheduler.timesteps[::stride]
    assert_same(loop(ours, kind), loop(theirs, kind))


def test_another_end_of_ddim_is_seen() -> None:
    ours, theirs = build("ddim"), build("ddim")
    imagen_fast.accelerate(ours)
    loop(ours, "ddim")
    for scheduler in (ours, theirs):
        scheduler.final_alpha_cumprod = torch.tensor(1.0)
    assert_same(loop(ours, "ddim"), loop(theirs, "ddim"))


@pytest.mark.parametrize("kind", ["dpm", "dpm-1", "dpm-sde", "euler"])
def test_past_the_last_step_they_raise(kind: str) -> None:
    ours, theirs = build(kind), build(kind)
    imagen_fast.accelerate(ours)
    messages = []
    for scheduler in (theirs, ours):
        loop(scheduler, kind)
        with pytest.raises(IndexError) as raised:
            loop(scheduler, kind)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("steps", [4, 9])
def test_karras_on_the_cosine_schedule(steps: int, steps_taken: list[int]) -> None:
    """Its timesteps are rounded down, and repeat: the model is told the scheduler's."""

    def started() -> Any:
        scheduler = diffusers.DPMSolverMultistepScheduler(**COSINE, use_karras_sigmas=True)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        return scheduler

    ours, theirs = started(), started()
    imagen_fast.accelerate(ours)
    assert_same(loop(ours, "dpm"), loop(theirs, "dpm"))
    assert len(steps_taken) == steps
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("shape", [(1, *SHAPE[1:]), SHAPE[1:], (1,), (3, *SHAPE)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("kind", "kwargs"), [("dpm-sde", {}), ("dpm", {}), ("ddim", {"eta": 0.5})])
def test_given_noise_may_broadcast(kind: str, kwargs: dict[str, Any], dtype: torch.dtype, shape: Any) -> None:
    noise = randn(3, *shape).to(dtype)
    expected, ours = build(kind), build(kind)
    imagen_fast.accelerate(ours)
    sample, output = randn(0, *SHAPE), randn(1, *SHAPE)
    results = [
        scheduler.step(output, scheduler.timesteps[4], sample, variance_noise=noise, **kwargs).prev_sample
        for scheduler in (ours, expected)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_given_noise_of_the_samples_shape_is_used(steps_taken: list[int]) -> None:
    expected, ours = build("dpm-sde"), build("dpm-sde")
    imagen_fast.accelerate(ours)
    sample, output, noise = (randn(seed, *SHAPE) for seed in range(3))
    results = [
        scheduler.step(output, scheduler.timesteps[4], sample, variance_noise=noise.double()).prev_sample
        for scheduler in (ours, expected)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(steps_taken) == 1


def test_a_pipelines_scheduler_is_accelerated_with_it() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(num_inference_steps=4, generator=generator, output_type="np").images)

    expected = draw()
    report = imagen_fast.accelerate(pipe)
    assert "scheduler" in {swapped.name for swapped in report.swapped}
    torch.testing.assert_close(draw(), expected, rtol=1e-3, atol=1e-3)
    imagen_fast.restore(pipe)
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(draw(), expected)


def one_step(scheduler: Any) -> Tensor:
    sample, output = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    scheduler._step_index = None
    scheduler.scale_model_input(sample, scheduler.timesteps[2])  # what Euler's insists on
    return scheduler.step(output, scheduler.timesteps[2], sample).prev_sample


def test_a_write_that_pytorch_hides_is_seen_after_invalidate() -> None:
    scheduler = build("euler")
    imagen_fast.accelerate(scheduler)
    before = one_step(scheduler)
    scheduler.sigmas.numpy()[3] *= 0.5
    assert torch.equal(one_step(scheduler), before)  # nobody can tell
    imagen_fast.invalidate(scheduler)
    ours = one_step(scheduler)
    imagen_fast.restore(scheduler)
    torch.testing.assert_close(ours, one_step(scheduler))
    assert not torch.allclose(ours, before)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm", "euler"])
def test_it_works_in_inference_mode(kind: str) -> None:
    with torch.inference_mode():
        plain, ours = build(kind), build(kind)
        imagen_fast.accelerate(ours)
        torch.manual_seed(3)
        expected = one_step(plain)
        torch.manual_seed(3)
        torch.testing.assert_close(one_step(ours), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_gives_x0_in_the_dtype_of_the_scheduler(prediction: str) -> None:
    theirs, ours = (diffusers.EulerDiscreteScheduler(prediction_type=prediction) for _ in range(2))
    imagen_fast.accelerate(ours)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        sample = scheduler.scale_model_input(randn(0, *SHAPE).bfloat16(), scheduler.timesteps[0])
        results.append(scheduler.step(randn(1, *SHAPE).bfloat16(), scheduler.timesteps[0], sample))
    for key in ("prev_sample", "pred_original_sample"):
        one, other = (result[key] for result in results)
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(one.abs().max()))  # theirs is rounded twice


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_derivatives_in_forward_mode_are_the_schedulers_own(name: str) -> None:
    sample, tangent = torch.randn(2, 2, 3, 4, 4)
    results = []
    for accelerated in (False, True):
        scheduler = getattr(diffusers, name)()
        if accelerated:
            imagen_fast.accelerate(scheduler)
        scheduler.set_timesteps(5)

        def step(x: Tensor, scheduler: Any = scheduler) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return scheduler.step(x, scheduler.timesteps[0], x, generator=generator, return_dict=False)[0]

        results.append(torch.func.jvp(step, (sample,), (tangent,)))
    torch.testing.assert_close(*results)
