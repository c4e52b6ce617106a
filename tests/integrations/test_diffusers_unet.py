"""diffusers' U-Nets on the ops: DeepFloyd IF's and Stable Diffusion's kinds of blocks, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.integrations import FusedMethod
from imagen_fast.testing import assert_as_accurate, assert_model_as_accurate

from .unet_configs import IF, SD

diffusers = pytest.importorskip("diffusers", reason="the diffusers that fits needs Python 3.11")

BLOCKS = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": (32, 64)}

IF_BASE = {**IF, **BLOCKS}
IF_SUPER_RESOLUTION = {
    **IF_BASE,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "mid_block_only_cross_attention": True,
    "only_cross_attention": True,
    "resnet_out_scale_factor": 1.414,
    "resnet_skip_time_act": True,
}
STABLE_DIFFUSION = {**SD, **BLOCKS, "in_channels": 4, "out_channels": 4}
KINDS = {"if": IF_BASE, "if-sr": IF_SUPER_RESOLUTION, "sd": STABLE_DIFFUSION}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**KINDS[kind]).eval()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(kind: str, dtype: torch.dtype = torch.float32, size: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    values: dict[str, Any] = {
        "sample": torch.randn(2, KINDS[kind]["in_channels"], size, size, generator=generator).to(dtype),
        "timestep": torch.tensor([10, 800]),
        "encoder_hidden_states": torch.randn(2, 9, 24, generator=generator).to(dtype),
    }
    if kind == "if-sr":
        values["class_labels"] = torch.tensor([5, 250])
    return values


def run(model: nn.Module, kind: str, **changes: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(**{**inputs(kind, dtype), **changes}).sample


def widened(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_as_accurate(kind: str, dtype: torch.dtype, channels_last: bool) -> None:
    model = build(kind).to(dtype)
    values = inputs(kind, dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        values["sample"] = values["sample"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**widened(values)).sample
        eager = model(**values).sample
        report = imagen_fast.accelerate(model)
        ours = model(**values).sample
    assert {op for swapped in report.swapped for op in swapped.ops} >= {"group_norm_act", "attention"}
    assert not any(swapped.notes for swapped in report.swapped)
    assert_model_as_accurate(ours, eager, truth)


def test_gradients_are_as_accurate(kind: str) -> None:
    def gradients(model: nn.Module) -> Tensor:
        """All of them in one vector. (One alone may have none but round-off: a key's bias changes nothing.)"""
        values = inputs(kind, next(model.parameters()).dtype)
        shape = (2, model.config.out_channels, 16, 16)
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(values["sample"].dtype)
        (model(**values).sample * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model = build(kind)
    eager, truth = gradients(copy.deepcopy(model)), gradients(copy.deepcopy(model).double())
    imagen_fast.accelerate(model)
    assert_model_as_accurate(gradients(model), eager, truth)


def test_after_restore_nothing_has_changed(kind: str) -> None:
    model = build(kind)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = run(model, kind)
        keys, processors = list(model.state_dict()), {k: type(v) for k, v in model.attn_processors.items()}
        imagen_fast.accelerate(model)
        run(model, kind)
        assert list(model.state_dict()) == keys
        assert {k: type(v) for k, v in model.attn_processors.items()} == processors
        imagen_fast.restore(model)
        assert torch.equal(run(model, kind), before)
    assert [type(module) for module in model.modules()] == classes


def test_copies_and_pickles_are_accelerated_and_can_be_restored(kind: str) -> None:
    model = build(kind)
    with torch.no_grad():
        before = run(model, kind)
        imagen_fast.accelerate(model)
        ours = run(model, kind)
        for copied in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
            assert torch.equal(run(copied, kind), ours)
            imagen_fast.restore(copied)
            assert torch.equal(run(copied, kind), before)


def first(model: nn.Module, cls: type[nn.Module]) -> Any:
    return next(module for module in model.modules() if isinstance(module, cls))


def hook_norm(model: nn.Module) -> None:
    norm = first(model, diffusers.models.resnet.ResnetBlock2D).norm1
    norm.register_forward_hook(lambda module, args, output: output * 1.5)


def hook_attention_norm(model: nn.Module) -> None:
    norm = first(model, nn.GroupNorm)
    norm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def hook_query(model: nn.Module) -> None:
    attention = first(model, diffusers.models.attention_processor.Attention)
    attention.to_q.register_forward_hook(lambda module, args, output: output * 1.5)


def double_activation(model: nn.Module) -> None:
    block = first(model, diffusers.models.resnet.ResnetBlock2D)
    block.nonlinearity.register_forward_hook(lambda module, args, output: output * 2)


def slice_attention(model: nn.Module) -> None:
    model.set_attention_slice(1)


def scale_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "change", [hook_norm, hook_attention_norm, hook_query, double_activation, slice_attention, scale_weights]
)
def test_what_is_changed_before_or_after_works(kind: str, change: Callable[[nn.Module], None], order: str) -> None:
    plain = build(kind)
    model = copy.deepcopy(plain)
    change(plain)
    if order == "after":
        imagen_fast.accelerate(model)
    change(model)
    if order == "before":
        imagen_fast.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model, kind), run(plain, kind), rtol=1e-4, atol=1e-4)


