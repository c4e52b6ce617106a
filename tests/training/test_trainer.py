"""Training: it learns, it resumes to the same losses after being killed, and its mistakes are named at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_fast.errors import CheckpointError, ConfigError, UserError
from imagen_fast.training.assemble import assemble
from imagen_fast.training.config import TrainConfig
from imagen_fast.training.emoji import EmojiDataset
from imagen_fast.training.evaluate import evaluate
from imagen_fast.training.trainer import TrainingRun, learning_rate, train

TEXT = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
UNET = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention_levels": [1], "head_width": 16, "text_dim": 16}
EFFICIENT = {"channels": 8, "multipliers": [1, 2], "blocks": [1, 1], "groups": 4}
BASE = {"stage": "base", "size": 8, "text_encoder": TEXT, "unet": {**UNET, "groups": 4}}
SUPER = {
    "stage": "super_resolution",
    "size": 16,
    "low_resolution": 8,
    "crop": 8,
    "efficient_unet": {**EFFICIENT, "self_attention_levels": [], "cross_attention_levels": []},
}
NAMING = {"stage": "text", "text_encoder": TEXT}
COMMON = {"steps": 12, "batch_size": 4, "checkpoint_every": 4, "sample_every": 100, "warmup_steps": 2, "threads": 1}


def write_config(path: Path, values: dict) -> Path:
    """As TOML; nested tables one level deep."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["base", "super_resolution"])
def config_file(request, tmp_path, colours):
    stage = BASE if request.param == "base" else SUPER
    return write_config(tmp_path / "run.toml", {**stage, **COMMON, "data": str(colours), "out": str(tmp_path / "run")})


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_a_run_leaves_checkpoint_losses_and_samples(config_file):
    directory = train(str(config_file), progress=False)
    assert len(losses(directory)) == 12
    assert (directory / "samples-000012.png").stat().st_size > 0
    assert {p.name for p in (directory / "checkpoint").iterdir()} == {"state.json", "state.safetensors"}


def test_a_killed_run_resumes_to_bit_equal_losses(config_file, tmp_path):
    whole = losses(train(str(config_file), out=tmp_path / "whole", progress=False))
    code = "import sys; from imagen_fast.training.trainer import train; train(sys.argv[1], out=sys.argv[2])"
    directory = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(config_file), str(directory)])
    deadline = time.monotonic() + 120
    while not (directory / "checkpoint").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (directory / "checkpoint" / "state.json").is_file()
    state = json.loads((directory / "checkpoint" / "state.json").read_text())
    assert state["step"] in (4, 8, 12)
    train(str(config_file), out=directory, resume=True, progress=False)
    assert losses(directory) == whole


def test_dropout_resumes_too(colours, tmp_path):
    dropping = {**BASE, "text_encoder": {**TEXT, "dropout_rate": 0.3}, "unet": {**BASE["unet"], "dropout": 0.3}}
    values = {**dropping, **COMMON, "checkpoint_every": 1, "data": str(colours), "out": "unused"}
    file = str(write_config(tmp_path / "run.toml", values))
    whole = losses(train(file, overrides=["steps=3"], out=tmp_path / "whole", progress=False))

    class Stopped(Exception):
        pass

    step = TrainingRun.train_step

    def stop(run):
        if run.step == 2:
            raise Stopped
        return step(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingRun, "train_step", stop)
        train(file, overrides=["steps=3"], out=tmp_path / "stopped", progress=False)
    resumed = train(file, overrides=["steps=3"], out=tmp_path / "stopped", resume=True, progress=False)
    assert losses(resumed) == whole


def test_what_reaches_no_loss_has_no_moments_and_resumes(colours, tmp_path):
    """Without attention nothing reads the tokens of the text, so that their projection gets no gradient."""
    values = {**BASE, "unet": {**BASE["unet"], "attention_levels": []}, **COMMON, "data": str(colours), "out": "unused"}
    file = str(write_config(tmp_path / "run.toml", values))
    whole = losses(train(file, out=tmp_path / "whole", progress=False))
    stored = load_file(tmp_path / "whole" / "checkpoint" / "state.safetensors")
    assert "first_moment.unet.conv_in.weight" in stored
    assert "weight.unet.text.project.weight" in stored
    assert "first_moment.unet.text.project.weight" not in stored
    step = TrainingRun.train_step

    def stop(run):
        if run.step == 8:
            raise KeyboardInterrupt
        return step(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "train_step", stop)
        train(file, out=tmp_path / "stopped", progress=False)
    assert losses(train(file, out=tmp_path / "stopped", resume=True, progress=False)) == whole


