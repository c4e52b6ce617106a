"""imagen-pytorch's cascades and U-Nets compute the same on the ops, and go back to what they were."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import imagen_pytorch.imagen_pytorch as library
import pytest
import torch
from imagen_pytorch import ElucidatedImagen, Imagen, Unet
from torch import Tensor, nn

import imagen_fast
from imagen_fast.testing import assert_as_accurate

SINCE_2 = hasattr(library, "ChanRMSNorm")
TEXT = 20
UNET = {
    **{"dim": 16, "cond_dim": 24, "dim_mults": (1, 2), "num_resnet_blocks": 1, "layer_cross_attns": (False, True)},
    **{"attn_heads": 2, "attn_dim_head": 16, "text_embed_dim": TEXT, "max_text_len": 9, "attn_pool_num_latents": 5},
}
CASCADES = {"imagen": (Imagen, {"timesteps": 4}), "elucidated": (ElucidatedImagen, {"num_sample_steps": 3})}


def with_random_weights(model: nn.Module) -> Any:
    """Also those that start as zero or one, so that nothing is hidden by them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.6 / max(parameter[0].numel(), 1) ** 0.5
            parameter.copy_(parameter.float().mean() + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def unet(kind: type[Unet] = Unet, **options: Any) -> Any:
    torch.manual_seed(0)
    return with_random_weights(kind(**{**UNET, "layer_attns": (False, True), **options}))


def cascade(kind: str = "imagen", **options: Any) -> Any:
    cls, defaults = CASCADES[kind]
    torch.manual_seed(0)
    first = Unet(**UNET, layer_attns=(False, True))
    second = Unet(**UNET, layer_attns=False, memory_efficient=True, use_linear_attn=(False, True))
    model = cls((first, second), image_sizes=(8, 16), text_embed_dim=TEXT, **{**defaults, **options})
    return with_random_weights(model)


def text(batch: int = 2) -> Tensor:
    return torch.randn(batch, 7, TEXT, generator=torch.Generator().manual_seed(1))


def sampled(model: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The pictures, and the state of the generator after them."""
    torch.manual_seed(5)
    pictures = model.sample(text_embeds=text(), use_tqdm=False, **arguments)
    return pictures, torch.get_rng_state()


def unet_inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(batch, 3, 8, 8, generator=generator),
        "time": torch.randn(batch, generator=generator),
        "text_embeds": text(batch),
        "text_mask": torch.arange(7) < torch.tensor([[7], [3]])[:batch],
    }


# ---- The same pictures


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", CASCADES)
def test_the_same_pictures_from_the_same_generator(kind: str, scale: float) -> None:
    plain, ours = cascade(kind), cascade(kind)
    imagen_fast.accelerate(ours)
    expected, state = sampled(plain, cond_scale=scale)
    found, found_state = sampled(ours, cond_scale=scale)
    # Steps of large sigmas blow rounding up
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 if kind == "imagen" else 5e-3)
    assert torch.equal(found_state, state)


@pytest.mark.parametrize(
    "options",
    [{"dynamic_thresholding": False}, {"pred_objectives": "v"}, {"pred_objectives": "x_start"}],
    ids=["static threshold", "v", "x_start"],
)
def test_every_objective_and_threshold(options: dict[str, Any]) -> None:
    plain, ours = cascade(**options), cascade(**options)
    imagen_fast.accelerate(ours)
    torch.testing.assert_close(sampled(ours)[0], sampled(plain)[0], rtol=0, atol=2e-4)


def test_inpainting() -> None:
    plain, ours = cascade(), cascade()
    imagen_fast.accelerate(ours)
    generator = torch.Generator().manual_seed(3)
    arguments = {
        "inpaint_images": torch.rand(2, 3, 16, 16, generator=generator),
        "inpaint_masks": torch.rand(2, 16, 16, generator=generator) < 0.5,
        "inpaint_resample_times": 2,
    }
    torch.testing.assert_close(sampled(ours, **arguments)[0], sampled(plain, **arguments)[0], rtol=0, atol=2e-4)


@pytest.mark.skipif(not SINCE_2, reason="1.26 does not remove the parallel component")
@pytest.mark.parametrize(
    "how", [{"cfg_remove_parallel_component": False}, {"cfg_keep_parallel_frac": 0.3}], ids=["plain", "part kept"]
)
def test_guidance_as_it_is_asked_for(how: dict[str, Any]) -> None:
    plain, ours = cascade(), cascade()
    imagen_fast.accelerate(ours)
    arguments = {"cond_scale": 3.0, "stop_at_unet_number": 1, **how}
    torch.testing.assert_close(sampled(ours, **arguments)[0], sampled(plain, **arguments)[0], rtol=0, atol=2e-4)


def test_times_that_differ_between_samples_are_the_librarys() -> None:
    plain, ours = cascade(), cascade()
    imagen_fast.accelerate(ours)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    results = []
    for model in (plain, ours):
        torch.manual_seed(6)
        times = {"t": torch.tensor([0.9, 0.4]), "t_next": torch.tensor([0.7, 0.0])}
        step = {"noise_scheduler": model.noise_schedulers[0], "text_embeds": text()}
        results.append(model.p_sample(model.unets[0], x, **times, **step))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


# ---- U-Nets


def test_everything_that_has_a_form_takes_it() -> None:
    report = imagen_fast.accelerate(cascade())
    swapped = Counter(entry.class_name.rpartition(".")[2] for entry in report.swapped)
    assert set(swapped) == {
        *("Block", "ResnetBlock", "LayerNorm", "Attention", "CrossAttention", "PerceiverAttention"),
        *("Unet", "Imagen", "Linear", "Conv2d", "LearnedSinusoidalPosEmb", "Sequential"),
    }
    norm = "channel_rms_norm_act" if SINCE_2 else "group_norm_act"
    assert {op for entry in report.swapped for op in entry.ops} == {norm, "attention", "sampler_step"}


def test_verify_finds_every_block_accurate() -> None:
    report = imagen_fast.accelerate(cascade(), verify=True)
    reached = [entry for entry in report.swapped if entry.accuracy is not None]
    assert len(reached) > 60
    assert all(entry.accuracy.ours <= entry.accuracy.allowed for entry in reached if entry.accuracy)


def test_gradients() -> None:
    plain, ours = unet(), unet()
    imagen_fast.accelerate(ours)
    for model in (plain, ours):
        model(**unet_inputs()).square().sum().backward()
    largest = max(parameter.grad.abs().max().item() for parameter in plain.parameters() if parameter.grad is not None)
    for (name, expected), found in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None, name
            continue
        scale = max(expected.grad.abs().max().item(), 1e-3 * largest)  # some are 0 but for rounding
        torch.testing.assert_close(found.grad / scale, expected.grad / scale, rtol=0, atol=2e-4, msg=name)


def calls() -> dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]]:
    """A block of each kind, and what it is called with. (A whole U-Net in 16 bits is more than the library takes.)"""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(7) < torch.tensor([[7], [3]])
    scale_shift = random(2, 48, 1, 1).chunk(2, dim=1)
    return {
        "Block": (library.Block(24, 8), (random(2, 24, 5, 7),), {}),
        "Block, scale-shift": (library.Block(24, 8), (random(2, 24, 5, 7), scale_shift), {}),
        "Block without norm": (library.Block(24, 8, norm=False), (random(2, 24, 5, 7),), {}),
        "Attention": (library.Attention(24, dim_head=16, heads=3), (random(2, 35, 24),), {}),
        "Attention, context": (
            library.Attention(24, dim_head=16, heads=3, context_dim=20),
            (random(2, 35, 24),),
            {"context": random(2, 7, 20)},
        ),
        "CrossAttention": (library.CrossAttention(24, context_dim=20), (random(2, 35, 24), random(2, 7, 20)), {}),
        "CrossAttention, mask": (
            library.CrossAttention(24, context_dim=20, norm_context=True),
            (random(2, 35, 24), random(2, 7, 20)),
            {"mask": mask},
        ),
        "PerceiverAttention": (
            library.PerceiverAttention(dim=24),
            (random(2, 7, 24), random(2, 5, 24)),
            {"mask": mask},
        ),
        "LayerNorm": (library.LayerNorm(24), (random(2, 9, 24) + 3,), {}),
        "LayerNorm, stable": (library.LayerNorm(24, stable=True), (random(2, 9, 24),), {}),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", calls())
def test_blocks_in_16_bits_are_as_accurate(name: str, dtype: torch.dtype) -> None:
    plain, args, kwargs = calls()[name]
    plain = with_random_weights(plain).to(dtype)

    def converted(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, tuple):
            return tuple(converted(item, to) for item in value)
        return value.to(dtype).to(to) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run(model: Any, to: torch.dtype) -> Tensor:
        with torch.no_grad():
            return model(*converted(args, to), **{key: converted(value, to) for key, value in kwargs.items()})

    ours, truth = copy.deepcopy(plain), copy.deepcopy(plain).double()
    holder = unet()
    holder.mid_attn = ours  # what is accelerated is a U-Net
    imagen_fast.accelerate(holder)
    assert type(ours).__name__ == f"Fused{type(plain).__name__}"
    assert_as_accurate(run(ours, dtype), run(plain, dtype), run(truth, torch.float64))


def forwards(model: Any) -> list[int]:
    """Counts the batches that the U-Net's forward gets."""
    batches, forward = [], model.forward

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batches.append(len(x))
        return forward(x, *args, **kwargs)

    model.forward = counting
    return batches


def test_guidance_is_one_forward() -> None:
    plain, ours = unet(), unet()
    imagen_fast.accelerate(ours)
    batches, inputs = forwards(ours), unet_inputs()
    x, time = inputs.pop("x"), inputs.pop("time")
    with torch.no_grad():
        found, expected = (m.forward_with_cond_scale(x, time, **inputs, cond_scale=4.0) for m in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert batches == [4]
    ours.train()
    with torch.no_grad():
        ours.forward_with_cond_scale(x, time, **inputs, cond_scale=4.0)
    assert batches == [4, 2, 2]  # dropout is drawn as the library draws it


# ---- And back


def test_restore_gives_the_very_same_model() -> None:
    model = cascade()
    classes = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = sampled(model, cond_scale=3.0)[0]
    imagen_fast.accelerate(model)
    assert model.state_dict().keys() == state.keys()
    sampled(model, cond_scale=3.0)
    imagen_fast.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not {"p_sample", "forward_with_cond_scale"} & (vars(model).keys() | vars(model.unets[0]).keys())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(sampled(model, cond_scale=3.0)[0], expected)


def test_a_copy_is_accelerated_and_stands_alone() -> None:
    def run(model: Any) -> Tensor:
        inputs = unet_inputs()
        with torch.no_grad():
            return model.forward_with_cond_scale(inputs.pop("x"), inputs.pop("time"), **inputs, cond_scale=3.0)

    model = unet()
    plain = run(model)
    imagen_fast.accelerate(model)
    copied = copy.deepcopy(model)
    assert vars(copied)["forward_with_cond_scale"].owner is copied
    expected = run(model)
    imagen_fast.restore(model)
    assert torch.equal(run(copied), expected)
    imagen_fast.restore(copied)
    assert torch.equal(run(copied), plain)


def test_unets_in_a_plain_list_are_restored_too() -> None:
    model = cascade()
    imagen_fast.accelerate(model)
    trained = model.get_unet(1)  # keeps them in a list from now on
    assert isinstance(model.unets, list)
    imagen_fast.restore(model)
    assert "forward_with_cond_scale" not in vars(trained)
    assert not any(type(module).__name__.startswith("Fused") for module in trained.modules())


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_children_run(when: str) -> None:
    def add_hooks(model: Any) -> None:
        for module in model.modules():
            if {cls.__name__ for cls in type(module).__mro__} & {"ChanRMSNorm", "GroupNorm", "LayerNorm", "Linear"}:
                module.register_forward_hook(lambda module, args, out: out * 1.1)

    plain, ours = unet(), unet()
    add_hooks(plain)
    if when == "before":
        add_hooks(ours)
    imagen_fast.accelerate(ours)
    if when == "after":
        add_hooks(ours)
    with torch.no_grad():
        found, expected = ours(**unet_inputs()), plain(**unet_inputs())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_subclass_with_guidance_of_its_own_keeps_it() -> None:
    class Own(Unet):
        def forward_with_cond_scale(self, *args: Any, **kwargs: Any) -> Any:
            return "own"

    model = unet(Own)
    report = imagen_fast.accelerate(model)
    assert [entry.name for entry in report.left] == [""]
    assert model.forward_with_cond_scale() == "own"


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_calls_of_a_kind_are_repeated_without_their_python(scale: float) -> None:
    built = with_random_weights(unet())
    ours, plain = copy.deepcopy(built), copy.deepcopy(built)
    imagen_fast.accelerate(ours)
    imagen_fast.accelerate(plain, graphs="off")
    inputs = unet_inputs()
    time = inputs.pop("time")
    with torch.no_grad():
        for seed in range(6):
            inputs["x"] = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            found = ours.forward_with_cond_scale(time=time, **inputs, cond_scale=scale)
            torch.manual_seed(seed)
            assert torch.equal(found, plain.forward_with_cond_scale(time=time, **inputs, cond_scale=scale))
    replays = vars(ours)["forward"].replays
    assert (replays.recorded, replays.replayed, replays.reasons) == (1, 3, [])


# ---- Another dtype, and methods of the caller's own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CASCADES)
def test_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """The library itself computes so under autocast alone."""
    model = cascade(kind)
    given = [{**unet_inputs(), "time": torch.tensor([-7.3, 11.2])} for _ in range(2)]
    given[1] |= {"x": torch.randn(2, 3, 16, 16)}
    given[1] |= {"lowres_cond_img": torch.randn(2, 3, 16, 16), "lowres_noise_times": torch.tensor([3.1, 2.2])}

    def outputs() -> list[Tensor]:
        return [model.get_unet(number + 1).eval()(**arguments) for number, arguments in enumerate(given)]

    with torch.no_grad():
        expected = outputs()
        with torch.autocast("cpu", dtype):
            eager = outputs()
        report = imagen_fast.accelerate(model, dtype=dtype)
        found = outputs()
    assert not any("float32" in left.reason for left in report.left)
    for ours, theirs, wanted in zip(found, eager, expected, strict=True):
        assert ours.dtype == torch.float32
        error, allowed = ((y.float() - wanted).norm() / wanted.norm() for y in (ours, theirs))
        assert 0 < error <= 1.5 * allowed
    pictures, _ = sampled(model)
    assert pictures.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}], ids=["bfloat16", "nhwc"]
)
@pytest.mark.parametrize("kind", CASCADES)
def test_a_loss_without_gradients_has_the_same_noise(kind: str, options: dict[str, Any]) -> None:
    results = []
    for accelerated in (False, True):
        model = cascade(kind)
        if accelerated:
            imagen_fast.accelerate(model, **options)
        torch.manual_seed(0)
        with torch.no_grad():
            loss = model(torch.rand(2, 3, 16, 16), text_embeds=text(), unet_number=2)
        results.append((loss, torch.get_rng_state()))
    (expected, state), (ours, our_state) = results
    assert torch.equal(our_state, state)
    torch.testing.assert_close(ours, expected, rtol=2e-2 if "dtype" in options else 1e-4, atol=0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["p_mean_variance", "predict_start_from_noise", "q_posterior"])