def test_masks_reach_the_attention() -> None:
    model = build("sd")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 9])
    with torch.no_grad():
        expected = run(model, "sd", encoder_attention_mask=mask)
        imagen_fast.accelerate(model)
        torch.testing.assert_close(run(model, "sd", encoder_attention_mask=mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["self", "added keys"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_masks_that_are_not_of_the_dtype_do_what_they_did(form: str, dtype: torch.dtype) -> None:
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    torch.manual_seed(0)
    added = {"added_kv_proj_dim": 24, "norm_num_groups": 8, "bias": True, "processor": AttnAddedKVProcessor2_0()}
    block = Attention(32, heads=4, dim_head=8, **(added if form == "added keys" else {})).eval()
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    x: tuple[Tensor, ...] = (torch.randn(2, 7, 32), None)
    if form == "added keys":
        x, mask = (torch.randn(2, 32, 2, 2), torch.randn(2, 3, 24)), mask[:, None, 4:]
    holder = diffusers.UNet2DConditionModel(**STABLE_DIFFUSION)
    holder.extra = block
    plain = copy.deepcopy(block)
    imagen_fast.accelerate(holder)
    results: list[Any] = []
    for attention in (plain, holder.extra):
        try:
            with torch.no_grad():
                results.append(attention(*x, mask.to(dtype)))
        except RuntimeError as error:
            results.append(str(error))
    if dtype == torch.bool:
        torch.testing.assert_close(*results)
    else:
        assert results[0] == results[1]


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
@pytest.mark.parametrize("resample", ["none", "up", "down", "fir"])
@pytest.mark.parametrize("activation", ["swish", "gelu", "mish"])
def test_every_form_of_residual_block(norm: str, resample: str, activation: str) -> None:
    torch.manual_seed(0)
    block = diffusers.models.resnet.ResnetBlock2D(
        in_channels=24,
        out_channels=40,
        temb_channels=16,
        groups=8,
        non_linearity=activation,
        time_embedding_norm=norm,
        up=resample in ("up", "fir"),
        down=resample == "down",
        kernel="fir" if resample == "fir" else None,
        output_scale_factor=1.4,
    ).eval()
    holder = diffusers.UNet2DConditionModel(**STABLE_DIFFUSION)
    holder.extra = block
    x, temb = torch.randn(2, 24, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        expected = block(x, temb)
        truth = copy.deepcopy(block).double()(x.double(), temb.double())
        imagen_fast.accelerate(holder)
        assert type(block).__name__ == "FusedResnetBlock2D"
        assert_as_accurate(block(x, temb), expected, truth)


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_a_residual_block_without_a_projection_of_time(norm: str) -> None:
    torch.manual_seed(0)
    block = diffusers.models.resnet.ResnetBlock2D(
        in_channels=24, temb_channels=None, groups=8, time_embedding_norm=norm
    ).eval()
    holder = diffusers.UNet2DConditionModel(**STABLE_DIFFUSION)
    holder.extra = block
    x, temb = torch.randn(2, 24, 8, 8), torch.randn(2, 24 if norm == "default" else 48, 1, 1)
    with torch.no_grad():
        expected = block(x, temb)
        imagen_fast.accelerate(holder)
        torch.testing.assert_close(block(x, temb), expected, rtol=1e-4, atol=1e-4)


def test_verify_measures_every_block(kind: str) -> None:
    model = build(kind)
    report = imagen_fast.accelerate(model, verify=True)
    assert all(swapped.accuracy is not None for swapped in report.swapped)


def test_a_saved_config_does_not_change(kind: str, tmp_path: Any) -> None:
    model = build(kind)
    model.save_config(tmp_path / "before")
    imagen_fast.accelerate(model)
    model.save_config(tmp_path / "after")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("before", "after")]
    assert texts[0] == texts[1]


# ---- What libraries and their users do to a model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["layerwise-casting", "group-offloading", "closure"])
def test_forwards_that_somebody_has_kept_work_after_restore(kind: str, how: str, when: str) -> None:
    def change(model: Any) -> None:
        if how == "layerwise-casting":
            model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        elif how == "group-offloading":
            from diffusers.hooks import apply_group_offloading

            cpu = torch.device("cpu")
            apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        else:
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d | diffusers.models.resnet.ResnetBlock2D):
                    module.forward = lambda *args, kept=module.forward, **kwargs: kept(*args, **kwargs)

    model, plain = build(kind), build(kind)
    if when == "before":
        change(model)
    imagen_fast.accelerate(model)
    if when == "after":
        change(model)
    change(plain)
    with torch.no_grad():
        expected = plain(**inputs(kind)).sample
        for _ in range(3):
            torch.testing.assert_close(model(**inputs(kind)).sample, expected, rtol=1e-3, atol=1e-3)
        imagen_fast.restore(model)
        assert torch.equal(model(**inputs(kind)).sample, expected)


def test_old_processors_scale_by_what_the_block_says(kind: str) -> None:
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor

    results = []
    for accelerated in (False, True):
        model: Any = build(kind)
        model.set_attn_processor(AttnProcessor() if kind == "sd" else AttnAddedKVProcessor())
        if accelerated:
            imagen_fast.accelerate(model)
        for module in model.modules():
            if isinstance(module, Attention):
                module.scale *= 2
        with torch.no_grad():
            results.append(run(model, kind))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def halve_scores(model: Any) -> None:
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor

    added = any(getattr(module, "add_k_proj", None) is not None for module in model.modules())
    model.set_attn_processor(AttnAddedKVProcessor() if added else AttnProcessor())
    for module in model.modules():
        if isinstance(module, Attention):
            module.get_attention_scores = lambda *args, kept=module.get_attention_scores: 0.5 * kept(*args)


def rectify_gates(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, diffusers.models.activations.GEGLU):
            module.gelu = torch.relu


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "change"), [("sd", halve_scores), ("sd", rectify_gates)])
def test_methods_of_blocks_that_somebody_has_replaced_are_called(kind: str, change: Any, when: str) -> None:
    plain, model = build(kind), build(kind)
    with torch.no_grad():
        before = run(plain, kind)
        change(plain)
        expected = run(plain, kind)
        assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
        if when == "after":
            imagen_fast.accelerate(model)
            run(model, kind)
        change(model)
        report = imagen_fast.accelerate(model)
        torch.testing.assert_close(run(model, kind), expected, rtol=1e-4, atol=1e-4)
    assert any("is replaced" in note for swapped in report.swapped for note in swapped.notes)


