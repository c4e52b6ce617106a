"""A whole model, measured: ours and every variant of every peer in a process of its own, in turns; gives the rows."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import check
from .floor import Limits
from .isolated import OURS, Process, Ready
from .peers import PeerError, PeerResult
from .registry import Case
from .results import Cost, Failure, Row, row
from .timing import Settings, Timing, summarise

_TURNS = 5
_REST = 0.2  # seconds between turns, in which idle threads of the last one stop spinning

_Contender = tuple[str, str]  # a peer, or ours, and its variant


def measure_apart(
    case: Case, peers: Sequence[str], settings: Settings, limits: Limits, directory: Path
) -> tuple[list[Row], list[Failure]]:
    """As `measure.measure`, for a case with `apart`."""
    assert case.apart is not None
    wanted = {OURS: tuple(case.apart.variants)}
    wanted |= {peer.name: tuple(peer.variants) for peer in case.peers if peer.name in peers}
    failures: list[Failure] = []
    with contextlib.ExitStack() as stack:
        truth = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagen-fast-bench-"))) / "truth.pt"
        check.truth(case, case.checked_inputs(settings.device)).save(truth)
        ready: dict[_Contender, Ready] = {}
        processes: dict[_Contender, Process] = {}
        for contender in ((name, variant) for name, variants in wanted.items() for variant in variants):
            process = stack.enter_context(Process(case, *contender, settings, directory, truth, _TURNS))
            try:
                ready[contender] = process.prepare()
            except PeerError as error:
                failures.append(Failure(case.name, contender[0], str(error)))
            else:
                processes[contender] = process
        timings, memory = _take_turns(case, processes, ready, failures)
    return _rows(case, wanted, ready, timings, memory, settings, limits), failures


def _take_turns(
    case: Case, processes: dict[_Contender, Process], ready: dict[_Contender, Ready], failures: list[Failure]
) -> tuple[dict[_Contender, Timing], dict[_Contender, float]]:
    """Timings, and largest memory in MiB."""
    samples: dict[_Contender, list[float]] = {contender: [] for contender in processes}
    memory: dict[_Contender, float] = {}
    order, shuffle = list(processes), random.Random(0).shuffle
    for _ in range(_TURNS):
        shuffle(order)
        for contender in list(order):
            time.sleep(_REST)
            try:
                turn = processes[contender].turn()
            except PeerError as error:
                failures.append(Failure(case.name, contender[0], str(error)))
                order.remove(contender)
                del samples[contender]
            else:
                samples[contender] += turn.samples
                memory[contender] = turn.memory
    timings = {contender: summarise(values, ready[contender].calls_per_sample) for contender, values in samples.items()}
    return timings, memory


def _rows(
    case: Case,
    wanted: dict[str, tuple[str, ...]],
    ready: dict[_Contender, Ready],
    timings: dict[_Contender, Timing],
    memory: dict[_Contender, float],
    settings: Settings,
    limits: Limits,
) -> list[Row]:
    """Ours against the fastest variant of each peer."""
    best = {
        name: min(able, key=lambda contender: timings[contender].median)
        for name, variants in wanted.items()
        if (able := [(name, variant) for variant in variants if (name, variant) in timings])
    }
    ours = best.pop(OURS, None)
    if ours is None:
        return []
    accuracy = ready[ours].accuracy
    assert accuracy is not None
    costs = {
        contender: Cost.of(case.shape[0], timing.median, ready[contender].seconds, memory[contender])
        for contender, timing in timings.items()
    }
    floor = limits.floor(case.bytes, case.flops, case.dtype, settings.cold)
    rows = []
    for name, theirs in best.items():
        seconds = sum(ready[name, variant].seconds for variant in wanted[name] if (name, variant) in ready)
        result = PeerResult(theirs[1], timings[theirs], ready[theirs].errors, seconds)
        rows.append(row(case, "auto", timings[ours], accuracy, name, result, floor, True, costs[ours], costs[theirs]))
    return rows
