"""The clock: ours and its peers interleaved in one process, in random order, over many rounds.

How a number comes about:

- A *round* gives every contender one batch, in an order drawn anew each round, so that a drift of the machine's speed
  (frequency, temperature, neighbours) falls on all of them alike. The result is the median over the rounds of the time
  per call, with the 20 % and 80 % quantiles.
- A *batch* begins with one call outside the clock: the others have just run and have taken the caches. Then follow as
  many calls as fill about two milliseconds, found by calibration. Warm-up and calibration are not counted.
- `cold=False` calls on the same inputs again and again: in cache where they fit, as a network meets what the layer
  before has just written. `cold=True` times one call at a time, after writing through a buffer twice the size of the
  last-level cache: inputs, saved tensors and the memory of outputs come from main memory, and so does the code.
- The *backward* is the time of `torch.autograd.grad` alone, on a graph that a forward outside the clock has just built
  for this one call. No graph is retained: peers that would free or reuse saved tensors during the backward may do so.
  What a contender shifts into its forward shows in direction "forward_backward", which times both together.
- Whole models are timed in processes of their own, which all live until the last one is done. They take turns, in an
  order drawn anew, and in a turn one of them gets a few batches after one call outside the clock (`InTurns`).
- Python's garbage collector is off while measuring. Direction "forward" runs under `torch.no_grad()`.
- On a GPU a batch is timed by the device; `clocks` says how.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clocks import Clock, clock
from .registry import Case, Function


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        seconds: time for each contender, forwards outside the clock included.
        batch_seconds: length of a batch.
        min_rounds, max_rounds: bounds on the number of rounds.
        cold: sweep the caches before each call.
        device: where: "cpu" or "cuda".
    """

    seconds: float = 0.5
    batch_seconds: float = 2e-3
    min_rounds: int = 21
    max_rounds: int = 401
    cold: bool = False
    device: str = "cpu"

    @classmethod
    def quick(cls, cold: bool = False, device: str = "cpu") -> Settings:
        """A look, not a record."""
        return cls(seconds=0.05, batch_seconds=5e-4, min_rounds=5, max_rounds=101, cold=cold, device=device)


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds, and how many rounds and calls in all they come from."""

    median: float
    q20: float
    q80: float
    rounds: int
    calls: int


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Args:
        name: the key of its timing.
        call: what is timed, given a state.
        state: makes the state for one call, outside the clock: the inputs, or for a backward the graph.
        one_by_one: a state must be used as soon as it is made (a backward, whose tensors are then in cache).
        context: entered around each batch, outside the clock (the choice of backend).
        whole: on a GPU, what a call costs the host counts too.
    """

    name: str
    call: Callable[[Any], Any]
    state: Callable[[], Any]
    one_by_one: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    whole: bool = False


