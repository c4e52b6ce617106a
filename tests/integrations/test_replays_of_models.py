"""Calls of models on the CPU that are repeated as lists of operators: they give what the model gives, nothing stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import imagen_fast
from imagen_fast.integrations._graphed import GraphedForward
from imagen_fast.integrations._replays import ReplayPool
from imagen_fast.models import EfficientUNet, EfficientUNetConfig, T5Encoder, UNet
from imagen_fast.models.t5 import T5Config

from .test_graphs import CHANGES, build, expected, inputs, run
from .test_replays import normal
from .unet_configs import IF


def replays_of(model: Any) -> ReplayPool:
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    return forward.replays


OPTIONS = [{}, {"dtype": torch.bfloat16, "memory_format": torch.channels_last}, {"memory_format": torch.channels_last}]


@pytest.mark.parametrize("options", OPTIONS, ids=["own", "bf16-nhwc", "nhwc"])
def test_a_unet(options: dict[str, Any]) -> None:
    model, plain = build(), build()
    imagen_fast.accelerate(model, **options)
    imagen_fast.accelerate(plain, graphs="off", **options)
    for seed in range(5):
        assert torch.equal(run(model, seed), run(plain, seed))
    assert (replays_of(model).recorded, replays_of(model).replayed) == (1, 2)
    with torch.inference_mode():
        for seed in range(5, 9):
            found = model(**inputs(seed))
            assert torch.equal(found, plain(**inputs(seed)))
            assert found.is_inference()
    assert (replays_of(model).recorded, replays_of(model).replayed) == (2, 3)
    assert replays_of(model).reasons == []


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_a_text_with_another_mask_is_another_text(graphs: str) -> None:
    model = build()
    imagen_fast.accelerate(model, graphs=graphs)
    found = []
    for step in range(8):
        given = {**inputs(0), "text_mask": torch.arange(5).expand(2, 5) < (2 if step % 2 else 4)}
        with torch.no_grad():
            found.append(model(**given))
            assert torch.equal(found[-1], copy.deepcopy(model)(**given))
    assert not torch.equal(found[-1], found[-2])


def test_an_efficient_unet() -> None:
    torch.manual_seed(0)
    config = EfficientUNetConfig(
        channels=16, multipliers=(1, 2), blocks=(1, 1), self_attention_levels=(1,), cross_attention_levels=(1,),
        heads=2, text_dim=12, groups=8,
    )  # fmt: skip
    built = EfficientUNet(config).eval()
    model, plain = copy.deepcopy(built), copy.deepcopy(built)
    imagen_fast.accelerate(model)
    imagen_fast.accelerate(plain, graphs="off")
    for seed in range(5):
        given = {**inputs(seed), "x": normal(2, 6, 16, 16, seed=seed), "augmentation": torch.tensor([seed, 10])}
        with torch.no_grad():
            assert torch.equal(model(**given), plain(**given))
    assert replays_of(model).replayed == 2


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["own", "bf16-nhwc"])
def test_a_unet_of_diffusers_and_its_prompts(options: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")
    torch.manual_seed(0)
    built = diffusers.UNet2DConditionModel(**IF).eval()
    model, plain = copy.deepcopy(built), copy.deepcopy(built)
    imagen_fast.accelerate(model, **options)
    imagen_fast.accelerate(plain, graphs="off", **options)
    texts = [normal(2, 5, 24, seed=100), normal(2, 5, 24, seed=101)]
    for step in range(12):
        text = texts[step % 2 if step > 8 else step // 5]  # the same for a while, then by turns
        if step == 7:
            for each in texts:
                each.numpy()[0, 0] += 1  # behind PyTorch's back
        given = {"sample": normal(2, 3, 8, 8, seed=step), "timestep": 7 * step, "encoder_hidden_states": text}
        with torch.no_grad():
            found, wanted = model(**given), plain(**given)
        assert type(found) is type(wanted)
        assert torch.equal(found.sample, wanted.sample)
    assert (replays_of(model).recorded, replays_of(model).replayed) == (1, 9)
    assert replays_of(model).reasons == []


def test_text_encoders() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5Encoder(config).eval()
    transformers = pytest.importorskip("transformers")
    host_config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    for encoder in (model, transformers.T5EncoderModel(host_config).eval()):
        # Both are copies: where weights lie may change the last digit of a product.
        ours, plain = copy.deepcopy(encoder), copy.deepcopy(encoder)
        imagen_fast.accelerate(ours)
        imagen_fast.accelerate(plain, graphs="off")
        for seed in range(6):
            ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(seed))
            mask = (torch.arange(9) < torch.tensor([[9], [3 + seed]])).long()
            with torch.no_grad():
                found, wanted = (m(input_ids=ids, attention_mask=mask) for m in (ours, plain))
            found, wanted = (x if isinstance(x, Tensor) else x.last_hidden_state for x in (found, wanted))
            assert torch.equal(found, wanted)
        assert replays_of(ours).replayed == 3


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["own", "bf16-nhwc"])
def test_nothing_stale_is_repeated(options: dict[str, Any], change: Callable[[Any], None]) -> None:
    model, plain = build(), build()
    imagen_fast.accelerate(model, **options)
    imagen_fast.accelerate(plain, graphs="off", **options)
    for seed in range(4):
        run(model, seed)
    assert replays_of(model).replayed == 1
    before = run(model, 3)
    for each in (model, plain):
        torch.manual_seed(1)
        change(each)
    for seed in (3, 4, 5, 6, 7):
        assert torch.equal(run(model, seed), run(plain, seed))
    assert not torch.equal(run(model, 3), before)
    assert replays_of(model).replayed > 2


def test_a_hidden_write_to_all_numbers_is_seen() -> None:
    model, plain = build(), build()
    imagen_fast.accelerate(model)
    imagen_fast.accelerate(plain, graphs="off")
    for seed in range(4):
        run(model, seed)
    for each in (model, plain):
        each.time[1].weight.data.mul_(1.5)  # of which there is a packed copy
        each.norm_out.bias.data.add_(1)
    for seed in range(4):
        assert torch.equal(run(model, seed), run(plain, seed))


def test_after_a_call_with_gradients_everything_is_recorded_anew() -> None:
    model = build()
    imagen_fast.accelerate(model)
    for seed in range(4):
        run(model, seed)
    assert len(replays_of(model)) == 1
    model(**inputs(0)).sum().backward()
    assert len(replays_of(model)) == 0
    with torch.no_grad():
        model.conv_in.weight.data[0, 0, 0, 1] += 1  # of which nothing is compared
    assert torch.equal(run(model, 1), expected(model, 1))


@pytest.mark.parametrize(
    "how", ["hook", "forward", "global", "gradients", "eager", "autocast", "mode", "own class", "tangents"]
)
def test_when_python_has_to_run(how: str) -> None:
    model = build()
    imagen_fast.accelerate(model)
    seen: list[int] = []
    for seed in range(3):
        run(model, seed)
    inner: Any = model.middle1.resnet
    if how == "hook":
        inner.register_forward_hook(lambda *args: seen.append(1))
    elif how == "forward":
        forward = inner.forward
        inner.forward = lambda *args: seen.append(1) or forward(*args)
    elif how == "own class":

        class Silu(nn.SiLU):
            def forward(self, input: Tensor) -> Tensor:
                seen.append(1)
                return F.silu(input)

        model.time[2] = Silu()
    contexts: dict[str, Callable[[], Any]] = {
        "eager": lambda: imagen_fast.use_backend("eager"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "mode": lambda: _Looking(seen),
        "gradients": torch.enable_grad,
        "tangents": torch.autograd.forward_ad.dual_level,
    }
    handle = nn.modules.module.register_module_forward_hook(lambda *a: seen.append(1)) if how == "global" else None
    try:
        with torch.no_grad(), contexts.get(how, torch.no_grad)():
            for seed in range(4):
                model(**inputs(seed))
    finally:
        if handle is not None:
            handle.remove()
    assert replays_of(model).replayed == 0
    assert len(seen) >= 4 if how not in contexts or how == "mode" else not seen


class _Looking(TorchDispatchMode):
    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["class", "forward of a class"])
def test_another_class_or_forward_is_seen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    imagen_fast.accelerate(model)
    for seed in range(4):
        run(model, seed)
    calls: list[int] = []
    if how == "class":
        imagen_fast.restore(model.middle1)
    else:
        forward = nn.SiLU.forward
        monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: calls.append(1) or forward(self, x))
    assert torch.equal(run(model, 5), expected(model, 5))
    assert replays_of(model).replayed == 1
    assert bool(calls) == (how != "class")


def test_a_model_that_changes_at_every_call_is_not_watched_for_ever() -> None:
    model = build()
    imagen_fast.accelerate(model)
    for seed in range(20):
        model.norm_out.eps = 1e-5 * (seed + 1)
        assert torch.equal(run(model, seed), expected(model, seed))
    assert any("from call to call" in reason for reason in replays_of(model).reasons)
    imagen_fast.invalidate(model)
    for seed in range(4):
        run(model, seed)
    assert replays_of(model).replayed == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_make_records_of_their_own(copied: Callable[[UNet], UNet]) -> None:
    model = build()
    imagen_fast.accelerate(model)
    for seed in range(4):
        run(model, seed)
    other = copied(model)
    with torch.no_grad():
        other.conv_in.weight.mul_(2)
    assert len(replays_of(other)) == 0
    for seed in range(4):
        assert not torch.equal(run(other, seed), run(model, seed))
        assert torch.equal(run(other, seed), expected(other, seed))


def test_a_cascade_draws_the_same_pictures_as_without() -> None:
    model, plain = (imagen_fast.models.Imagen.from_pretrained("emoji") for _ in range(2))
    imagen_fast.accelerate(model)
    imagen_fast.accelerate(plain, graphs="off")
    for prompt in ("a cat", "一只猫"):
        found, wanted = (m.sample([prompt], steps=5, progress=False)[0] for m in (model, plain))
        assert found.tobytes() == wanted.tobytes()
    assert replays_of(model.unets["base"]).replayed > 3
