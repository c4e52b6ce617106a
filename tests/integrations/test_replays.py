"""Calls of a function on the CPU that are repeated as lists of operators: when they are recorded, and when not."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast.integrations import _operators
from imagen_fast.integrations._once import once_of_graph
from imagen_fast.integrations._replays import ReplayPool, _Replay


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = normal(5, 5, seed=9)


@pytest.fixture
def pool() -> ReplayPool:
    return ReplayPool("f", limit=2)


def call(pool: ReplayPool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return pool.run(function, args, kwargs)


class Counted:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def test_a_kind_is_recorded_then_checked_then_repeated(pool: ReplayPool) -> None:
    function = Counted(lambda x, factor=2.0: {"y": x * factor})
    results = [(call(pool, function, normal(3, 5, seed=seed)), seed) for seed in range(6)]
    assert (function.calls, pool.recorded, pool.replayed) == (3, 1, 3)
    for result, seed in results:  # none is written to by a later call
        assert torch.equal(result["y"], normal(3, 5, seed=seed) * 2)


@pytest.mark.parametrize("how", ["dense", "expanded", "strided", "inference"])
def test_inputs_of_any_strides(pool: ReplayPool, how: str) -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return (x.reshape(-1) * 2 + t.reshape(2, -1).sum()).view(3, -1)

    for seed in range(5):
        with torch.inference_mode(how == "inference"):
            x, t = normal(3, 8, seed=seed), normal(1, seed=seed)
            x = normal(3, 16, seed=seed)[:, ::2] if how == "strided" else x
            t = t.expand(6) if how == "expanded" else t.repeat(6)
            torch.testing.assert_close(call(pool, function, x, t), function(x, t), rtol=0, atol=0)
    assert pool.replayed == 2


def test_results_do_not_share_memory_with_inputs_or_each_other(pool: ReplayPool) -> None:
    x = normal(4)
    results = [call(pool, lambda x: (x, WEIGHT), x) for _ in range(5)]
    for first, second in results[3:]:
        assert first.data_ptr() != x.data_ptr()
        assert second.data_ptr() != WEIGHT.data_ptr()


def test_the_least_recently_used_record_goes(pool: ReplayPool) -> None:
    for size in (1, 2, 1, 3, 1):
        for _ in range(4):
            call(pool, torch.exp, torch.ones(size))
    assert (len(pool), pool.recorded) == (2, 3)


def test_records_that_are_never_used_are_given_up(pool: ReplayPool, caplog: pytest.LogCaptureFixture) -> None:
    for size in range(1, 9):
        for _ in range(2):
            assert torch.equal(call(pool, torch.neg, torch.ones(size)), -torch.ones(size))
    assert pool.recorded == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "none was used again" in caplog.text


def _writing(x: Tensor) -> Tensor:
    return x.mul_(2)


def _object(x: Tensor) -> Any:
    return threading.Event()


NOT_RECORDED = [(_writing, "writes to its arguments"), (_object, "holds a Event")]


@pytest.mark.parametrize(("function", "reason"), NOT_RECORDED, ids=[reason for _, reason in NOT_RECORDED])
def test_what_cannot_be_recorded_runs_as_it_is(
    pool: ReplayPool, function: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(4):
        given, same = torch.ones(3), torch.ones(3)
        found, wanted = call(pool, function, given), function(same)
        if isinstance(wanted, Tensor):
            assert torch.equal(found, wanted)
        assert torch.equal(given, same)
    assert (pool.recorded, len(caplog.records)) == (0, 1)
    assert reason in pool.reasons[0]


def test_random_numbers_are_drawn_as_by_the_call(pool: ReplayPool) -> None:
    def function(x: Tensor) -> Tensor:
        torch.rand(2)  # nobody reads them
        return x + torch.randn_like(x) + torch.randn_like(WEIGHT[0, :3])

    torch.manual_seed(0)
    found = [call(pool, function, torch.ones(3)) for _ in range(6)]
    torch.manual_seed(0)
    assert all(torch.equal(each, function(torch.ones(3))) for each in found)
    assert pool.replayed == 3


def test_what_is_made_once_is_not_written_to(pool: ReplayPool) -> None:
    def function(x: Tensor, text: Tensor) -> Tensor:
        once = once_of_graph()
        made = text * 2 if once is None else once.of("text", [text], lambda: text * 2)
        return x + made[1:].add_(1)

    for seed in range(4):
        x, text = normal(2, seed=seed), normal(3, seed=9)
        assert torch.equal(call(pool, function, x, text), x + (text[1:] * 2 + 1))
    assert pool.recorded == 0


def test_a_record_that_fails_its_check_leaves_the_generator_alone(pool: ReplayPool) -> None:
    def function(x: Tensor) -> Tensor:
        return x + torch.rand(1 + int(x.numpy()[0])).sum()  # how many are drawn no operator tells

    for number in range(4):
        x = torch.full((3,), float(number))
        torch.manual_seed(0)
        found = call(pool, function, x)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(found, function(x))
        assert torch.equal(state, torch.get_rng_state())
    assert pool.replayed == 0


def test_random_numbers_of_others_are_left_to_them(pool: ReplayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    repeat = _Replay.run

    def meanwhile(self: _Replay, *args: Any) -> Any:
        torch.rand(5)  # by another thread
        return repeat(self, *args)

    monkeypatch.setattr(_Replay, "run", meanwhile)
    torch.manual_seed(0)
    for seed in range(4):
        call(pool, torch.exp, normal(3, seed=seed))
    state = torch.get_rng_state()
    assert pool.replayed == 1
    torch.manual_seed(0)
    for _ in range(2):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_made_once_is_made_after_an_interruption(pool: ReplayPool) -> None:
    interrupted = False

    def double(text: Tensor) -> Tensor:
        if interrupted:
            raise KeyboardInterrupt
        return text * 2

    def function(x: Tensor, text: Tensor) -> Tensor:
        once = once_of_graph()
        return x + (double(text) if once is None else once.of("text", [text], lambda: double(text)))

    x, text, other = normal(2), normal(2, seed=1), normal(2, seed=2)
    for _ in range(4):
        call(pool, function, x, text)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        call(pool, function, x, other)
    interrupted = False
    assert torch.equal(call(pool, function, x, other), x + other * 2)
    assert pool.replayed == 3


def test_what_depends_on_weights_alone_is_not_kept_at_any_price(
    pool: ReplayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(x: Tensor) -> Tensor:
        return x @ (WEIGHT * 2).t() + WEIGHT[0]  # what is a view is nobody's

    monkeypatch.setattr(_operators, "_MOST_FOLDED", WEIGHT.nbytes)
    for _ in range(4):
        call(pool, function, normal(3, 5))
    assert pool.replayed == 1
    monkeypatch.setattr(_operators, "_MOST_FOLDED", WEIGHT.nbytes - 1)
    for _ in range(4):
        call(pool, function, normal(4, 5))
    assert pool.replayed == 1
    assert any("weights alone" in reason for reason in pool.reasons)


def test_a_record_that_goes_takes_its_tensors_with_it(pool: ReplayPool) -> None:
    weight = normal(4, 4)

    def function(x: Tensor) -> Tensor:
        return x @ (weight * 2)

    for _ in range(4):
        call(pool, function, normal(3, 4))
    (replay,) = pool._records.values()
    (kept,) = (weakref.ref(tensor) for tensor in replay._program.constants)
    del replay
    gc.disable()
    try:
        pool.clear()
        assert kept() is None
    finally:
        gc.enable()


def test_strictness_is_a_setting(pool: ReplayPool) -> None:
    for _ in range(3):
        call(pool, torch.exp, torch.ones(3))
    with imagen_fast.use_backend("auto", strict=True):
        call(pool, torch.exp, torch.ones(3))
    assert pool.replayed == 0


def test_what_depends_on_more_than_the_inputs_is_part_of_the_record(pool: ReplayPool) -> None:
    def function(x: Tensor) -> Tensor:
        y, once = x + 1, once_of_graph()
        return y * 2 if once is None else once.of("text", [y], lambda: y * 2)

    for seed in range(5):
        assert torch.equal(call(pool, function, normal(3, seed=seed)), (normal(3, seed=seed) + 1) * 2)
    assert pool.replayed == 2


def test_a_look_at_numbers_that_no_operator_tells_is_found_out(
    pool: ReplayPool, caplog: pytest.LogCaptureFixture
) -> None:
    def function(x: Tensor) -> Tensor:
        return x * float(x.numpy()[0])  # no operator

    for seed in range(5):
        x = normal(3, seed=seed)
        assert torch.equal(call(pool, function, x), function(x))
    assert (pool.replayed, len(pool)) == (0, 0)
    assert "other numbers" in caplog.text


def test_errors_are_the_functions_own(pool: ReplayPool) -> None:
    def function(x: Tensor) -> Tensor:
        raise KeyError("mine")

    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            call(pool, function, torch.ones(3))


def test_a_record_of_what_has_changed_meanwhile_is_dropped(pool: ReplayPool) -> None:
    call(pool, torch.exp, torch.ones(3))

    def function(x: Tensor) -> Tensor:
        pool.clear()  # by another thread, which has seen a change
        return x.exp()

    call(pool, function, torch.ones(3))
    assert (pool.recorded, len(pool)) == (1, 0)


def test_threads_do_not_wait_for_each_other(pool: ReplayPool) -> None:
    for seed in range(3):
        call(pool, torch.exp, normal(3, seed=seed))
    (replay,) = pool._records.values()
    with replay.lock:  # as if another thread were in it
        assert torch.equal(call(pool, torch.exp, torch.ones(3)), torch.ones(3).exp())
    assert pool.replayed == 0
    results: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        results[seed] = call(pool, torch.exp, normal(3, seed=seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], normal(3, seed=seed).exp()) for seed in range(8))