LABELS: dict[str, dict[str, Any]] = {
    "projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
    "simple": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    "identity": {"class_embed_type": "identity"},
    "one class": {"num_class_embeds": 1},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_verify_has_labels_of_every_kind(labels: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**{**IF_BASE, **labels})
    report = imagen_fast.accelerate(model, verify=True)
    assert all(swapped.accuracy is not None for swapped in report.swapped if swapped.ops)


def test_verify_says_that_it_needs_inputs() -> None:
    torch.manual_seed(0)
    sizes = {"addition_embed_type": "text_image", "addition_embed_type_num_heads": 4, "encoder_hid_dim": None}
    model = diffusers.UNet2DConditionModel(**{**IF_BASE, **sizes})
    with pytest.raises(ValueError, match=r"no inputs for .*'text_image'; give the arguments"):
        imagen_fast.accelerate(model, verify=True)


def test_sizes_of_pictures_stay_in_float32() -> None:
    """Beside weights in 16 bits they are embedded as times are."""
    torch.manual_seed(0)
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    model = diffusers.UNet2DConditionModel(
        **{**STABLE_DIFFUSION, **sizes, "projection_class_embeddings_input_dim": 8 * 6 + 16}
    ).eval()
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.tensor([[1023.0, 777, 3, 5, 1021, 515]]).expand(2, 6)}
    given = {**inputs("sd"), "added_cond_kwargs": added}
    half = copy.deepcopy(model).bfloat16()
    cast = {
        key: value.bfloat16() if key in ("sample", "encoder_hidden_states") else value for key, value in given.items()
    }
    cast["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"].bfloat16()}
    wide = widened(given)
    wide["added_cond_kwargs"] = {key: value.double() for key, value in added.items()}
    with torch.no_grad():
        truth, eager = copy.deepcopy(model).double()(**wide).sample, half(**cast).sample
        imagen_fast.accelerate(model, dtype=torch.bfloat16)
        ours = model(**given).sample
        assert_model_as_accurate(ours, eager.float(), truth)
        first = (given["sample"], given["timestep"], given["encoder_hidden_states"])
        assert torch.equal(model(*first, None, None, None, None, added).sample, ours)


