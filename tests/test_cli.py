"""The command line: what it prints and writes, and that a user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagen_fast
from imagen_fast import cli, compare_solvers, demo, environment, pictures
from imagen_fast.diffusion import DynamicThreshold
from imagen_fast.errors import CheckpointError

COLOURS = ("red", "green", "blue", "black", "white", "yellow")


class FakeImagen:
    """Answers at once with a picture in one colour a prompt; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []
        self.accelerated = False

    def sample(self, prompts, **options):
        self.calls.append({"prompts": list(prompts), **options})
        return [Image.new("RGB", (16, 16), COLOURS[i % len(COLOURS)]) for i in range(len(prompts))]

    def __deepcopy__(self, memo):
        return FakeImagen()


@pytest.fixture
def imagen(monkeypatch):
    """A fake in place of `imagen_fast.models.Imagen` and `accelerate`; `from_pretrained` takes only "emoji"."""
    model = FakeImagen()

    def from_pretrained(name):
        if name != "emoji":
            raise CheckpointError(f"{name} is not a checkpoint: it has no config.json")
        return model

    def accelerate(model, **options):
        model.accelerated = True
        return "the report"

    fake = types.SimpleNamespace(Imagen=types.SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setattr(imagen_fast, "models", fake, raising=False)
    monkeypatch.setattr(imagen_fast, "accelerate", accelerate, raising=False)
    return model


@pytest.fixture
def mistake(capsys):
    """Runs a command that must fail as a user's mistake, and returns its one line."""

    def run(*arguments: str) -> str:
        try:
            status = cli.main(arguments)
        except SystemExit as exit:  # argparse's own
            status = exit.code
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert captured.err.startswith("imagen-fast: error: ")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("imagen-fast: error: ").rstrip()

    return run


def command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "imagen_fast", *arguments], capture_output=True, text=True, **options)


# ---- sample


def test_sample_writes_the_picture_and_passes_the_options_on(imagen, tmp_path, capsys):
    out = tmp_path / "cat.png"
    options = ["--seed", "7", "--steps", "3", "--guidance", "2.5", "--solver", "dpm"]
    options += ["--guidance-interval", "0.2", "5", "--threshold", "0.95:1.5"]
    assert cli.main(["sample", "一只可爱的猫咪", "--out", str(out), *options]) == 0
    (call,) = imagen.calls
    assert call.pop("progress") in (True, False)
    assert call == {
        "prompts": ["一只可爱的猫咪"],
        "seed": 7,
        "steps": 3,
        "guidance": 2.5,
        "guidance_interval": (0.2, 5.0),
        "solver": "dpm",
        "threshold": DynamicThreshold(0.95, max_value=1.5),
    }
    assert imagen.accelerated
    assert Image.open(out).size == (16, 16)
    assert f"{out}: 16x16, seed 7" in capsys.readouterr().out


def test_sample_leaves_every_choice_to_the_model(imagen, tmp_path):
    cli.main(["sample", "a cat", "--out", str(tmp_path / "cat.png"), "--no-accelerate"])
    (call,) = imagen.calls
    assert call["seed"] == 0
    assert {call[name] for name in ("steps", "guidance", "guidance_interval", "solver", "threshold")} == {None}
    assert not imagen.accelerated


@pytest.mark.parametrize(
    ("text", "threshold"),
    [("none", "none"), ("static", "static"), ("0.995", DynamicThreshold(0.995))],
)
def test_sample_takes_a_threshold(imagen, tmp_path, text, threshold):
    assert cli.main(["sample", "a cat", "--out", str(tmp_path / "cat.png"), "--threshold", text]) == 0
    assert imagen.calls[0]["threshold"] == threshold


def test_sample_takes_an_empty_prompt(imagen, tmp_path):
    assert cli.main(["sample", "", "--out", str(tmp_path / "any.png")]) == 0
    assert imagen.calls[0]["prompts"] == [""]