def test_the_progress_bar_shows_the_mean_of_the_last_losses(colours, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.auto.tqdm.set_postfix", lambda bar, loss: shown.append(loss))
    for log_every, count in ((1, 6), (3, 2)):
        values = {**NAMING, **COMMON, "steps": 6, "log_every": log_every, "data": str(colours), "out": "unused"}
        file = write_config(tmp_path / "run.toml", values)
        history = losses(train(str(file), out=tmp_path / str(log_every), progress=False))
        groups = [history[i : i + log_every] for i in range(0, 6, log_every)]
        assert shown[-count:] == [f"{sum(group) / log_every:.4f}" for group in groups]


def test_few_training_timesteps_can_be_sampled(config_file):
    directory = train(str(config_file), overrides=["steps=1", "train_timesteps=10"], progress=False)
    assert (directory / "samples-000001.png").is_file()


@pytest.mark.parametrize("device", ["gpu", "meta:x", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_named(config_file, device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
        train(str(config_file), overrides=[f"device={device}"], progress=False)


def test_it_learns(colours, tmp_path):
    config = {**BASE, **COMMON, "steps": 60, "learning_rate": 5e-3, "data": str(colours), "out": str(tmp_path / "run")}
    history = losses(train(str(write_config(tmp_path / "run.toml", config)), progress=False))
    assert sum(history[-10:]) < 0.7 * sum(history[:10])  # predicting nothing keeps it at 1


def test_the_text_encoder_learns_to_name_pictures_and_the_base_starts_from_it(colours, tmp_path):

    common = {**COMMON, "data": str(colours), "out": "unused", "ema_decay": 0.5}
    config = {**NAMING, **common, "steps": 40, "learning_rate": 2e-2, "batch_size": 16}
    text = train(str(write_config(tmp_path / "text.toml", config)), out=tmp_path / "text", progress=False)
    history = losses(text)
    assert history[0] > 1.0  # ln 5 is guessing
    assert sum(history[-5:]) / 5 < 0.5
    config = {**BASE, **common, "steps": 1, "learning_rate": 1e-30, "initialize_from": [str(text)]}
    base = train(str(write_config(tmp_path / "base.toml", config)), out=tmp_path / "base", progress=False)
    stored, start = (load_file(run / "checkpoint" / "state.safetensors") for run in (base, text))
    name = "average.text_encoder.embedding.weight"
    torch.testing.assert_close(stored[name], start[name])
    frozen = {**BASE, **common, "train_text_encoder": False, "learning_rate": 0.1, "initialize_from": [str(text)]}
    directory = train(str(write_config(tmp_path / "f.toml", frozen)), overrides=["steps=4"], out=tmp_path / "f")
    assert torch.equal(load_file(directory / "checkpoint" / "state.safetensors")[name], start[name])
    train(str(tmp_path / "f.toml"), overrides=["steps=5"], out=directory, resume=True)  # what is frozen has no moments
    with pytest.raises(ConfigError, match="initialize_from"):
        train(str(tmp_path / "f.toml"), overrides=["initialize_from=[]"], out=tmp_path / "g")
    with pytest.raises(CheckpointError, match="none of this run's parameters"):
        train(
            str(write_config(tmp_path / "b.toml", {**SUPER, **common, "initialize_from": [str(text)]})), progress=False
        )
    with pytest.raises(CheckpointError, match="cannot start from"):
        train(
            str(write_config(tmp_path / "c.toml", {**BASE, **common, "initialize_from": ["nowhere"]})), progress=False
        )


def test_stages_assemble_into_a_cascade_that_samples_and_is_evaluated(colours, tmp_path):
    common = {**COMMON, "steps": 2, "data": str(colours), "out": "unused"}
    base = train(str(write_config(tmp_path / "a.toml", {**BASE, **common})), out=tmp_path / "a", progress=False)
    larger = train(str(write_config(tmp_path / "b.toml", {**SUPER, **common})), out=tmp_path / "b", progress=False)
    model = assemble(base, larger)
    assert [stage.size for stage in model.config.stages] == [8, 16]
    assert model.sample(["red"], steps=2, progress=False)[0].size == (16, 16)
    result = evaluate(model, EmojiDataset(colours), language="zh", count=5, steps=2, progress=False)
    assert result.count == 5
    assert result.accuracy == 1 - len(result.mistakes) / 5
    with pytest.raises(UserError, match="not a run of stage 'base'"):
        assemble(larger)
    with pytest.raises(UserError, match="not a run of stage 'super_resolution'"):
        assemble(base, base)


def test_the_averaged_weights_are_what_is_assembled(colours, tmp_path):

    config = {**BASE, **COMMON, "steps": 4, "data": str(colours), "out": "unused"}
    run = train(str(write_config(tmp_path / "a.toml", config)), out=tmp_path / "a", progress=False)
    stored = load_file(run / "checkpoint" / "state.safetensors")
    weight = assemble(run).unets["base"].conv_in.weight
    assert torch.equal(weight, stored["average.unet.conv_in.weight"])
    assert not torch.equal(weight, stored["weight.unet.conv_in.weight"])


def test_resuming_another_configuration_is_refused(config_file):
    train(str(config_file), overrides=["steps=4"], progress=False)
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(str(config_file), overrides=["learning_rate=0.1"], resume=True, progress=False)
    with pytest.warns(UserWarning, match="steps changed"):
        train(str(config_file), overrides=["steps=5"], resume=True, progress=False)


def test_a_run_is_not_overwritten(config_file):
    train(str(config_file), overrides=["steps=1"], progress=False)
    with pytest.raises(UserError, match="holds a run already"):
        train(str(config_file), progress=False)


def test_a_damaged_checkpoint_is_named(config_file):
    directory = train(str(config_file), overrides=["steps=1"], progress=False)
    (directory / "checkpoint" / "state.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot resume"):
        train(str(config_file), overrides=["steps=1"], resume=True, progress=False)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda state: state.pop("step"), id="no step"),
        pytest.param(lambda state: state.update(step="4"), id="step is no number"),
        pytest.param(lambda state: state.update(config=None), id="no config"),
    ],
)
def test_a_damaged_state_is_named(config_file, damage):
    directory = train(str(config_file), overrides=["steps=1"], progress=False)
    file = directory / "checkpoint" / "state.json"
    state = json.loads(file.read_text())
    damage(state)
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: it needs a step and a config"):
        train(str(config_file), overrides=["steps=1"], resume=True, progress=False)


def test_a_tensor_of_another_shape_is_named(config_file):
    directory = train(str(config_file), overrides=["steps=1"], progress=False)
    file = directory / "checkpoint" / "state.safetensors"
    tensors = load_file(file)
    tensors["average.unet.conv_in.weight"] = torch.zeros(1, 2)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"average\.unet\.conv_in\.weight has shape \(1, 2\), this run's has"):
        train(str(config_file), overrides=["steps=1"], resume=True, progress=False)


