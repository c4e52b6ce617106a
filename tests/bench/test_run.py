from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import imagen_fast
from imagen_fast.bench import floor, registry, report, results, run
from imagen_fast.bench.timing import Settings
from imagen_fast.errors import OutputError, UserError

TOY = Path(__file__).parent / "cases"
TOY_CASES = registry.load("add_one", TOY)
SHORT = Settings(seconds=0.005, batch_seconds=1e-4, min_rounds=5, max_rounds=20)


@pytest.fixture(autouse=True)
def _no_measuring_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "copy_bandwidth", lambda moved, device: 1e10)
    monkeypatch.setattr(floor, "matmul_rate", lambda dtype, device: 1e11)


def run_toy(case: str, peers: list[str], **options: Any) -> results.Result:
    [result] = run.run(["add_one"], case=case, peers=peers, settings=SHORT, progress=False, directory=TOY, **options)
    return result


def test_rows_of_a_case() -> None:
    result = run_toy("right-forward", ["eager", "two"])
    assert [(row.backend, row.peer) for row in result.rows] == [("cpu", "eager"), ("cpu", "two")]
    assert not result.failures
    assert result.complete
    eager, two = result.rows
    assert eager.ratio == eager.theirs.median / eager.ours.median
    assert eager.ours == two.ours  # all peers in one run
    assert two.variant in ("first", "second")
    assert eager.floor == pytest.approx(256 / 1e10)
    assert eager.percent_of_floor == pytest.approx(100 * eager.floor / eager.ours.median)
    assert eager.error <= eager.allowed_error
    assert eager.peer_error == eager.error


def test_backward_rows_hold_the_gradients_to_the_rule() -> None:
    [row] = run_toy("right-backward", ["eager"]).rows
    assert row.direction == "backward"
    assert row.worst in ("output", "grad x")


def test_an_inaccurate_kernel_is_not_timed() -> None:
    result = run_toy("wrong-forward", ["eager"])
    assert not result.rows
    [failure] = result.failures
    assert failure.contender == "cpu"
    assert "less accurate than eager" in failure.message


def test_without_a_kernel_the_reasons_are_told() -> None:
    [failure] = run_toy("nowhere", ["eager"]).failures
    assert failure.contender == "ours"
    assert "there is no kernel at all" in failure.message


def test_a_kernel_that_fails_is_one_case_less() -> None:
    result = run_toy("failing", ["eager"])
    assert not result.rows
    [failure] = result.failures
    assert failure.contender == "cpu"
    assert "invalid argument" in failure.message


def test_a_failing_peer_does_not_stop_the_others() -> None:
    result = run_toy("right-forward", ["eager", "broken", "wrong", "other shape"])
    assert [row.peer for row in result.rows] == ["eager"]
    assert {f.contender: f.message for f in result.failures} == {
        "broken": "broken (broken): RuntimeError: no such peer",
        "wrong": "wrong (wrong) does not compute the same thing: output is off by 0.18, relatively",
        "other shape": "other shape (other) does not compute the same thing: output is missing or differs",
    }


def test_threads_are_set_for_the_run_alone() -> None:
    before = torch.get_num_threads()
    assert run_toy("right-forward", ["eager"], threads=1).provenance.threads == 1
    assert torch.get_num_threads() == before
    with pytest.raises(UserError, match="--threads must be at least 1, got 0"):
        run_toy("right-forward", ["eager"], threads=0)


