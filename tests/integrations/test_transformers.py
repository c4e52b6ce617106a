"""transformers' T5 family on the ops: the same features and gradients, the library's own features, and the way back."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.integrations import _packed
from imagen_fast.testing import assert_model_as_accurate

transformers = pytest.importorskip("transformers")

from .t5_models import (  # noqa: E402  # imports transformers
    FAMILIES,
    SENTENCES,
    SIZES,
    assert_close,
    batch,
    build,
    features,
    gradients,
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_features_are_as_accurate(family: str, attention: str, dtype: torch.dtype) -> None:
    model = build(family, attention).to(dtype)
    with torch.no_grad():
        eager, truth = features(model), features(copy.deepcopy(model).double())
        report = imagen_fast.accelerate(model)
        ours = features(model)
    assert {op for swapped in report.swapped for op in swapped.ops} == {"attention", "gated_gelu", "rms_norm"}
    assert not report.left
    kept = batch()["attention_mask"].bool()
    assert_model_as_accurate(ours[kept], eager[kept], truth[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_last_projection_may_stay_in_float32(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    with torch.no_grad():
        eager, truth = features(model), features(copy.deepcopy(model).double())
        imagen_fast.accelerate(model)
        ours = features(model)
    kept = batch()["attention_mask"].bool()
    assert_model_as_accurate(ours[kept], eager[kept], truth[kept])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_float16_is_clamped_as_it_was(family: str, with_gradients: bool) -> None:
    model = build(family, num_layers=2).half()
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(3000)
        model.encoder.block[0].layer[1].DenseReluDense.wi_1.weight.mul_(30)
    with torch.set_grad_enabled(with_gradients):
        eager = features(model)
        streams: list[Tensor] = []
        model.encoder.block[1].register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        imagen_fast.accelerate(model)
        ours = features(model)
    assert (streams[0].abs() > 6e4).any(), "nothing overflows: the test is void"
    assert streams[0].isfinite().all()
    kept = batch()["attention_mask"].bool()
    torch.testing.assert_close(ours[kept], eager[kept], rtol=0.05, atol=0.05)


def test_gradients_are_as_accurate(family: str) -> None:
    model = build(family)
    eager, truth = gradients(model), gradients(copy.deepcopy(model).double())
    imagen_fast.accelerate(model)
    assert_model_as_accurate(gradients(model), eager, truth)


def test_padding_does_not_reach_the_text(family: str) -> None:
    model = build(family)
    imagen_fast.accelerate(model)
    ids = batch()["input_ids"]
    length = len(SENTENCES[0]) + 1
    with torch.no_grad():
        padded = features(model)[0, :length]
        alone = model(input_ids=ids[:1, :length]).last_hidden_state[0]
    assert_close(padded, alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_after_restore_nothing_has_changed(family: str, attention: str, tmp_path: Path) -> None:
    model = build(family, attention)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = features(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        imagen_fast.accelerate(model)
        assert imagen_fast.accelerate(model).left == ()
        features(model)
        assert model.state_dict().keys() == state.keys()
        model.save_pretrained(tmp_path / "accelerated")
        imagen_fast.restore(model)
        imagen_fast.restore(model)
        after = features(model)
    model.save_pretrained(tmp_path / "restored")
    assert torch.equal(before, after)
    assert [type(module) for module in model.modules()] == classes
    assert model.encoder.config._attn_implementation == attention
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("accelerated", "restored")]
    assert saved[0] == saved[1]
    assert "imagen_fast" not in json.dumps(saved[0])


def test_copies_and_pickles_are_accelerated_and_can_be_restored(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        before = features(model)
        imagen_fast.accelerate(model)
        ours = features(model)
        for copied in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
            assert torch.equal(features(copied), ours)
            imagen_fast.restore(copied)
            assert torch.equal(features(copied), before)
        assert torch.equal(features(model), ours)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.fixture(params=["before", "after"])
def hooked(request: pytest.FixtureRequest, family: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The accelerated model and the plain one, with hooks on children that fused blocks read."""
    plain = build(family)
    model = copy.deepcopy(plain)
    if request.param == "after":
        imagen_fast.accelerate(model)
    for each in (plain, model):
        attention = each.encoder.block[0].layer[0].SelfAttention
        attention.relative_attention_bias.register_forward_hook(double)
        each.encoder.block[1].layer[1].DenseReluDense.act.register_forward_hook(double)
    if request.param == "before":
        notes = [note for swapped in imagen_fast.accelerate(model).swapped for note in swapped.notes]
        assert len(notes) == 2
        assert all("it has hooks" in note for note in notes)
    return model, plain


