from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imagen_fast.bench import clocks, registry, timing
from imagen_fast.bench.timing import Contender, Settings, contender, interleave, summarise

TOY = Path(__file__).parent / "cases"
SHORT = Settings(seconds=0.02, batch_seconds=1e-4, min_rounds=5, max_rounds=20)


def toy(name: str) -> registry.Case:
    return next(case for case in registry.load("add_one", TOY) if case.name == name)


def test_quantiles() -> None:
    found = summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], calls_per_sample=7)
    assert (found.q20, found.median, found.q80) == pytest.approx((2.0, 3.5, 5.0))
    assert (found.rounds, found.calls) == (6, 42)


def test_times_what_each_contender_takes() -> None:
    def sleeper(seconds: float) -> Contender:
        return Contender(f"{seconds}", call=lambda _: time.sleep(seconds), state=lambda: None)

    found = interleave([sleeper(0.02), sleeper(0.001)], SHORT)
    assert found["0.02"].median >= 0.02
    assert 0.001 <= found["0.001"].median < 0.02


def test_rounds_interleave_in_changing_order_with_one_call_off_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    contenders = [Contender(name, call=lambda _, name=name: log.append(name), state=lambda: None) for name in "ab"]
    monkeypatch.setattr(timing, "_batch_size", lambda *_: 2)
    interleave(contenders, dataclasses.replace(SHORT, min_rounds=20, seconds=1e-9))
    rounds = "".join(log[-20 * 2 * 3 :])
    each = [rounds[i : i + 6] for i in range(0, len(rounds), 6)]
    assert set(each) == {"aaabbb", "bbbaaa"}


def test_cold_sweeps_the_caches_between_the_state_and_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(clocks.HostClock, "sweeper", lambda _: lambda: log.append("sweep"))
    cold = Contender("c", call=lambda _: log.append("call"), state=lambda: log.append("state"))
    found = interleave([cold], dataclasses.replace(SHORT, cold=True))["c"]
    assert found.calls == found.rounds
    assert log[-10:] == ["state", "call", "state", "sweep", "call"] * 2


def test_the_sweep_exceeds_the_last_level_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "last_level_cache", lambda device: 1000)
    assert clocks.clock("cpu").sweeper()().numel() == 2000  # type: ignore[attr-defined]


def test_forward_runs_without_gradients() -> None:
    seen: list[bool] = []
    case = toy("right-forward")
    interleave([contender("c", case, lambda x: seen.append(torch.is_grad_enabled()), case.make_inputs(0))], SHORT)
    assert not any(seen)
    assert torch.is_grad_enabled()


class SlowForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy


@pytest.mark.parametrize(("direction", "slow"), [("backward", False), ("forward_backward", True)])
def test_the_backward_is_timed_without_its_forward(direction: Any, slow: bool) -> None:
    case = dataclasses.replace(toy("right-backward"), direction=direction)
    found = interleave([contender("c", case, lambda x: SlowForward.apply(x), case.make_inputs(0))], SHORT)["c"]
    assert (found.median >= 0.05) == slow


def test_every_backward_gets_a_graph_of_its_own() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.used = False
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            assert not ctx.used, "a graph was used twice"
            ctx.used = True
            return dy

    case = toy("right-backward")
    interleave([contender("c", case, lambda x: Once.apply(x), case.make_inputs(0))], SHORT)


def test_garbage_collection_is_off_inside_and_back_afterwards() -> None:
    seen: list[bool] = []
    interleave([Contender("c", call=lambda _: seen.append(gc.isenabled()), state=lambda: None)], SHORT)
    assert not any(seen)
    assert gc.isenabled()

    def fail(_: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        interleave([Contender("c", call=fail, state=lambda: None)], SHORT)
    assert gc.isenabled()


class FakeDevice:
    """torch.cuda as far as the clock uses it: time passes by spinning and by calls, and a log says in which order."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: self.log.append("event") or setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def _sleep(self, cycles: int) -> None:
        self.log.append("spin")
        self.now += cycles / 1e9

    def synchronize(self) -> None:
        self.log.append("wait")


def test_a_device_times_calls_by_its_own_events_behind_a_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "cuda", device)
    clock = clocks.DeviceClock()
    assert clock._cycles_per_second == pytest.approx(1e9)
    device.log.clear()

    def call(seconds: float) -> None:
        device.log.append("call")
        device.now += seconds

    before = device.now
    assert clock.seconds(call, [3e-5, 4e-5], 1e-3, whole=False) == pytest.approx(7e-5)
    assert device.log == ["spin", "event", "call", "call", "event", "wait"]
    assert device.now - before == pytest.approx(2e-3 + 7e-5)  # twice what the host took to queue the calls


def test_the_cost_of_a_call_includes_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "cuda", device)
    clock = clocks.DeviceClock()
    device.log.clear()
    assert clock.seconds(lambda _: time.sleep(2e-3), [None] * 2, 0.0, whole=True) >= 4e-3
    assert device.log == ["wait", "wait"]