def test_the_file_is_written_after_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter(range(10))

    def interrupted(*args: Any) -> Any:
        if next(measured) == 1:
            raise KeyboardInterrupt
        return [], []

    monkeypatch.setattr(run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_toy("right", ["eager"], output=tmp_path)
    [file] = tmp_path.iterdir()
    assert not results.load(file).complete


def test_runs_are_appended_to_one_another(tmp_path: Path) -> None:
    run_toy("right-forward", ["eager"], output=tmp_path)
    first = run_toy("right-backward", ["eager"], output=tmp_path, append=True)
    assert [row.case for row in first.rows] == ["right-forward", "right-backward"]
    [kept, _] = first.rows
    again = run_toy("right-backward", ["eager"], output=tmp_path, append=True)
    assert [row.case for row in again.rows] == ["right-forward", "right-backward"]
    assert again.rows[0].ours.median == pytest.approx(kept.ours.median, rel=1e-4)
    [file] = tmp_path.iterdir()
    assert len(results.load(file).rows) == 2
    file.write_text(file.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(UserError, match="comes from another commit, PyTorch, machine or settings"):
        run_toy("right-backward", ["eager"], output=tmp_path, append=True)
    assert len(run_toy("right-backward", ["eager"], output=tmp_path).rows) == 1


def test_a_budget_ends_the_run_and_headline_cases_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(run, "measure", lambda case, *_: measured.append(case.name) or ([], []))
    monkeypatch.setattr(registry, "_import", lambda *_: SimpleNamespace(cases=lambda: reversed(list(TOY_CASES))))
    assert run_toy("right", ["eager"]).complete
    assert measured == ["right-forward", "right-backward"]
    assert not run_toy("right", ["eager"], budget=-1).complete
    assert len(measured) == 2


def test_a_case_for_gpus_is_left_out_on_a_cpu_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(TOY_CASES[0], name="large", needs_gpu="of its size")
    monkeypatch.setattr(registry, "_import", lambda *_: SimpleNamespace(cases=lambda: [large, TOY_CASES[0]]))
    measured: list[str] = []
    monkeypatch.setattr(run, "measure", lambda case, *_: measured.append(case.name) or ([], []))
    result = run_toy("", ["eager"])
    assert measured == ["right-forward"]
    assert result.complete
    assert result.skipped == (results.Skip("large", "it runs on a GPU alone (of its size)"),)
    assert "not run: large: it runs on a GPU alone (of its size)." in report.markdown(result)
    assert run_toy("large", ["eager"]).complete
    assert not large.obstacle("cuda")


def test_rounds_are_at_least_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []
    monkeypatch.setattr(run, "measure", lambda case, peers, settings, *_: asked.append(settings) or ([], []))
    assert run.main(arguments("--op", "add_noise", "--case", "bf16", "--rounds", "7", "--quick")) == 0
    assert {(settings.min_rounds, settings.seconds) for settings in asked} == {(7, Settings.quick().seconds)}
    with pytest.raises(UserError, match="--rounds must be at least 1, got 0"):
        run.main(arguments("--rounds", "0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--device cuda: PyTorch finds no CUDA device here"):
        run.main(arguments("--device", "cuda"))


def test_an_output_that_cannot_be_written_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *args: pytest.fail("measured before the output was checked"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        run_toy("right", ["eager"], output=tmp_path / "file")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(words)


def test_list_shows_cases_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments("--op", "group_norm_act", "--case", "^4x64x8x8", "--list")) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "group_norm_act  4x64x8x8-scale_shift-silu-bf16-nchw-forward  (eager, addcmul, compile)" in shown
    assert all(" 4x64x8x8-" in line for line in shown)


def test_unknown_names_are_user_errors() -> None:
    with pytest.raises(UserError, match="did you mean 'group_norm_act'"):
        run.main(arguments("--op", "groupnorm_act"))
    with pytest.raises(UserError, match="no peer 'onnx'"):
        run.main(arguments("--peers", "eager,onnx"))


@pytest.mark.skipif(
    imagen_fast.backends.unavailable_reason("cpu") is not None, reason="the C++ library is not built here"
)
def test_the_command_on_the_real_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--op", "group_norm_act", "--case", "^4x64x8x8.*bf16-nhwc", "--peers", "eager,addcmul", "--threads", "1"]
    assert run.main(arguments(*words, "--quick", "--output", str(tmp_path))) == 0
    [file] = tmp_path.glob("group_norm_act-*-1-threads.json")
    result = results.load(file)
    assert [(row.direction, row.backend, row.peer) for row in result.rows] == [
        ("forward", "cpu", "eager"),
        ("forward", "cpu", "addcmul"),
        ("backward", "cpu", "eager"),
        ("backward", "cpu", "addcmul"),
    ]
    assert result.complete
    assert json.loads(file.read_text())["schema"] == results.SCHEMA
    assert "4×64×8×8, scale-shift, silu" in capsys.readouterr().out


def test_registry_and_report_agree_on_tags() -> None:
    headline = [case for case in registry.load("group_norm_act") if "headline" in case.tags]
    assert {(case.dtype, case.layout) for case in headline} >= {(torch.bfloat16, "nchw"), (torch.bfloat16, "nhwc")}
    assert report.select(run_toy("right", ["eager"]), tag="headline").rows[0].case == "right-forward"
