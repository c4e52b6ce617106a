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
- Python's garbage collector is off while measuring. Direction "forward" runs under `torch.no_grad()`.

Only the CPU's clock is here. A GPU needs events or graph replay in the place of `_batch`; nothing else changes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .provenance import last_level_cache
from .registry import Case, Function

_UNKNOWN_CACHE = 64 << 20  # bytes to sweep where the system does not tell


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        seconds: time for each contender, forwards outside the clock included.
        batch_seconds: length of a batch.
        min_rounds, max_rounds: bounds on the number of rounds.
        cold: sweep the caches before each call.
    """

    seconds: float = 0.5
    batch_seconds: float = 2e-3
    min_rounds: int = 21
    max_rounds: int = 401
    cold: bool = False

    @classmethod
    def quick(cls, cold: bool = False) -> Settings:
        """A look, not a record."""
        return cls(seconds=0.05, batch_seconds=5e-4, min_rounds=5, max_rounds=101, cold=cold)


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
    """

    name: str
    call: Callable[[Any], Any]
    state: Callable[[], Any]
    one_by_one: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def contender(
    name: str,
    case: Case,
    function: Function,
    values: dict[str, Any],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Contender:
    """`function` on the inputs `values` in the direction of the case, ready to be timed."""
    if case.direction == "forward":
        return Contender(name, lambda given: function(**given), lambda: values, context=lambda: _no_grad(context))

    wanted = [values[key] for key in case.differentiable]
    with context():
        upstream = output_gradients(function(**values))

    def forward() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return tensors(function(**values)), wanted, upstream

    def backward(state: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> Any:
        return torch.autograd.grad(*state)

    if case.direction == "backward":
        return Contender(name, backward, forward, one_by_one=True, context=context)
    return Contender(name, lambda _: backward(forward()), lambda: None, context=context)


def interleave(contenders: Sequence[Contender], settings: Settings) -> dict[str, Timing]:
    """Time all contenders, at least one and of different names, side by side."""
    sweep = _sweeper() if settings.cold else None
    with _no_garbage_collection():
        costs = {c.name: _warm_up(c, settings) for c in contenders}  # seconds: of the call, of call and state
        sizes = {c.name: _batch_size(c, costs[c.name][0], settings) for c in contenders}
        one_round = sum(costs[c.name][1] * (sizes[c.name] + 1) for c in contenders)
        if sweep is not None:
            one_round += len(contenders) * _seconds(sweep)
        budget = settings.seconds * len(contenders)
        rounds = min(max(math.ceil(budget / one_round), settings.min_rounds), settings.max_rounds)
        samples: dict[str, list[float]] = {c.name: [] for c in contenders}
        shuffle = random.Random(0).shuffle
        order = list(contenders)
        for _ in range(rounds):
            shuffle(order)
            for c in order:
                samples[c.name].append(_batch(c, sizes[c.name], sweep))
    return {name: summarise(values, sizes[name]) for name, values in samples.items()}


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


def _batch(c: Contender, size: int, sweep: Callable[[], object] | None) -> float:
    """Seconds per call of one batch."""
    with c.context():
        c.call(c.state())
        states = [c.state() for _ in range(size)]
        call = c.call
        if sweep is not None:
            sweep()
        start = time.perf_counter()
        for state in states:
            call(state)
        return (time.perf_counter() - start) / size


def _warm_up(c: Contender, settings: Settings) -> tuple[float, float]:
    """Call until times have settled; returns seconds of one call, and of one call with the making of its state."""
    calls: list[float] = []
    whole: list[float] = []
    begin = time.perf_counter()
    with c.context():
        while len(calls) < 3 or (time.perf_counter() - begin < settings.seconds / 10 and len(calls) < 1000):
            before = time.perf_counter()
            state = c.state()
            start = time.perf_counter()
            c.call(state)
            end = time.perf_counter()
            calls.append(end - start)
            whole.append(end - before)
            del state
    return sorted(calls)[len(calls) // 2], sorted(whole)[len(whole) // 2]


def _batch_size(c: Contender, seconds_per_call: float, settings: Settings) -> int:
    if c.one_by_one or settings.cold:
        return 1
    return min(max(math.ceil(settings.batch_seconds / max(seconds_per_call, 1e-7)), 1), 1000)


def _sweeper() -> Callable[[], object]:
    """A function that fills the caches with what nobody needs."""
    buffer = torch.zeros(2 * (last_level_cache() or _UNKNOWN_CACHE), dtype=torch.uint8)
    return lambda: buffer.add_(1)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
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
