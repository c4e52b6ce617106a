"""Models that `accelerate` records as CUDA graphs give what they give without them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast.integrations._graphed import GraphedForward
from imagen_fast.models import T5Encoder, UNet, UNetConfig
from imagen_fast.models.t5 import T5Config

from ..integrations.unet_configs import IF

WIDER = {
    "sample_size": 16,
    "norm_num_groups": 32,
    "block_out_channels": (64, 128),
    "attention_head_dim": 64,
    "addition_embed_type_num_heads": 8,
    "cross_attention_dim": 96,
    "encoder_hid_dim": 96,
    "time_embedding_act_fn": None,
}
T5_SIZES = {"vocab_size": 384, "d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 3, "num_heads": 2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


TEXTS = {seed: normal(2, 9, 96, seed=seed) for seed in range(2)} if torch.cuda.is_available() else {}


def unet_of_diffusers() -> tuple[Any, Callable[[int], Any]]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(**IF | WIDER)
    return model, lambda i: (normal(2, 3, 16, 16, seed=i), 100 * i, TEXTS[i // 4])


def unet_of_ours() -> tuple[Any, Callable[[int], Any]]:
    model = UNet(UNetConfig(channels=64, multipliers=(1, 2), blocks=1, attention_levels=(1,), text_dim=96))
    timesteps = torch.tensor([3, 70], device="cuda")
    return model, lambda i: (normal(2, 3, 16, 16, seed=i), timesteps * i, TEXTS[i // 4])


def tokens(i: int) -> tuple[Tensor, Tensor]:
    length = 9 + 3 * i
    ids = torch.randint(1, 384, (2, length), generator=torch.Generator().manual_seed(i))
    return ids.cuda(), (torch.arange(length) < torch.tensor([[length], [5]])).long().cuda()


def t5_of_ours() -> tuple[Any, Callable[[int], Any]]:
    return T5Encoder(T5Config(**T5_SIZES)), tokens


def t5_of_transformers() -> tuple[Any, Callable[[int], Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(config), tokens


MODELS = [unet_of_diffusers, unet_of_ours, t5_of_ours, t5_of_transformers]


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_replays_are_the_model(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, arguments = build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = model.to("cuda", torch.bfloat16).eval()
    calls = [arguments(i) for i in range(7)]
    with torch.no_grad():
        imagen_fast.accelerate(model, graphs="off")
        plain = [first(model(*call)) for call in calls]
        report = imagen_fast.accelerate(model)
        ours = [first(model(*call)) for call in calls]
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    assert forward.pool is not None
    assert forward.pool.reasons == []
    assert (forward.pool.recorded, forward.pool.replayed) == (1, 6)
    assert "recorded at its second call" in report.graphs
    for found, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())

    with torch.no_grad():  # a change is seen, and threads with streams of their own take turns
        next(model.parameters()).mul_(1.5)
        expected = [first(type(model).forward(model, *call)) for call in calls]
        found: dict[int, Tensor] = {}

        def work(start: int) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for i in range(start, 7, 2):
                    found[i] = first(model(*calls[i]))
                torch.cuda.current_stream().synchronize()

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, wanted in enumerate(expected):
        torch.testing.assert_close(found[i], wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