def test_hooks_on_children_work(hooked: tuple[nn.Module, nn.Module]) -> None:
    with torch.no_grad():
        ours, expected = map(features, hooked)
    kept = batch()["attention_mask"].bool()
    assert_close(ours[kept], expected[kept])


PARTS = (
    "layer.0",
    "layer.0.layer_norm",
    "layer.0.SelfAttention",
    "layer.0.SelfAttention.k",
    "layer.0.SelfAttention.o",
    "layer.0.dropout",
    "layer.1",
    "layer.1.layer_norm",
    "layer.1.DenseReluDense",
    "layer.1.DenseReluDense.wi_0",
    "layer.1.DenseReluDense.dropout",
    "layer.1.DenseReluDense.wo",
    "layer.1.dropout",
)


class Doubling(nn.Module):
    """An adapter around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Any:
        return self.layer.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self.layer(*args, **kwargs))


def doubled(output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("way", ["hook", "adapter"])
@pytest.mark.parametrize("part", PARTS)
def test_whatever_is_on_a_part_of_a_block_is_felt(part: str, way: str) -> None:
    def change(model: nn.Module) -> None:
        block = model.encoder.block[1]
        if way == "hook":
            block.get_submodule(part).register_forward_hook(lambda module, args, output: doubled(output))
        else:
            parent, _, name = part.rpartition(".")
            setattr(block.get_submodule(parent), name, Doubling(block.get_submodule(part)))

    plain = build("t5")
    before, after = copy.deepcopy(plain), copy.deepcopy(plain)
    kept = batch()["attention_mask"].bool()
    with torch.no_grad():
        unchanged = features(plain)[kept]
        imagen_fast.accelerate(after)
        features(after)
        for model in (plain, before, after):
            change(model)
        imagen_fast.accelerate(before)
        expected = features(plain)[kept]
        assert not torch.allclose(expected, unchanged, rtol=1e-2), "the change does nothing: the test is void"
        for model in (before, after):
            assert_close(features(model)[kept], expected)


CHANGES = {
    "in-place": lambda attention, dense: (attention.k.weight.mul_(-2.0), dense.wi_1.weight.mul_(-2.0)),
    "new-parameter": lambda attention, dense: setattr(dense.wo, "weight", nn.Parameter(-dense.wo.weight.detach())),
    "load": lambda attention, dense: attention.load_state_dict(
        {k: v.flip(0) for k, v in attention.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_never_stale(family: str, change: str) -> None:
    plain = build(family)
    model = copy.deepcopy(plain)
    kept = batch()["attention_mask"].bool()
    with torch.no_grad():
        imagen_fast.accelerate(model)
        before = features(model)[kept]
        for each in (plain, model):
            layers = each.encoder.block[1].layer
            CHANGES[change](layers[0].SelfAttention, layers[1].DenseReluDense)
        ours = features(model)[kept]
        assert not torch.allclose(ours, before, rtol=1e-2), "the change does nothing: the test is void"
        assert_close(ours, features(plain)[kept])


def test_products_are_joined_and_add_the_residual(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _packed._has_onednn(torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    model = build(family)
    report = imagen_fast.accelerate(model)
    with torch.no_grad(), torch.profiler.profile() as profile:
        features(model)
    products = [event.name for event in profile.events() if event.name == "mkldnn::_linear_pointwise"]
    assert len(products) == 4 * SIZES["num_layers"], "q, k and v; o; wi_0 and wi_1; wo"
    assert not [event for event in profile.events() if event.name in ("aten::linear", "aten::add")]
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("q.weight", "k.weight", "v.weight")))
    assert sum(copied.bytes for copied in report.copies) > 4 * weights


def test_attention_weights_and_hidden_states_can_be_had(family: str) -> None:
    model = build(family, "eager")
    asked = {**batch(), "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**asked)
        imagen_fast.accelerate(model)
        ours = model(**asked)
    assert len(ours.attentions) == len(expected.attentions) == SIZES["num_layers"]
    assert len(ours.hidden_states) == len(expected.hidden_states)
    kept = batch()["attention_mask"].bool()
    for a, b in zip(ours.hidden_states, expected.hidden_states, strict=True):
        assert_close(a[kept], b[kept])
    for a, b in zip(ours.attentions, expected.attentions, strict=True):
        assert_close(a, b)


def test_dropout_is_the_librarys(family: str) -> None:
    model = build(family, dropout_rate=0.3).train()
    torch.manual_seed(5)
    expected = features(model)
    imagen_fast.accelerate(model)
    torch.manual_seed(5)
    assert_close(features(model), expected)


def test_another_attention_can_be_chosen_later(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        expected = features(model)
        imagen_fast.accelerate(model)
        model.set_attn_implementation("eager")
        ours = features(model)
    kept = batch()["attention_mask"].bool()
    assert_close(ours[kept], expected[kept])


def test_the_configuration_stays_as_it_is(family: str) -> None:
    """transformers compares the attention's name: weights, for one, can be asked for with "eager" alone."""
    model = build(family, "eager")
    imagen_fast.accelerate(model)
    stacks = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    assert {stack.config._attn_implementation for stack in stacks} == {"eager"}
    for stack in stacks:
        stack.config.output_attentions = True
    with torch.no_grad():
        assert len(model(**batch()).attentions) == SIZES["num_layers"]


