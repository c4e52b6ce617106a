"""Graphs of other libraries' models: a prompt that changes, adapters, texts of many lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast.integrations._graphed import GraphedForward
from imagen_fast.integrations._graphs import GraphPool
from imagen_fast.models import T5Encoder
from imagen_fast.models.t5 import T5Config

from .recorder import OperatorRecorder, recording_here
from .unet_configs import IF


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> OperatorRecorder:
    return recording_here(monkeypatch)


def pool_of(model: Any) -> GraphPool:
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    assert forward.pool is not None
    return forward.pool


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- U-Nets of diffusers


def build_unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**IF).eval()


def denoise(unet: Any, text: Tensor, step: int) -> Tensor:
    with torch.no_grad():
        return unet(normal(2, 3, 8, 8, seed=step), 7 * step, encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "bf16"])
def test_a_prompt_is_projected_once_beside_the_graph(recorder: OperatorRecorder, dtype: Any) -> None:
    ours, plain = build_unet(), build_unet()
    imagen_fast.accelerate(ours, dtype=dtype)
    imagen_fast.accelerate(plain, dtype=dtype, graphs="off")
    text = normal(2, 5, 24, seed=100)
    for step in range(3):
        assert torch.equal(denoise(ours, text, step), denoise(plain, text, step))
    (graph,) = pool_of(ours)._records.values()
    assert len(graph.once._made) >= 4  # the projection, the pooling, and two blocks' keys and values
    made = [result for _, result in graph.once._made.values() if isinstance(result, Tensor)]
    versions = [tensor._version for tensor in made]
    denoise(ours, text, 3)
    assert [tensor._version for tensor in made] == versions
    for other in (normal(2, 5, 24, seed=101), text, text.mul_(0.5)):  # another, the first again, written to
        assert torch.equal(denoise(ours, other, 4), denoise(plain, other, 4))
        assert torch.equal(denoise(ours, other, 5), denoise(plain, other, 5))
    assert [tensor._version for tensor in made] != versions
    assert pool_of(ours).recorded == 1


def test_the_scale_of_an_adapter_is_seen(recorder: OperatorRecorder) -> None:
    lora = pytest.importorskip("peft", reason="the peft that fits needs Python 3.11")
    ours, plain = build_unet(), build_unet()
    text = normal(2, 5, 24, seed=100)
    for unet in (ours, plain):
        torch.manual_seed(1)
        config = lora.LoraConfig(r=2, target_modules=["to_q", "add_k_proj"], init_lora_weights=False)
        unet.add_adapter(config)
    imagen_fast.accelerate(ours)
    imagen_fast.accelerate(plain, graphs="off")
    for step in range(3):
        assert torch.equal(denoise(ours, text, step), denoise(plain, text, step))
    before = denoise(ours, text, 3)
    for unet in (ours, plain):
        unet.set_adapters("default", 0.3)
    for step in (3, 4, 5):
        assert torch.equal(denoise(ours, text, step), denoise(plain, text, step))
    assert not torch.equal(denoise(ours, text, 3), before)
    assert pool_of(ours).recorded == 2


def test_the_scale_of_an_adapter_in_a_call_is_recorded_with_it(recorder: OperatorRecorder) -> None:
    lora = pytest.importorskip("peft", reason="the peft that fits needs Python 3.11")
    ours, plain = build_unet(), build_unet()
    for unet in (ours, plain):
        torch.manual_seed(1)
        unet.add_adapter(lora.LoraConfig(r=2, target_modules=["to_q", "add_k_proj"], init_lora_weights=False))
    imagen_fast.accelerate(ours)
    imagen_fast.accelerate(plain, graphs="off")
    for step in range(6):
        text = normal(2, 5, 24, seed=100 + step // 4)
        given = (normal(2, 3, 8, 8, seed=step), 7 * step, text)
        with torch.no_grad():
            found, wanted = (unet(*given, cross_attention_kwargs={"scale": 0.3}).sample for unet in (ours, plain))
        assert torch.equal(found, wanted)
    assert (pool_of(ours).recorded, pool_of(ours).replayed) == (1, 5)
    (graph,) = pool_of(ours)._records.values()
    assert not graph.once.roots


# ---- Text encoders


def reference_t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5Encoder(config).eval()


def transformers_t5(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = getattr(transformers, f"{name}Config")(**sizes, feed_forward_proj="gated-gelu")
    return getattr(transformers, f"{name}EncoderModel")(config).eval()


ENCODERS = {
    "reference": reference_t5,
    "t5": lambda: transformers_t5("T5"),
    "umt5": lambda: transformers_t5("UMT5"),
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_texts_of_many_lengths_share_a_graph(recorder: OperatorRecorder, encoder: str) -> None:
    recorder.refused = set()  # whether a sentence is empty is read on the CPU
    ours, plain = ENCODERS[encoder](), ENCODERS[encoder]()
    imagen_fast.accelerate(ours)
    imagen_fast.accelerate(plain, graphs="off")
    for length in (9, 30, 17, 32, 1):
        ids = torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.arange(length) < torch.tensor([[length], [1 + length // 2]])
        for given in ({"input_ids": ids, "attention_mask": mask.long()}, {"input_ids": ids}):
            with torch.no_grad():
                found, wanted = (model(**given) for model in (ours, plain))
            found, wanted = (x if isinstance(x, Tensor) else x.last_hidden_state for x in (found, wanted))
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    pool = pool_of(ours)
    assert pool.reasons == []
    assert (pool.recorded, pool.replayed) == (1, 9)


def test_texts_without_tokens_are_not_padded(recorder: OperatorRecorder) -> None:
    recorder.refused = set()
    ours, plain = reference_t5(), reference_t5()
    imagen_fast.accelerate(ours)
    imagen_fast.accelerate(plain, graphs="off")
    ids, mask = torch.arange(1, 19).view(2, 9), torch.tensor([[1] * 9, [0] * 9])
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(ours(ids, mask), plain(ids, mask))
    assert pool_of(ours).recorded == 0
    assert pool_of(ours).reasons == ["a text has no token to attend to"]