def test_several_prompts_make_a_grid_in_their_order(imagen, tmp_path):
    out = tmp_path / "grid.png"
    assert cli.main(["sample", *"abcdef", "--out", str(out)]) == 0
    sheet = Image.open(out)
    assert sheet.size == (4 * 16 + 3 * 2, 2 * 16 + 2)
    middles = [(8 + 18 * (i % 4), 8 + 18 * (i // 4)) for i in range(6)]
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS]
    assert [sheet.getpixel(middle) for middle in middles] == expected


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "trailing-slash"])
def test_a_directory_gets_one_picture_a_prompt(imagen, tmp_path, existing, capsys):
    directory = tmp_path / "pets"
    if existing:
        directory.mkdir()
    out = str(directory) + ("" if existing else "/")
    assert cli.main(["sample", "a cat", "a dog", "--out", out, "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert "1.png: 16x16, seed 5\n" in printed
    assert "2.png: 16x16, seed 6\n" in printed, "which draws this picture alone"
    assert sorted(path.name for path in directory.iterdir()) == ["1.png", "2.png"]
    assert Image.open(directory / "2.png").getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_every_offered_format_can_be_written(imagen, tmp_path, suffix):
    assert cli.main(["sample", "a cat", "--out", str(tmp_path / f"cat{suffix}")]) == 0
    Image.open(tmp_path / f"cat{suffix}").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "the following arguments are required: COMMAND", id="no-command"),
        pytest.param(["paint"], "invalid choice: 'paint'", id="unknown-command"),
        pytest.param(["sample"], "required: PROMPT, --out", id="no-prompt"),
        pytest.param(["sample", "a cat"], "required: --out", id="no-out"),
        pytest.param(["sample", "a cat", "--out", "x.png", "--sede", "1"], "--sede", id="unknown-option"),
        pytest.param(["sample", "a", "--out", ""], "--out: must not be empty", id="out-empty"),
        pytest.param(["train", "emoji-base", "--out", ""], "--out: must not be empty", id="train-out-empty"),
        pytest.param(["sample", "a", "--out", "x.png", "--seed", "one"], "whole number, got 'one'", id="seed-text"),
        pytest.param(["sample", "a", "--out", "x.png", "--seed=-1"], "from 0 to 2^63 - 1, got -1", id="seed-negative"),
        pytest.param(["sample", "a", "--out", "x.png", "--steps", "0"], "at least 1, got 0", id="no-steps"),
        pytest.param(["sample", "a", "--out", "x.png", "--threads", "0"], "at least 1, got 0", id="no-threads"),
        pytest.param(["sample", "a", "--out", "x.png", "--guidance", "nan"], "finite number, got nan", id="guidance"),
        pytest.param(["sample", "a", "--out", "x.png", "--solver", "euler"], "invalid choice: 'euler'", id="solver"),
        pytest.param(["sample", "a", "--out", "x.png", "--threshold", "2"], "percentile must be", id="percentile"),
        pytest.param(["sample", "a", "--out", "x.png", "--threshold", "0.9:0.5"], "max_value must be", id="maximum"),
        pytest.param(["sample", "a", "--out", "x.png", "--threshold", "some"], "a number, got 'some'", id="threshold"),
        pytest.param(["bench", "--op", "add_noise", "--budget=-1"], "--budget must be a number of sec", id="budget"),
        pytest.param(["bench", "--op", "add_noise", "--peers", "pear", "--list"], "no peer 'pear'", id="no-peer"),
        pytest.param(["tune", "--op", "add_noise", "--budget", "nan"], "--budget must be a number of sec", id="tune"),
        pytest.param(["compare-solvers", "--steps", "0"], "at least 1, got 0", id="compare-no-steps"),
        pytest.param(["data", "faces", "--out", "x"], "invalid choice: 'faces'", id="unknown-data"),
        pytest.param(["data", "emoji"], "required: --out", id="data-no-out"),
        pytest.param(["train"], "required: CONFIG", id="no-config"),
    ],
)
def test_a_wrong_argument_is_one_line(imagen, mistake, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(*arguments)
    assert not imagen.calls
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [["sample", "a cat"], ["demo"], ["compare-solvers"]], ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        pytest.param("file/cat.png", "cannot create directory", id="parent-is-a-file"),
        pytest.param("cat", "a picture's name ends in .png, .jpg, .jpeg, .webp", id="no-suffix"),
        pytest.param("cat.gif", "a picture's name ends in", id="unknown-format"),
        pytest.param("x" * 300 + ".png", "File name too long", id="name-too-long"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_any_work(imagen, mistake, tmp_path, verb, out, message):
    (tmp_path / "file").write_text("")
    assert message in mistake(*verb, "--out", str(tmp_path / out))
    assert not imagen.calls


def test_a_missing_model_is_one_line(imagen, mistake, tmp_path):
    message = mistake("sample", "a cat", "--model", str(tmp_path), "--out", str(tmp_path / "cat.png"))
    assert message == f"{tmp_path} is not a checkpoint: it has no config.json"


def test_a_full_disk_is_one_line_and_leaves_no_picture(imagen, mistake, tmp_path, monkeypatch):
    def fills_up(self, file, *rest):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fills_up)
    message = mistake("sample", "a cat", "--out", str(tmp_path / "cat.png"))
    assert message == f"cannot write {tmp_path / 'cat.png'}: No space left on device"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", ["no-such-config", "misspelt.toml", "broken.toml"])
def test_a_wrong_training_configuration_is_one_line(mistake, tmp_path, monkeypatch, config):
    pytest.importorskip("imagen_fast.training.trainer")
    monkeypatch.chdir(tmp_path)
    Path("misspelt.toml").write_text("stpes = 3\n")
    Path("broken.toml").write_text("steps = = 3\n")
    message = mistake("train", config, "--out", "run")
    assert config in message
    assert not Path("run").exists()


# ---- What goes wrong besides


def test_debug_shows_where_a_mistake_was_found(imagen, tmp_path):
    with pytest.raises(CheckpointError):
        cli.main(["sample", "a cat", "--model", "nowhere", "--out", str(tmp_path / "cat.png"), "--debug"])


def test_a_bug_keeps_its_traceback(imagen, tmp_path, monkeypatch):
    monkeypatch.setattr(imagen, "sample", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sample", "a cat", "--out", str(tmp_path / "cat.png")])


def test_ctrl_c_is_quiet_and_leaves_nothing(imagen, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(imagen, "sample", interrupted)
    assert cli.main(["sample", "a cat", "--out", str(tmp_path / "cat.png")]) == 130
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra_that_brings_it(mistake, tmp_path, monkeypatch):
    def run(args):
        raise ModuleNotFoundError("No module named 'fontTools'", name="fontTools.ttLib")

    monkeypatch.setitem(cli.COMMANDS, "data", dataclasses.replace(cli.COMMANDS["data"], run=run))
    message = mistake("data", "emoji", "--out", str(tmp_path / "emoji"))
    assert message == "fontTools.ttLib is not installed (pip install 'imagen-fast[train]')"


def test_a_missing_tokenizer_names_the_extra_that_brings_it(imagen, mistake, tmp_path, monkeypatch):
    from imagen_fast.models.t5.tokenizer import load_tokenizer

    (tmp_path / "spiece.model").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # makes its import fail
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.setattr(imagen, "sample", lambda prompts, **_: tokenizer(prompts))
    message = mistake("sample", "a cat", "--out", str(tmp_path / "cat.png"))
    assert message == "sentencepiece is not installed (pip install 'imagen-fast[text]')"


def test_a_warning_is_one_line(imagen, tmp_path, monkeypatch, capsys):
    sample = imagen.sample

    def warns(prompts, **options):
        warnings.warn("the prompt was cut\nafter 'cat'", UserWarning, stacklevel=1)
        return sample(prompts, **options)

    monkeypatch.setattr(imagen, "sample", warns)
    assert cli.main(["sample", "a cat", "--out", str(tmp_path / "cat.png")]) == 0
    assert capsys.readouterr().err == "imagen-fast: warning: the prompt was cut after 'cat'\n"


def test_a_reader_that_leaves_early_is_no_error():
    shell = f"set -o pipefail; {sys.executable} -m imagen_fast env | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_any_character_can_be_printed_on_any_terminal(tmp_path):
    (tmp_path / "猫").write_text("")
    done = command(
        *("sample", "a cat", "--out", str(tmp_path / "猫" / "cat.png")),
        env={"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "1"},
        cwd=Path(imagen_fast.__file__).parents[1],
    )
    assert done.returncode == 2
    assert "\\u732b" in done.stderr


# ---- help, env, demo


def test_help_is_fast_and_does_not_import_torch():
    code = """
import sys
from imagen_fast.cli import main
try:
    main(["--help"])
except SystemExit:
    assert not {"torch", "PIL", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)
    *_, cumulative, module = [line.split("|") for line in done.stderr.splitlines() if "imagen_fast.cli" in line][-1]
    assert module.strip() == "imagen_fast.cli"
    assert int(cumulative) < 500_000  # microseconds


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    if name == "bench":
        pytest.importorskip("imagen_fast.bench.run")
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    assert f"usage: imagen-fast {name}" in capsys.readouterr().out


def test_env_lists_every_backend_with_the_reason_against_it(capsys):
    assert cli.main(["env"]) == 0
    table = capsys.readouterr().out
    found = environment.collect()
    assert found["backends"]["eager"] is None
    for name, reason in found["backends"].items():
        assert any(name in line and (reason or "available") in line for line in table.splitlines()), name


def test_env_as_json_holds_machine_versions_and_libraries(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("IMAGEN_FAST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IMAGEN_FAST_STRICT", "1")
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["PyTorch"].startswith("2.")
    assert found["libraries"]["numpy"] == np.__version__
    assert found["settings"] == {"IMAGEN_FAST_STRICT": "1"}
    assert "group_norm_act" in found["ops"]
    assert "cuda" in found["backends"]


def test_env_imports_none_of_the_libraries_that_it_lists():
    code = "import sys, torch; from imagen_fast import environment; environment.to_table(environment.collect())\n"
    code += "print(*({'transformers', 'diffusers', 'onnxruntime', 'openvino', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_demo_draws_each_prompt_both_ways_from_one_seed(imagen, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(FakeImagen, "__deepcopy__", lambda self, memo: made.append(FakeImagen()) or made[0])
    out = tmp_path / "demo.png"
    assert cli.main(["demo", "--out", str(out), "--seed", "3"]) == 0
    (accelerated,) = made
    assert accelerated.accelerated
    assert not imagen.accelerated
    for model in (imagen, accelerated):
        warm_up, *calls = model.calls
        assert warm_up["steps"] == 4
        assert [call["prompts"] for call in calls] == [[prompt] for prompt in demo.PROMPTS]
        assert {call["seed"] for call in calls} == {3}
    printed = capsys.readouterr().out
    assert "the report" in printed
    assert all(prompt in printed for prompt in demo.PROMPTS)
    assert Image.open(out).width > 4 * demo.PICTURE_SIZE


def test_compare_solvers_draws_every_solver_in_every_number_of_steps(imagen, tmp_path, capsys):
    out = tmp_path / "solvers.png"
    assert cli.main(["compare-solvers", "a cat", "a dog", "--out", str(out), "--steps", "2", "7", "--seed", "3"]) == 0
    assert [(call["solver"], call["steps"]) for call in imagen.calls] == [
        (solver, steps) for solver in ("ddpm", "ddim", "dpm") for steps in (2, 7)
    ]
    assert {(tuple(call["prompts"]), call["seed"]) for call in imagen.calls} == {(("a cat", "a dog"), 3)}
    assert imagen.accelerated
    assert Image.open(out).width > 4 * compare_solvers.PICTURE_SIZE
    assert "ddim, 7 steps" in capsys.readouterr().out


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "quiet"])
def test_demo_says_when_other_work_was_running(imagen, tmp_path, capsys, monkeypatch, busy):
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0 if busy else 0.0, 0.0, 0.0))
    demo.run(tmp_path / "demo.png", progress=False)
    assert ("Other work was running" in capsys.readouterr().out) == busy


def test_demo_takes_turns_which_goes_first(imagen):
    order = []

    class Way:
        def __init__(self, name):
            self.name = name

        def sample(self, prompts, **_):
            order.append(self.name)
            return [Image.new("RGB", (4, 4))]

    demo.compare(Way("eager"), Way("ours"), "ab", seed=0, steps=None, progress=False)
    assert order == ["eager", "ours", "eager", "ours", "ours", "eager"]  # the first two are the warm-up


def test_demo_measures_differences_in_levels():
    first = Image.fromarray(np.full((2, 2, 3), 10, np.uint8))
    second = np.full((2, 2, 3), 10, np.uint8)
    second[0, 0] = (7, 10, 16)
    assert demo.difference(first, Image.fromarray(second)) == (6.0, pytest.approx(9 / 12))
    assert demo.difference(Image.fromarray(second), first) == (6.0, pytest.approx(9 / 12))


def test_demo_table_sums_the_seconds_and_takes_the_worst_difference():
    picture = Image.new("RGB", (4, 4))
    rows = [
        demo.Comparison("a cat", (picture, picture), (3.0, 1.0), 2.0, 0.5),
        demo.Comparison("狗", (picture, picture), (1.0, 1.0), 5.0, 0.1),
    ]
    assert demo.table(rows).splitlines()[-1].split() == ["4.00", "s", "2.00", "s", "2.00", "x", "5", "0.3000", "all"]


@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_every_prompt_of_the_demo_has_a_label(prompt):
    label = np.asarray(demo._label(prompt))  # no font of the system is looked for
    assert label.shape[0] >= pictures.LABEL_SIZE
    assert label.shape[1] > 4 * pictures.LABEL_SIZE
    assert label.max() > 200
    assert (label == 0).mean() > 0.5
