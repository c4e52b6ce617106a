"""The cases of whole models, in tiny sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import imagen_fast
from imagen_fast.bench import check, registry
from imagen_fast.bench.cases import model_cascade, model_if_pipeline, model_if_unet, model_if_xl
from imagen_fast.bench.models import model_case
from imagen_fast.bench.peers import prepare
from imagen_fast.bench.registry import Case

UNET = {
    **model_if_pipeline.UNET,
    "sample_size": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 2,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
}
TEXT = {**model_if_pipeline.TEXT, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def pipeline(noise: torch.dtype = torch.float32) -> model_if_pipeline.Pipeline:
    """With pictures of 8x8."""
    torch.manual_seed(0)
    return model_if_pipeline.Pipeline(noise, UNET, TEXT, steps=2).eval()


def cascade() -> model_cascade.Cascade:
    """With the fewest steps."""
    return model_cascade.Cascade((1, 1)).eval()


def tiny(module: Any, build: Callable[[], Any], **options: Any) -> Case:
    """The case of `module` in float32, with a batch of two and another model."""
    case = next(case for case in module.cases() if case.dtype == torch.float32)

    def two(generator: torch.Generator) -> dict[str, Any]:
        drawn = [case.inputs(generator, "cpu") for _ in range(2)]
        return {name: torch.cat([values[name] for values in drawn]) for name in case.renewed}

    return model_case(
        op=module.OP,
        name="tiny",
        title="tiny",
        build=build,
        inputs=two,
        shape=(2, 3, 8, 8),
        dtype=torch.float32,
        renewed=case.renewed,
        flops=1,
        moved=1,
        parts=module.PARTS,
        **options,
    )


@pytest.fixture(scope="module", params=[model_cascade, model_if_pipeline], ids=["cascade", "pipeline"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param is model_cascade:
        return tiny(model_cascade, cascade)
    pytest.importorskip("diffusers")
    return tiny(model_if_pipeline, pipeline, accelerate=lambda model: imagen_fast.accelerate(model.pipeline))


@pytest.fixture(scope="module")
def truth(case: Case) -> check.Truth:
    return check.truth(case, case.checked_inputs())


def test_the_truth_has_the_noise_of_the_case(truth: check.Truth) -> None:
    """Other noise would give another picture."""
    torch.testing.assert_close(truth.eager["output"].double(), truth.truth["output"], rtol=1e-3, atol=1e-4)


def test_ours_is_as_accurate(case: Case, truth: check.Truth) -> None:
    found = check.results(case, case.ours, case.checked_inputs())
    check.accuracy(case, found, truth)


def test_eager_computes_the_same(case: Case, truth: check.Truth) -> None:
    [prepared] = prepare(case, case.peer("eager"), case.checked_inputs(), truth).values()
    assert prepared.errors["output"] < 1e-4
    again = prepared.function(**case.make_inputs(1))
    assert not torch.equal(again, prepared.function(**case.make_inputs(0))), "new prompts and seeds"


def test_a_picture_does_not_depend_on_the_rest_of_its_batch(case: Case) -> None:
    values = case.make_inputs(0)
    both = case.eager(**values)
    second = case.eager(**{name: value[1:] for name, value in values.items()})
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [model_if_unet, model_if_xl], ids=["small", "IF-I-XL"])
def test_parameters_and_work_of_the_u_nets_of_if(module: Any) -> None:
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = module.UNet(module.CONFIG).eval()
        text = torch.empty(2, module.TOKENS, module.TEXT_WIDTH)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.empty(2, 3, module.SIZE, module.SIZE), torch.zeros(2, dtype=torch.long), text)
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(module.PARAMETERS, rel=2e-3)
    assert counter.get_total_flops() / 2 == pytest.approx(module.FLOPS_PER_SAMPLE, rel=0.1)


def test_if_i_xl_is_for_gpus_alone() -> None:
    for case in registry.load("model_if_xl"):
        assert "4.3 B parameters" in case.obstacle("cpu")
        assert not case.obstacle("cuda")
        assert {peer.name for peer in case.peers} == {"eager", "compile"}