def test_heads_that_the_op_does_not_have_are_reported() -> None:
    model = build("t5", d_kv=12)
    with torch.no_grad():
        expected = features(model)
        report = imagen_fast.accelerate(model)
        assert_close(features(model), expected)
    assert any("12 wide" in note for swapped in report.swapped for note in swapped.notes)


def test_other_activations_are_called_as_they_are() -> None:
    model = build("t5", feed_forward_proj="gated-silu")
    with torch.no_grad():
        expected = features(model)
        report = imagen_fast.accelerate(model)
        assert_close(features(model), expected)
    assert any("is no GELU" in note for swapped in report.swapped for note in swapped.notes)


def test_a_decoder_keeps_its_attention() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu", num_decoder_layers=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    asked = {**batch(), "max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 0}
    expected = model.generate(**asked)
    imagen_fast.accelerate(model)
    assert torch.equal(model.generate(**asked), expected)


def test_verify_measures_every_block(family: str) -> None:
    model = build(family)
    report = imagen_fast.accelerate(model, verify=True)
    assert all(swapped.accuracy is not None for swapped in report.swapped if not swapped.name.endswith("SelfAttention"))
    assert "transformers" in str(report.class_name)


PEAK = """
import torch, transformers, imagen_fast

def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) << 10

sizes = {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 8, "vocab_size": 384}
config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")
model = transformers.T5EncoderModel(config).eval()
imagen_fast.accelerate(model)
with torch.no_grad():
    for length in (64, 2048):
        ids = torch.randint(3, 259, (2, length))
        model(input_ids=ids, attention_mask=(ids > 9).long())
        print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.skipif(
    imagen_fast.explain("attention", *[torch.zeros(1, 1, 1, 8)] * 3).backend != "cpu", reason="needs the cpu backend"
)
def test_the_peak_of_memory_does_not_grow_with_the_square_of_the_length() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    one_bias = 8 * 2048**2 * 4  # what transformers makes for all layers, and scores of that size for each sentence
    assert long - short < one_bias / 4


def test_it_compiles_to_one_graph() -> None:
    model = build("t5", num_layers=1)
    imagen_fast.accelerate(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        compiled = torch.compile(lambda ids: model(input_ids=ids).last_hidden_state, fullgraph=True)
        assert_close(compiled(ids), model(input_ids=ids).last_hidden_state)


def test_a_decoder_compiles_to_one_graph() -> None:
    """Dynamo gives up where a class's dictionary is read after dictionaries were written to."""
    torch.manual_seed(0)
    config = transformers.UMT5Config(**{**SIZES, "num_layers": 1}, feed_forward_proj="gated-gelu", num_decoder_layers=1)
    model = transformers.UMT5ForConditionalGeneration(config).eval()
    imagen_fast.accelerate(model)
    asked = {**batch(), "decoder_input_ids": batch()["input_ids"][:, :3]}
    with torch.no_grad():
        compiled = torch.compile(lambda **asked: model(**asked).logits, fullgraph=True, backend="eager")
        assert_close(compiled(**asked), model(**asked).logits)


