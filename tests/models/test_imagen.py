"""The cascade: seeds, prompts, guidance, checkpoints, and errors before any work."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import imagen_fast
from imagen_fast.diffusion import DynamicThreshold, Noise
from imagen_fast.errors import CheckpointError, OutputError
from imagen_fast.models import EfficientUNetConfig, Imagen, ImagenConfig, T5Config, T5Encoder


def sample(model, prompts, **kwargs) -> np.ndarray:
    """(B, H, W, 3) as signed integers, so that differences do not wrap."""
    return np.stack([np.array(p) for p in model.sample(prompts, progress=False, **kwargs)]).astype(int)


def test_a_picture_per_prompt(imagen):
    pictures = imagen.sample(["a cat", "一只猫"], progress=False)
    assert [p.size for p in pictures] == [(16, 16)] * 2
    assert [p.mode for p in pictures] == ["RGB"] * 2
    assert imagen.sample([], progress=False) == []


def test_the_seed_fixes_the_picture(imagen):
    first = sample(imagen, ["a cat"], seed=3)
    assert (first == sample(imagen, ["a cat"], seed=3)).all()
    assert (first != sample(imagen, ["a cat"], seed=4)).any()


def test_numbers_of_numpy_are_numbers(imagen):
    given = {"seed": np.int64(3), "steps": np.int64(2), "guidance": np.float32(2)}
    assert np.array_equal(sample(imagen, "a cat", **given), sample(imagen, "a cat", seed=3, steps=2, guidance=2.0))


def test_the_seed_fixes_the_picture_of_a_model_in_training(imagen):
    config = dataclasses.replace(imagen.text_encoder.config, dropout_rate=0.5)
    model = Imagen(imagen.config, T5Encoder(config))
    model.load_state_dict(imagen.state_dict())
    model.unets.eval()
    assert (sample(model, ["a cat"], seed=3) == sample(imagen, ["a cat"], seed=3)).all()
    assert model.text_encoder.dropout.training
    assert not model.unets["base"].training


def test_a_picture_is_the_same_alone_or_in_a_batch(imagen):
    prompts = ["a cat", "一只可爱的猫咪", ""]
    together = sample(imagen, prompts, seed=5)
    for b, prompt in enumerate(prompts):
        assert abs(sample(imagen, [prompt], seed=5 + b)[0] - together[b]).max() <= 1
    assert abs(sample(imagen, prompts[::-1], seed=[7, 6, 5])[::-1] - together).max() <= 1


def test_the_text_and_guidance_matter(imagen):
    cat = sample(imagen, ["a cat"])
    assert (cat != sample(imagen, ["a dog"])).any()
    assert (cat != sample(imagen, ["a cat"], guidance=5.0)).any()


def test_an_empty_prompt_is_unconditional_whatever_the_guidance(imagen):
    empty = sample(imagen, [""], guidance=1.0)
    assert abs(empty - sample(imagen, ["   "], guidance=4.0)).max() <= 1


def test_steps_solver_and_until(imagen):
    assert (sample(imagen, ["a cat"], solver="ddim") != sample(imagen, ["a cat"], solver="ddpm")).any()
    assert (sample(imagen, ["a cat"], steps=[2, 1]) != sample(imagen, ["a cat"], steps=[3, 1])).any()
    assert imagen.sample("a cat", progress=False, until="base")[0].size == (8, 8)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm"])
def test_every_solver_gives_a_prompt_the_same_picture_alone_and_in_a_batch(imagen, solver):
    together = sample(imagen, ["a cat", "a dog"], seed=5, steps=4, solver=solver)
    alone = sample(imagen, ["a dog"], seed=6, steps=4, solver=solver)
    assert abs(alone[0] - together[1]).max() <= 1
    assert (together != sample(imagen, ["a cat", "a dog"], seed=7, steps=4, solver=solver)).any()


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm"])
def test_the_kernel_and_plain_pytorch_draw_the_same_picture(imagen, solver):
    with imagen_fast.use_backend("eager"):
        plain = sample(imagen, ["a cat", "一只猫"], seed=2, steps=6, solver=solver)
    assert abs(sample(imagen, ["a cat", "一只猫"], seed=2, steps=6, solver=solver) - plain).mean() < 0.01


def test_the_stages_of_a_cascade_have_noise_of_their_own(imagen):
    first, second = (Noise([3, 4]).of_stage(stage) for stage in (0, 1))
    assert first.seeds.tolist() == [3, 4]
    assert not set(second.seeds.tolist()) & {3, 4}
    assert Noise([4]).of_stage(1).seeds[0] == second.seeds[1]


def test_outside_of_its_interval_guidance_costs_nothing(imagen, monkeypatch):
    sizes = []
    forward = imagen.unets["base"].forward

    def counted(x, *rest, **named):
        sizes.append(len(x))
        return forward(x, *rest, **named)

    monkeypatch.setattr(imagen.unets["base"], "forward", counted)
    everywhere = sample(imagen, ["a cat"], guidance=3.0, steps=4, until="base")
    assert sizes == [2, 2, 2, 2]
    sizes.clear()
    inside = sample(imagen, ["a cat"], guidance=3.0, steps=4, until="base", guidance_interval=(0.5, 3.0))
    assert sizes == [1, 2, 2, 1]
    assert (inside != everywhere).any()
    nowhere = sample(imagen, ["a cat"], guidance=3.0, steps=4, until="base", guidance_interval=(0.0, 0.0))
    assert (nowhere == sample(imagen, ["a cat"], guidance=1.0, steps=4, until="base")).all()


def test_a_threshold_replaces_the_stages_own(imagen):
    dynamic = sample(imagen, ["a cat"], threshold=DynamicThreshold(1.0))
    assert (dynamic != sample(imagen, ["a cat"], threshold="static")).any()
    assert (dynamic != sample(imagen, ["a cat"], threshold="none")).any()


def test_the_progress_bar_counts_every_step(imagen, capsys):
    imagen.sample(["a cat"], steps=[4, 3])
    assert "7/7" in capsys.readouterr().err


def test_a_prompt_too_long_is_cut_with_a_warning(imagen):
    with pytest.warns(UserWarning, match="cut after character 23"):
        imagen.sample(["a" * 40], steps=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": [3]}, TypeError, "prompts"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.5}, ValueError, "steps"),
        ({"steps": [1, 2, 3]}, ValueError, "steps"),
        ({"steps": "many"}, TypeError, "steps"),
        ({"guidance": [1.0]}, ValueError, "guidance"),
        ({"guidance": float("nan")}, ValueError, "guidance"),
        ({"guidance": [1.0, float("inf")]}, ValueError, "guidance"),
        ({"solver": "euler"}, ValueError, "solver"),
        ({"threshold": "dynamic"}, ValueError, "threshold"),
        ({"prompts": 5}, TypeError, "prompts must be a string or a list of strings, got int"),
        ({"prompts": None}, TypeError, "prompts"),
        ({"prompts": {"a cat": 1}}, TypeError, "prompts"),
        ({"guidance_interval": 5}, TypeError, "guidance_interval"),
        ({"guidance_interval": (1,)}, TypeError, "guidance_interval"),
        ({"guidance_interval": "ab"}, TypeError, "guidance_interval"),
        ({"seed": torch.tensor(3)}, TypeError, "seed must be an integer"),
        ({"guidance_interval": (2.0, 1.0)}, ValueError, "guidance_interval"),
        ({"guidance_interval": (-1.0, 1.0)}, ValueError, "guidance_interval"),
        ({"until": "top"}, ValueError, "until"),
        ({"seed": [1, 2]}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": [1.5]}, TypeError, "seed"),
        ({"seed": None}, TypeError, "seed"),
        ({"seed": "a"}, TypeError, "seed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sample_rejects(imagen, arguments, error, message):
    with pytest.raises(error, match=message):
        imagen.sample(**{"prompts": ["a cat"], "progress": False, **arguments})


def test_save_and_load_give_the_same_pictures(imagen, tmp_path):
    imagen.save_pretrained(tmp_path / "model")
    loaded = Imagen.from_pretrained(tmp_path / "model")
    assert loaded.config == imagen.config
    assert not loaded.training
    assert (sample(loaded, ["a cat"]) == sample(imagen, ["a cat"])).all()
    imagen.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)  # replaces the first
    assert load_file(tmp_path / "model" / "base.safetensors")["conv_in.weight"].dtype == torch.bfloat16
    assert abs(sample(Imagen.from_pretrained(tmp_path / "model"), ["a cat"]) - sample(imagen, ["a cat"])).mean() < 8


def test_sharded_weights_load(imagen, tmp_path):
    imagen.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "base.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    shards = {"base-00001-of-00002.safetensors": names[::2], "base-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, file.with_name(shard))
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    file.with_name("base.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    assert (sample(Imagen.from_pretrained(tmp_path / "model"), ["a cat"]) == sample(imagen, ["a cat"])).all()


def _without(name):
    return lambda path: (path / name).unlink()


def _edit_config(change):
    def edit(path):
        values = json.loads((path / "config.json").read_text())
        change(values)
        (path / "config.json").write_text(json.dumps(values))

    return edit


def _edit_tensors(change):
    def edit(path):
        tensors = load_file(path / "super_16.safetensors")
        change(tensors)
        save_file(tensors, path / "super_16.safetensors")

    return edit


def _truncate(path):
    file = path / "base.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _other_text_encoder(path):
    config = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Encoder(config).save_pretrained(path / "text_encoder")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("config.json"), "config.json"),
        (_without("base.safetensors"), "base.safetensors"),
        (_without("text_encoder/model.safetensors"), "model.safetensors"),
        (_edit_config(lambda c: c.update(colour=1)), "unknown key 'colour'"),
        (_edit_config(lambda c: c.update(format=9)), "format"),
        (_edit_config(lambda c: c["stages"][0]["unet"].update(channels="many")), "channels"),
        (_edit_config(lambda c: c["stages"][0].update(steps=0)), "steps"),
        (_edit_config(lambda c: c["stages"][0].update(size=9)), r"config\.json.* size"),
        (_edit_config(lambda c: c["stages"][0].update(guidance=float("nan"))), r"config\.json.* guidance"),
        (_edit_config(lambda c: c.update(max_text_length=0)), r"config\.json.* max_text_length"),
        (_edit_config(lambda c: c["stages"][0]["unet"].update(dropout=1.5)), r"config\.json.* dropout"),
        (_edit_config(lambda c: c["stages"][0]["unet"].update(out_channels=-3)), r"config\.json.* out_channels"),
        (_edit_config(lambda c: c["stages"][0]["unet"].update(channels=2**45)), r"config\.json: stage 'base'"),
        (_edit_config(lambda c: c["stages"][0].update(name="keys")), r"config\.json.* name 'keys'"),
        (_other_text_encoder, r"model.*: stage 'base' reads text of width 16, the encoder gives 24"),
        (_edit_tensors(lambda t: t.update({"conv_in.weight": t["conv_in.weight"][:, :5].clone()})), "conv_in.weight"),
        (_edit_tensors(lambda t: t.pop("conv_out.bias")), "conv_out.bias"),
        (_edit_tensors(lambda t: t.update(extra=torch.ones(1))), "extra"),
        (_truncate, "base.safetensors"),
    ],
    ids=[
        "no-config",
        "no-unet",
        "no-text-encoder",
        "unknown-key",
        "format",
        "type",
        "range",
        "stage-size",
        "guidance",
        "text-length",
        "dropout",
        "channels",
        "size",
        "name",
        "text-width",
        "shape",
        "missing-tensor",
        "extra-tensor",
        "truncated",
    ],
)
def test_damaged_checkpoints_are_named(imagen, tmp_path, damage, message):
    imagen.save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        Imagen.from_pretrained(tmp_path / "model")


def test_no_such_cascade_names_the_shipped_ones():
    with pytest.raises(CheckpointError, match="emoji"):
        Imagen.from_pretrained("no-such-cascade")
    with pytest.raises(CheckpointError, match=r"no cascade 'no-such-cascade': not a directory$"):
        Imagen.from_pretrained(Path("no-such-cascade"))  # no name, but a path


def test_a_shipped_name_is_not_shadowed_by_a_directory(imagen, tmp_path, monkeypatch):
    imagen.save_pretrained(tmp_path / "package" / "weights" / "emoji")
    (tmp_path / "emoji").mkdir()  # such as a data set built with --out emoji
    monkeypatch.setattr("imagen_fast.models.imagen.resources.files", lambda _: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    assert Imagen.from_pretrained("emoji").config == imagen.config
    for other in ("./emoji", Path("./emoji"), tmp_path / "emoji"):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Imagen.from_pretrained(other)


def test_saving_never_replaces_something_else(imagen, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        imagen.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "config", [None, {"_class_name": "UNet2DConditionModel"}, {"format": 1}, {"format": 9, "stages": []}], ids=str
)
def test_saving_never_replaces_another_model(imagen, tmp_path, config):
    held = {"base.safetensors", *(["config.json"] if config else [])}
    (tmp_path / "base.safetensors").write_text("its weights")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputError, match="which is no part of a cascade"):
        imagen.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == held


@pytest.mark.parametrize("name", ["lora.safetensors", "super_64.safetensors", "base.fp16.safetensors"])
def test_saving_replaces_the_stages_of_the_old_cascade_alone(imagen, tmp_path, name):
    imagen.save_pretrained(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"it holds {name}, which is no part of a cascade"):
        imagen.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    only_base = Imagen(ImagenConfig(imagen.config.stages[:1], 24), imagen.text_encoder)
    only_base.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "base.safetensors", "text_encoder"}


def test_saving_never_replaces_another_text_encoder(imagen, tmp_path):
    imagen.save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(OutputError, match="which is no part of a T5 checkpoint"):
        imagen.save_pretrained(tmp_path)


def test_a_model_card_may_be_there_first(imagen, tmp_path):
    (tmp_path / "README.md").write_text("the card")
    imagen.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "the card"


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, "float32"], ids=str)
def test_weights_have_no_dtype_that_could_not_be_loaded(imagen, tmp_path, dtype):
    imagen.save_pretrained(tmp_path)
    before = (tmp_path / "base.safetensors").read_bytes()
    with pytest.raises(TypeError, match=f"dtype must be a floating-point dtype, got {dtype}"):
        imagen.save_pretrained(tmp_path, dtype)
    assert (tmp_path / "base.safetensors").read_bytes() == before
    with pytest.raises(TypeError, match=f"dtype must be a floating-point dtype, got {dtype}"):
        Imagen.from_pretrained(tmp_path, dtype)


def test_saving_again_keeps_the_model_card_and_what_is_not_its_own(imagen, tmp_path):
    imagen.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("the card")
    imagen.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "the card"
    (tmp_path / "model" / "text_encoder" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        imagen.save_pretrained(tmp_path / "model")


def test_the_text_encoder_must_fit():
    with pytest.raises(ValueError, match="width 24"):
        Imagen(ImagenConfig.small(text_dim=24), T5Encoder(T5Config.preset("tiny_bytes")))


@pytest.mark.parametrize("name", ["keys", "pop", "training", "forward", "base-1", ""])
def test_stage_config_rejects_a_name(imagen, name):
    with pytest.raises(ValueError, match=f"name.* {name!r}"):
        dataclasses.replace(imagen.config.stages[0], name=name)


def test_a_tokenizer_that_cannot_be_read_is_saved_with_the_cascade(imagen, tmp_path, monkeypatch):
    imagen.save_pretrained(tmp_path / "model")
    vocabulary = tmp_path / "model" / "text_encoder" / "spiece.model"
    vocabulary.write_bytes(b"its bytes")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # makes its import fail
    Imagen.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    assert vocabulary.read_bytes() == b"its bytes"


@pytest.mark.parametrize(
    ("stage", "changes", "error"),
    [
        (0, {"schedule": "cosine"}, ValueError),
        (0, {"schedule": None}, ValueError),
        (0, {"prediction": "velocity"}, ValueError),
        (0, {"solver": "euler"}, ValueError),
        (0, {"spacing": "even"}, ValueError),
        (0, {"threshold": "Static"}, ValueError),
        (0, {"threshold": None}, ValueError),
        (0, {"threshold": "static", "threshold_percentile": float("nan")}, ValueError),
        (0, {"size": 0}, ValueError),
        (0, {"size": -8}, ValueError),
        (0, {"size": 9}, ValueError),
        (1, {"size": 18}, ValueError),
        (0, {"size": 8.0}, TypeError),
        (0, {"size": "8"}, TypeError),
        (0, {"train_timesteps": 1000.5}, TypeError),
        (0, {"steps": 2.5}, TypeError),
        (0, {"steps": True}, TypeError),
        (0, {"guidance": float("nan")}, ValueError),
        (0, {"guidance": "7"}, TypeError),
        (0, {"unet": EfficientUNetConfig()}, TypeError),
        (0, {"unet": {"channels": 16}}, TypeError),
        (0, {"in_channels": 4}, ValueError),
        (0, {"out_channels": 2}, ValueError),
        (1, {"in_channels": 3}, ValueError),
    ],
    ids=str,
)
def test_stage_config_rejects(imagen, stage, changes, error):
    config = imagen.config.stages[stage]
    (field,) = [name for name in changes if name != "threshold" or len(changes) == 1]
    if field in ("in_channels", "out_channels"):
        kind = "efficient_unet" if stage else "unet"
        changes = {kind: dataclasses.replace(getattr(config, kind), **changes)}
    with pytest.raises(error, match=field.removeprefix("threshold_")):
        dataclasses.replace(config, **changes)


def test_stage_config_takes_numbers_of_numpy_and_learned_variances(imagen):
    stage = imagen.config.stages[0]
    changed = dataclasses.replace(stage, size=np.int64(16), steps=np.int32(2), guidance=np.float32(2))
    json.dumps(dataclasses.asdict(changed))  # as save_pretrained does
    dataclasses.replace(stage, unet=dataclasses.replace(stage.unet, out_channels=6))


@pytest.mark.parametrize("length", [0, -1, 2.5])
def test_cascade_config_rejects_a_text_length(imagen, length):
    with pytest.raises((TypeError, ValueError), match="max_text_length"):
        ImagenConfig(imagen.config.stages, length)


@pytest.mark.parametrize("augmentation", [torch.tensor(3), torch.tensor([3])])
def test_augmentation_is_one_number_a_picture(imagen, augmentation):
    with pytest.raises(ValueError, match=r"augmentation must be \(2,\)"):
        imagen.unets["super_16"](torch.zeros(2, 6, 16, 16), torch.tensor([1, 2]), augmentation=augmentation)


@pytest.mark.parametrize("stages", [(), "swapped", "doubled"])
def test_cascade_config_rejects(imagen, stages):
    base, larger = imagen.config.stages
    given = {"swapped": (larger, base), "doubled": (base, base)}.get(stages, ())
    with pytest.raises(ValueError, match="stage"):
        ImagenConfig(given)


def test_the_shipped_cascade_loads_and_draws():
    model = Imagen.from_pretrained("emoji")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cat, again = model.sample(["a cute cat", "一只可爱的猫咪"], progress=False)
    assert cat.size == again.size == (128, 128)
    # Both are pictures on white, and both are the same animal: nearer to each other than to a rocket.
    rocket = model.sample(["a rocket"], progress=False)[0]
    x, y, z = (np.array(p).astype(float) for p in (cat, again, rocket))
    assert np.median(x[:8]) > 240
    assert ((x - y) ** 2).mean() < ((x - z) ** 2).mean()