def test_resuming_on_another_data_set_is_refused(config_file, colours, tmp_path):
    train(str(config_file), overrides=["steps=1"], progress=False)
    other = shutil.copytree(colours, tmp_path / "other")
    train(str(config_file), overrides=["steps=1", f"data={other}"], resume=True, progress=False)  # the same, moved
    captions = other / "captions.json"
    captions.write_text(captions.read_text().replace("a red square", "a blue square"))
    with pytest.raises(CheckpointError, match="was trained on another data set"):
        train(str(config_file), overrides=["steps=1", f"data={other}"], resume=True, progress=False)


def test_a_checkpoint_that_was_being_replaced_is_found(config_file):
    directory = train(str(config_file), overrides=["steps=1"], progress=False)
    (directory / "checkpoint").rename(directory / ".checkpoint.12345.old")
    with pytest.raises(UserError, match="holds a run already"):
        train(str(config_file), overrides=["steps=1"], progress=False)
    (directory / "checkpoint").rename(directory / ".checkpoint.12345.old")
    train(str(config_file), overrides=["steps=1"], resume=True, progress=False)
    assert len(losses(directory)) == 1


def test_nothing_to_resume(config_file):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(str(config_file), resume=True, progress=False)


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig.load("emoji-sr")
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(config.learning_rate / config.warmup_steps, rel=1e-3)
    assert max(rates) > 0.98 * config.learning_rate
    assert rates[-1] == pytest.approx(config.final_learning_rate, rel=1e-3)


@pytest.mark.parametrize("name", ["emoji-base", "emoji-sr"])
def test_shipped_configurations_load(name):
    assert TrainConfig.load(name, ["steps=3", "seed = 5"]).seed == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=1"], "did you mean 'steps'"),
        (["unet.channel=1"], "did you mean 'channels'"),
        (["steps"], "key=value"),
        (["steps=many"], "steps"),
        (["steps=0"], "steps must be at least 1"),
        (["low_resolution=0"], "low_resolution must be at least 1"),
        (["max_text_length=0"], "max_text_length must be at least 1"),
        (["gradient_clip=0.0"], "gradient_clip must be above 0"),
        (["gradient_clip=-1.0"], "gradient_clip must be above 0"),
        (["gradient_clip=nan"], "gradient_clip must be above 0"),
        (["learning_rate=inf"], "learning_rate must be finite"),
        (["final_learning_rate=-1.0"], "final_learning_rate must be finite and not negative"),
        (["final_learning_rate=nan"], "final_learning_rate must be finite"),
        (["seed=9223372036854775807"], "seed must be from"),
        (["size=33"], "size must be divisible by 4"),
        (["unet.in_channels=4"], "in_channels must be 3"),
        (["unet.out_channels=6"], "out_channels must be 3"),
        (["precision=fp8"], "precision"),
        (["unet.text_dim=7"], "text_dim"),
        (["text_encoder.vocab_size=400"], "vocab_size"),
        (["stage=super_resolution"], "efficient_unet"),
        (["steps.x=1"], "not a table"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.load("emoji-base", overrides)


def test_a_crop_must_fit_the_unet():
    with pytest.raises(ConfigError, match="crop must be divisible by 8, as its U-Net of 3 levels needs, got 60"):
        TrainConfig.load("emoji-sr", ["crop=60"])


def test_no_such_configuration_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="emoji-base"):
        TrainConfig.load("no-such-run")


def test_invalid_toml_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        TrainConfig.load(str(tmp_path / "bad.toml"))
    (tmp_path / "picture").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match=r"picture is not valid TOML"):
        TrainConfig.load(str(tmp_path / "picture"))