def contender(
    name: str,
    case: Case,
    function: Function,
    values: dict[str, Any],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Contender:
    """`function` on the inputs `values` in the direction of the case, ready to be timed."""
    whole = "overhead" in case.tags
    if case.direction == "forward":
        no_grad = partial(_no_grad, context)
        call, state = lambda given: function(**given), _renewing(case, values)
        return Contender(name, call, state, context=no_grad, whole=whole)

    wanted = [values[key] for key in case.differentiable]
    with context():
        upstream = output_gradients(function(**values))

    def forward() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return tensors(function(**values)), wanted, upstream

    def backward(state: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> Any:
        return torch.autograd.grad(*state)

    if case.direction == "backward":
        return Contender(name, backward, forward, one_by_one=True, context=context, whole=whole)
    return Contender(name, lambda _: backward(forward()), lambda: None, context=context, whole=whole)


def _renewing(case: Case, values: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Makes the inputs of a call: `values`, with what the case wants new at each call drawn from a seed of its own."""
    if not case.renewed:
        return lambda: values
    seeds = itertools.count(1)
    device = next(value.device.type for value in values.values() if isinstance(value, Tensor))

    def renewed() -> dict[str, Any]:
        drawn = case.make_inputs(next(seeds), device)
        return values | {name: drawn[name] for name in case.renewed}

    return renewed


def interleave(contenders: Sequence[Contender], settings: Settings) -> dict[str, Timing]:
    """Time all contenders, at least one and of different names, side by side."""
    device = clock(settings.device)
    sweep = device.sweeper() if settings.cold else None
    with _no_garbage_collection():
        costs = {c.name: _warm_up(c, device, settings) for c in contenders}
        sizes = {c.name: _batch_size(c, costs[c.name].call, device, settings) for c in contenders}
        one_round = sum(costs[c.name].whole * (sizes[c.name] + 1) for c in contenders)
        if sweep is not None:
            one_round += len(contenders) * _seconds(sweep, device)
        budget = settings.seconds * len(contenders)
        rounds = min(max(math.ceil(budget / one_round), settings.min_rounds), settings.max_rounds)
        samples: dict[str, list[float]] = {c.name: [] for c in contenders}
        shuffle = random.Random(0).shuffle
        order = list(contenders)
        for _ in range(rounds):
            shuffle(order)
            for c in order:
                samples[c.name].append(_batch(c, sizes[c.name], costs[c.name].queueing, device, sweep))
    return {name: summarise(values, sizes[name]) for name, values in samples.items()}


class InTurns:
    """One contender, timed a few rounds at a time, so that those of other processes have theirs in between.

    Args:
        contender: what is timed; it is warmed up here.
        settings: how long, in all.
        turns: how many times it will be asked.
    """

    def __init__(self, contender: Contender, settings: Settings, turns: int) -> None:
        self.contender = contender
        self._clock = clock(settings.device)
        self._sweep = self._clock.sweeper() if settings.cold else None
        with _no_garbage_collection():
            self._cost = _warm_up(contender, self._clock, settings)
            self.calls_per_sample = _batch_size(contender, self._cost.call, self._clock, settings)
        rounds = math.ceil(settings.seconds / (self._cost.whole * self.calls_per_sample))
        self.rounds = math.ceil(min(max(rounds, settings.min_rounds), settings.max_rounds) / turns)

    def turn(self) -> list[float]:
        """Seconds per call of each batch of this turn."""
        with _no_garbage_collection():
            return [
                _batch(self.contender, self.calls_per_sample, self._cost.queueing, self._clock, self._sweep, lead=not i)
                for i in range(self.rounds)
            ]


def summarise(samples: Sequence[float], calls_per_sample: int = 1) -> Timing:
    """Median and quantiles of seconds per call."""
    q20, median, q80 = (
        torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )
    return Timing(median=median, q20=q20, q80=q80, rounds=len(samples), calls=len(samples) * calls_per_sample)


def tensors(output: Any) -> list[Tensor]:
    """The tensors among the outputs of a function."""
    return [output] if isinstance(output, Tensor) else [value for value in output if isinstance(value, Tensor)]


def output_gradients(output: Any, seed: int = 0) -> list[Tensor]:
    """Random gradients for the outputs, in their dtype and layout; the same numbers whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in tensors(output)]


def _batch(
    c: Contender, size: int, queueing: float, device: Clock, sweep: Callable[[], object] | None, lead: bool = True
) -> float:
    """Seconds per call of one batch; `queueing` is the host's time for one call, `lead` a call before the clock."""
    with c.context():
        if lead:
            c.call(c.state())
        states = [c.state() for _ in range(size)]
        if sweep is not None:
            sweep()
        return device.seconds(c.call, states, queueing * size, c.whole) / size


class _Cost(NamedTuple):
    """Seconds: of one call, of one call with the making of its state, and of the host for one call."""

    call: float
    whole: float
    queueing: float


def _warm_up(c: Contender, device: Clock, settings: Settings) -> _Cost:
    """Call until times have settled."""
    costs: list[_Cost] = []
    begin = time.perf_counter()
    with c.context():
        while len(costs) < 3 or (time.perf_counter() - begin < settings.seconds / 10 and len(costs) < 1000):
            before = time.perf_counter()
            state = c.state()
            device.synchronize()
            start = time.perf_counter()
            c.call(state)
            queued = time.perf_counter()
            device.synchronize()
            end = time.perf_counter()
            costs.append(_Cost(end - start, end - before, queued - start))
            del state
    return _Cost(*(sorted(values)[len(values) // 2] for values in zip(*costs, strict=True)))


def _batch_size(c: Contender, seconds_per_call: float, device: Clock, settings: Settings) -> int:
    if c.one_by_one or settings.cold:
        return 1
    return min(max(math.ceil(settings.batch_seconds / max(seconds_per_call, 1e-7)), 1), device.most_calls)


def _seconds(function: Callable[[], object], device: Clock) -> float:
    start = time.perf_counter()
    function()
    device.synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def _no_grad(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    with context(), torch.no_grad():
        yield


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