def test_methods_that_the_caller_has_replaced_are_called(method: str, when: str) -> None:
    calls = []

    def replace(model: Any) -> None:
        for owner in [model] if method == "p_mean_variance" else model.noise_schedulers:
            kept = getattr(owner, method)
            setattr(owner, method, lambda *args, kept=kept, **kwargs: calls.append(method) or kept(*args, **kwargs))

    plain, model = cascade(), cascade()
    replace(plain)
    if when == "before":
        replace(model)
    imagen_fast.accelerate(model)
    if when == "after":
        replace(model)
    expected, state = sampled(plain)
    count = len(calls)
    pictures, state_after = sampled(model)
    assert len(calls) == 2 * count > 0
    torch.testing.assert_close(pictures, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(state, state_after)


def test_the_times_of_a_sampling_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device each reading waits for all that was queued."""
    model = cascade()
    imagen_fast.accelerate(model)
    cls = type(vars(model)["p_sample"])
    known, on_host = [], cls._on_host

    def watched(self: Any, t: Tensor) -> Tensor:
        there = on_host(self, t)
        assert torch.equal(there, t)
        known.append(self._times)
        return there

    monkeypatch.setattr(cls, "_on_host", watched)
    sampled(model)
    assert len(known) == 2 * 2 * 4  # two models, two times of each of four steps
    assert len({id(times) for times in known}) == 2
    assert None not in known
