"""The T5 encoder on the ops: as accurate as it was, whatever is done to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast import ops, testing
from imagen_fast.integrations import take_form
from imagen_fast.models import T5Config, T5Encoder
from imagen_fast.models.t5.layers import T5Attention, T5Block, T5RMSNorm
from imagen_fast.reference.attention import RelativePositionBias


def encoder(seed: int = 0, **sizes: Any) -> T5Encoder:
    torch.manual_seed(seed)
    model = T5Encoder(T5Config(**({"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 4} | sizes)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif "relative_bias" in name:
                p.copy_(torch.randn_like(p))
    return model.eval()


def tokens(model: T5Encoder, length: int = 29) -> dict[str, Tensor]:
    """Three sentences: whole, short, and padding alone."""
    ids = torch.randint(model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.arange(length) < torch.tensor([[length], [11], [0]])}


def results(model: T5Encoder, with_gradients: bool = True) -> dict[str, Tensor]:
    y = model(**tokens(model))
    if not with_gradients:
        return {"output": y.detach()}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, list(model.parameters()), weights)
    return {"output": y.detach()} | {
        f"gradient of {name}": gradient for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
    }


FORMS = {
    "v1.1": {},
    "umt5": {"bias_per_layer": True},
    "exact-gelu": {"feed_forward_proj": "gated-gelu_new"},
    "original": {"feed_forward_proj": "relu"},
    "heads-of-20": {"d_kv": 20},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_as_accurate_as_eager(form: str, dtype: torch.dtype) -> None:
    model = encoder(**FORMS[form]).to(torch.bfloat16).to(dtype)
    eager, truth = results(model), results(copy.deepcopy(model).double())
    imagen_fast.accelerate(model)
    for name, result in results(model).items():
        testing.assert_model_as_accurate(result, eager[name], truth[name], name=name)


@pytest.mark.parametrize("keep_wo", [False, True], ids=["all-fp16", "wo-in-fp32"])
def test_float16(keep_wo: bool) -> None:
    model = encoder().half()
    if keep_wo:
        for block in model.blocks:
            block.ffn.wo.float()
    eager, truth = results(model, False)["output"], results(copy.deepcopy(model).double(), False)["output"]
    imagen_fast.accelerate(model)
    testing.assert_model_as_accurate(results(model, False)["output"], eager, truth)


def test_float16_is_clamped_as_it_was() -> None:
    model = encoder(num_layers=2).half()
    with torch.no_grad():
        model.blocks[0].ffn.wo.weight.mul_(3000)
        model.blocks[0].ffn.wi_1.weight.mul_(30)
    eager = model(**tokens(model))
    streams: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, result: streams.append(result[0]))
    imagen_fast.accelerate(model)
    ours = model(**tokens(model))
    assert streams[0].isfinite().all()
    assert (streams[0].abs() > 6e4).any(), "nothing overflows: the test is void"
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.05)


def test_every_module_runs_on_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = encoder(), []
    imagen_fast.accelerate(model, strict=True)
    for name in ("attention", "rms_norm", "gated_gelu"):
        op = getattr(ops, name)

        def counted(*args: Any, op: Any = op, name: str = name, **kwargs: Any) -> Any:
            called.append(name)
            assert name != "attention" or isinstance(kwargs["bias"], RelativePositionBias)
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    model(**tokens(model))
    assert called == [*["rms_norm", "attention", "rms_norm", "gated_gelu"] * 3, "rms_norm"]


def test_restored_model_is_bit_identical() -> None:
    model = encoder()
    before, classes = model(**tokens(model)), [type(module) for module in model.modules()]
    assert imagen_fast.accelerate(model).left == ()
    assert type(model) is T5Encoder
    model(**tokens(model))
    imagen_fast.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**tokens(model)), before)


def test_verify_reaches_every_module() -> None:
    report = imagen_fast.accelerate(encoder(), verify=True)
    assert all(entry.accuracy is not None and not entry.notes for entry in report.swapped)
    assert sum(bool(entry.ops) for entry in report.swapped) == 3 * 5 + 1


def test_without_a_mask() -> None:
    model = encoder()
    ids = tokens(model)["input_ids"]
    expected = model(ids)
    imagen_fast.accelerate(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def test_in_training_dropout_drops_as_it_did() -> None:
    model = encoder().train()
    torch.manual_seed(3)
    expected = model(**tokens(model))
    imagen_fast.accelerate(model)
    torch.manual_seed(3)
    torch.testing.assert_close(model(**tokens(model)), expected, rtol=1e-4, atol=1e-4)


class Negating(T5Attention):
    def forward(self, x: Tensor, bias: Any, key_mask: Tensor | None = None) -> Tensor:
        return -super().forward(x, bias, key_mask)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, y: 2 * y)


CHANGES = {
    "hook-on-norm": lambda model: _hook(model.blocks[1].ffn_norm),
    "hook-on-first-norm": lambda model: _hook(model.blocks[0].attention_norm),
    "hook-on-table": lambda model: _hook(model.blocks[0].attention.relative_bias),
    "hook-on-projection": lambda model: _hook(model.blocks[1].attention.k),
    "hook-on-attention": lambda model: _hook(model.blocks[2].attention),
    "other-attention": lambda model: setattr(model.blocks[1].attention, "__class__", Negating),
    "other-activation": lambda model: setattr(model.blocks[1].ffn, "activation", torch.relu),
    "other-eps": lambda model: setattr(model.blocks[1].ffn_norm, "eps", 0.5),
    "new-weight": lambda model: setattr(model.blocks[1].ffn_norm, "weight", nn.Parameter(torch.full((48,), 3.0))),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_count_before_and_after(change: str) -> None:
    plain, before, after = encoder(), encoder(), encoder()
    unchanged = results(plain)["output"]
    imagen_fast.accelerate(after)
    results(after)
    for model in (plain, before, after):
        CHANGES[change](model)
    imagen_fast.accelerate(before)
    expected = results(plain)
    assert not torch.allclose(expected["output"], unchanged, rtol=1e-2), "the change does nothing: the test is void"
    for model in (before, after):
        for name, result in results(model).items():
            torch.testing.assert_close(result, expected[name], rtol=1e-3, atol=1e-3)
        if change == "other-attention":
            model.blocks[1].attention.__class__ = T5Attention
            continue
        imagen_fast.restore(model)
        assert torch.equal(results(model)["output"], expected["output"])


def test_a_block_alone_in_its_original_form_takes_what_fused_ones_pass_on() -> None:
    model = encoder()
    expected = model(**tokens(model))
    imagen_fast.accelerate(model)
    take_form(model.blocks[1], T5Block)
    take_form(model.blocks[1].attention, T5Attention)
    take_form(model.blocks[1].ffn_norm, T5RMSNorm)
    torch.testing.assert_close(model(**tokens(model)), expected, rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    model = encoder()
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(**tokens(model))
        truth = copy.deepcopy(model).double()(**tokens(model))
        imagen_fast.accelerate(model)
        testing.assert_model_as_accurate(model(**tokens(model)), eager, truth)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    model = encoder(num_layers=2)
    imagen_fast.accelerate(model)
    with torch.no_grad():
        expected = model(**tokens(model))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**tokens(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    imagen_fast.explain("attention", *[torch.zeros(1, 1, 1, 8)] * 3).backend != "cpu", reason="needs the cpu backend"
)
def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    model = encoder(num_layers=1, num_heads=8)
    imagen_fast.accelerate(model)
    ids = torch.zeros(1, 2048, dtype=torch.int64)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model(ids)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2048 * 2048, "as much as one head's scores in a byte each"
