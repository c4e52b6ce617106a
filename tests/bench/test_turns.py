"""Whole models: every contender in a process of its own, in turns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from imagen_fast.bench import check, isolated, registry, timing, turns
from imagen_fast.bench.floor import CopyRate, Limits, MatmulRate
from imagen_fast.bench.results import Failure, Row
from imagen_fast.bench.timing import Settings

TOY = Path(__file__).parent / "cases"
SHORT = Settings(seconds=0.005, batch_seconds=1e-4, min_rounds=5, max_rounds=20)
RIGHT, WRONG = registry.load("model_scaled", TOY)


def measured(case: registry.Case, *peers: str) -> tuple[list[Row], list[Failure]]:
    limits = Limits((CopyRate(256, 1e10),), (MatmulRate("fp32", 1e11),))
    return turns.measure_apart(case, peers, SHORT, limits, TOY)


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, Row], dict[str, str]]:
    rows, failures = measured(RIGHT, "eager", "two", "wrong", "dying")
    return {row.peer: row for row in rows}, {failure.contender: failure.message for failure in failures}


def test_ours_is_compared_with_the_variants_that_run(found: tuple[dict[str, Row], dict[str, str]]) -> None:
    rows, _ = found
    assert set(rows) == {"eager", "two"}
    assert rows["eager"].ours == rows["two"].ours
    assert rows["two"].variant == "greedy"
    for row in rows.values():
        assert row.interleaved
        assert row.ratio == row.theirs.median / row.ours.median
        assert row.ours.rounds >= SHORT.min_rounds
        assert row.error <= row.allowed_error


def test_each_process_tells_its_own_costs(found: tuple[dict[str, Row], dict[str, str]]) -> None:
    rows, _ = found
    ours, eager, greedy = rows["eager"].our_cost, rows["eager"].their_cost, rows["two"].their_cost
    assert ours is not None
    assert eager is not None
    assert greedy is not None
    assert 0 <= greedy.preparation < greedy.first_result < 5
    assert greedy.throughput == pytest.approx(8 / rows["two"].theirs.median)
    assert greedy.memory - eager.memory == pytest.approx(64, abs=20), "64 MiB more"
    assert ours.memory == pytest.approx(eager.memory, abs=20)


def test_contenders_that_fail_say_why_and_stop_nobody(found: tuple[dict[str, Row], dict[str, str]]) -> None:
    _, failures = found
    assert failures == {
        "two": "two (broken): ZeroDivisionError: division by zero",
        "wrong": "wrong (wrong) does not compute the same thing: output is off by 0.1, relatively",
        "dying": "its process ended with code 3: no output",
    }


def test_an_inaccurate_model_is_not_timed() -> None:
    rows, [failure] = measured(WRONG, "eager")
    assert not rows
    assert failure.contender == isolated.OURS
    assert "less accurate than the eager model" in failure.message


def test_renewed_inputs_are_others_at_each_call_and_the_rest_stays() -> None:
    values = RIGHT.make_inputs(0)
    contender = timing.contender("c", RIGHT, RIGHT.ours, values)
    drawn = [contender.state() for _ in range(3)]
    assert all(state["y"] is values["y"] for state in drawn)
    assert len({state["x"].sum().item() for state in (values, *drawn)}) == 4


def test_a_sampling_loop_is_held_to_many_samples() -> None:
    sampled = dataclasses.replace(RIGHT, samples_checked=20)
    inputs = sampled.checked_inputs()
    assert [each["x"].shape[0] for each in inputs] == [8, 8, 8]
    truth = check.truth(sampled, inputs)
    ours = check.results(sampled, sampled.ours, inputs)
    assert torch.equal(ours["output"][8:16], RIGHT.ours(**RIGHT.make_inputs(1)))
    assert check.accuracy(sampled, ours, truth).error <= check.accuracy(sampled, ours, truth).allowed
    ours["output"][20:] *= 1 + 1e-4  # of the last batch
    with pytest.raises(AssertionError, match="over 24"):
        check.accuracy(sampled, ours, truth)


def test_the_truth_of_another_process_is_the_same(tmp_path: Path) -> None:
    truth = check.truth(RIGHT, RIGHT.checked_inputs())
    truth.save(tmp_path / "truth.pt")
    read = check.Truth.load(tmp_path / "truth.pt")
    assert torch.equal(read.truth["output"], truth.truth["output"])
    assert torch.equal(read.eager["output"], truth.eager["output"])