def test_replicas_leave_a_model_with_hooks_as_it_is(kind: str) -> None:
    """They share the registry of diffusers' hooks with the model that they are copies of."""
    from diffusers.hooks import HookRegistry, ModelHook

    model: Any = build(kind)
    imagen_fast.accelerate(model)
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "nothing")
    (held,) = model._diffusers_hook._fn_refs
    assert isinstance(held.forward, FusedMethod)
    with torch.no_grad():
        expected = model(**inputs(kind)).sample
        replicas = [module._replicate_for_data_parallel() for module in model.modules()]
        assert torch.equal(model(**inputs(kind)).sample, expected)
    assert isinstance(held.forward, FusedMethod)
    assert not any(isinstance(value, FusedMethod) for replica in replicas for value in vars(replica).values())


def test_what_hooks_of_diffusers_hold_changes_form_with_the_module(kind: str) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    model, plain = (build(kind) for _ in range(2))
    with torch.no_grad():
        expected = plain(**inputs(kind)).sample
    block: Any = first(model, diffusers.models.resnet.ResnetBlock2D)
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "nothing")
    imagen_fast.accelerate(model, dtype=torch.bfloat16)
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "nothing")
    (of_block,), (of_model,) = block._diffusers_hook._fn_refs, model._diffusers_hook._fn_refs
    assert of_block.forward.__func__ is type(block).forward
    with torch.no_grad():
        assert not torch.equal(model(**inputs(kind)).sample, expected)
        imagen_fast.restore(model)
        assert torch.equal(model(**inputs(kind)).sample, expected)
    assert of_block.forward.__func__ is type(block).forward
    assert not isinstance(of_model.forward, FusedMethod)