def test_it_can_be_traced_by_torchscript(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        expected = features(model)
        imagen_fast.accelerate(model)
        traced = torch.jit.trace(model, tuple(batch().values()), strict=False)
        assert_close(traced(*batch().values())["last_hidden_state"], expected)


def test_replicas_run_on_their_own_weights(family: str) -> None:
    """`nn.DataParallel` copies the attributes of each module, and sets the weights of the copies."""
    model = build(family)
    imagen_fast.accelerate(model)
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else 1.5 * parameter.detach())
    other = copy.deepcopy(model)
    imagen_fast.restore(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        for _ in range(3):
            assert_close(features(replicas[model]), features(other))
            features(model)


def test_activations_are_recomputed_where_the_library_does(family: str) -> None:
    model = build(family).train()
    imagen_fast.accelerate(model)
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    forwards = []
    for block in model.encoder.block:
        recompute = block._gradient_checkpointing_func

        def counted(forward: Any, *args: Any, recompute: Any = recompute) -> Any:
            forwards.append(forward)
            return recompute(forward, *args)

        block._gradient_checkpointing_func = counted
    assert_close(gradients(model), expected)
    assert len(forwards) == SIZES["num_layers"]


@pytest.mark.parametrize("strict", [False, True])
def test_the_encoder_alone_can_be_exported(family: str, strict: bool) -> None:
    model = build(family, num_layers=1)
    with torch.no_grad():
        expected = features(model)
        imagen_fast.accelerate(model)
        exported = torch.export.export(model.get_encoder(), (), batch(), strict=strict)
        assert_close(exported.module()(**batch()).last_hidden_state, expected)


def test_functional_derivatives_are_the_librarys(family: str) -> None:
    plain = build(family, "eager")
    model = copy.deepcopy(plain)
    imagen_fast.accelerate(model)
    x = plain.get_input_embeddings()(batch()["input_ids"]).detach()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def derivatives(model: nn.Module) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return model(inputs_embeds=x).last_hidden_state

        gradient = torch.func.grad(lambda x: run(x).sin().sum())(x)
        return torch.stack((gradient, torch.func.jvp(run, (x,), (direction,))[1])).detach()

    torch.testing.assert_close(derivatives(model), derivatives(plain), rtol=1e-3, atol=1e-3)


OF_THE_BIAS: dict[str, Callable[[Any], Any]] = {
    "2 - b / 3": lambda b: 2 - b / 3,
    "b * b - 1": lambda b: b * b - 1,
    "2 * b": lambda b: 2 * b,
    "-b": lambda b: -b,
    "b @ b": lambda b: b @ b,
    "b ** 2": lambda b: b**2,
    "abs": abs,
    "b > 0": lambda b: b > 0,
    "b == b": lambda b: b == b,
    "len": lambda b: torch.tensor(len(b)),
    "iter": lambda b: next(iter(b)),
    "pickle": lambda b: pickle.loads(pickle.dumps(b)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("compute", OF_THE_BIAS.values(), ids=OF_THE_BIAS)
def test_hooks_compute_with_the_bias(compute: Callable[[Any], Any]) -> None:
    plain = build("t5", num_layers=1)
    model = copy.deepcopy(plain)
    imagen_fast.accelerate(model)
    computed: list[Tensor] = []
    with torch.no_grad():
        for each in (plain, model):
            each.encoder.block[0].register_forward_hook(
                lambda module, args, output: computed.append(compute(output[1]))
            )
            features(each, attention_mask=None)
    torch.testing.assert_close(computed[1], computed[0])
