"""Finding launch configurations of an op's Triton kernels on the GPU at hand: what `imagen-fast tune` does.

The cases are those of the benchmarks. A row of the table `kernels/triton/<op>.json` (see `_triton.Configurations`) is
tuned by the cases that use it: each of its numbers is doubled and halved, and a change is kept if it makes these cases
faster, in the geometric mean, by more than what timings vary by; then the neighbours of the new row are tried. Only
rows for the architecture at hand are written, under its own name; all others stay as they are.

Nothing of this happens at run time: a table is tuned once, looked at, and committed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _triton
from .backends import use_backend
from .bench import registry
from .errors import UserError
from .files import atomic_file, check_writable

Row = dict[str, Any]
Table = dict[str, dict[str, list[Row]]]
Timer = Callable[[Any], float]
"""Seconds of a case with the configurations as they are; infinite if it cannot run with them."""

_MARGIN = 0.02  # of the time: what is not faster by so much may be noise
_LARGEST = {"num_warps": 1024, "num_stages": 6}  # num_warps: in threads


class Change(NamedTuple):
    """A row that was made faster: the geometric mean of its cases' times, over what it was."""

    kind: str
    before: Row
    after: Row
    ratio: float


def candidates(row: Row, device: _triton.Device) -> Iterator[Row]:
    """The neighbours of a row: one number doubled or halved, or a stage more or less, within what a device can do."""
    for name, value in row.items():
        if name == "up_to" or isinstance(value, bool):  # which sizes a row serves is the kernel's affair
            continue
        steps = (value + 1, value - 1) if name == "num_stages" else (value * 2, value // 2)
        largest = _LARGEST.get(name, math.inf)
        for step in steps:
            if step >= 1 and step * (device.warp_size if name == "num_warps" else 1) <= largest:
                yield {**row, name: step}


def tune(
    configurations: _triton.Configurations,
    device: _triton.Device,
    cases: Sequence[Any],
    seconds: Timer,
    *,
    deadline: float = math.inf,
) -> tuple[Table, list[Change]]:
    """A table with better rows for the device's architecture, and what was changed.

    Args:
        configurations: of the op; its table is another one while this runs, and is then what it was.
        device: the one that `seconds` times on.
        cases: what to be fast at. Those that no configuration can run are left out.
        seconds: times one of them.
        deadline: on `time.monotonic`; afterwards no candidate is tried any more.
    """
    before = configurations.table
    working = copy.deepcopy(before)
    for kind in working:
        working[kind][device.architecture] = copy.deepcopy(configurations.rows(kind, device))
    changes: list[Change] = []
    configurations.table = working
    try:
        uses, times = _first_look(configurations, cases, seconds)
        for kind in working:
            for row in working[kind][device.architecture]:
                concerned = [i for i in times if id(row) in uses[i]]
                if concerned and (change := _tune_row(kind, row, device, cases, concerned, times, seconds, deadline)):
                    changes.append(change)
    finally:
        configurations.table = before
    changed = {change.kind for change in changes}
    table = copy.deepcopy(before)
    for kind in changed:
        table[kind][device.architecture] = working[kind][device.architecture]
    return table, changes


def _first_look(
    configurations: _triton.Configurations, cases: Sequence[Any], seconds: Timer
) -> tuple[dict[int, set[int]], dict[int, float]]:
    """By case: the rows that it uses, and its time as it is."""
    uses: dict[int, set[int]] = {}
    times: dict[int, float] = {}
    for i, case in enumerate(cases):
        with _lookups(configurations) as found:
            taken = seconds(case)
        if math.isfinite(taken):
            uses[i], times[i] = found, taken
    return uses, times


@contextlib.contextmanager
def _lookups(configurations: _triton.Configurations) -> Iterator[set[int]]:
    """The identities of the rows that are looked up."""
    found: set[int] = set()
    find = configurations.find

    def watched(*arguments: Any, **named: Any) -> Row | None:
        row = find(*arguments, **named)
        found.add(id(row))
        return row

    configurations.find = watched  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del configurations.find


def _tune_row(
    kind: str,
    row: Row,
    device: _triton.Device,
    cases: Sequence[Any],
    concerned: Sequence[int],
    times: dict[int, float],
    seconds: Timer,
    deadline: float,
) -> Change | None:
    """Change a row in its place, and the times of the cases that use it, as long as that gains."""
    before, at_first = dict(row), {i: times[i] for i in concerned}
    tried = [before]
    waiting = list(candidates(row, device))
    while waiting and time.monotonic() < deadline:
        candidate = waiting.pop(0)
        if candidate in tried:
            continue
        tried.append(candidate)
        kept = dict(row)
        row.update(candidate)
        taken = {i: seconds(cases[i]) for i in concerned}
        if _mean_ratio(taken, times) < 1 - _MARGIN:
            times |= taken
            waiting = list(candidates(row, device))
        else:
            row.update(kept)
    if row == before:
        return None
    return Change(kind, before, dict(row), _mean_ratio(times, at_first))


def _mean_ratio(now: dict[int, float], before: dict[int, float]) -> float:
    """The geometric mean over the cases that both have."""
    ratios = [now[i] / before[i] for i in now.keys() & before.keys()]
    return math.prod(ratios) ** (1 / len(ratios))


def text(table: Table) -> str:
    """A table as its file has it: a line for each row, or for each architecture with one row."""
    kinds = []
    for kind, by_architecture in table.items():
        architectures = []
        for architecture, rows in by_architecture.items():
            lines = [json.dumps(row) for row in rows]
            one = ", ".join(lines)
            many = "\n      " + ",\n      ".join(lines) + "\n    "
            architectures.append(f"    {json.dumps(architecture)}: [{one if len(lines) < 2 else many}]")
        kinds.append(f"  {json.dumps(kind)}: {{\n" + ",\n".join(architectures) + "\n  }")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def write(table: Table, path: Path) -> None:
    """Write a table; its file is the old one or the new one at every moment."""
    with atomic_file(path) as temporary:
        temporary.write_text(text(table))


def on_the_device(case: registry.Case) -> float:
    """Seconds of a benchmark case's op on the CUDA device, by Triton."""
    from .bench.timing import Settings, contender, interleave

    try:
        ours = contender("ours", case, case.ours, case.make_inputs(0, "cuda"), lambda: use_backend("triton"))
        return interleave([ours], Settings.quick(device="cuda"))["ours"].median
    except Exception as error:  # Triton has many for what does not compile or fit, and launchers assert
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        return math.inf


def current_device() -> _triton.Device:
    """Facts about the CUDA device that is timed."""
    return _triton.device_of(torch.empty(0, device="cuda"))


def ops() -> list[str]:
    """The ops that have Triton kernels with a table."""
    return sorted(file.stem for file in _triton.Configurations.folder().glob("*.json"))


def run(
    chosen: Sequence[str] | None = None,
    *,
    case: str | None = None,
    output: Path | None = None,
    budget: float = math.inf,
) -> Iterator[tuple[str, Path, list[Change]]]:
    """Tune ops on this machine's GPU and write their tables, one after the other.

    Args:
        chosen: names of ops; all that have a table by default.
        case: a regular expression; only benchmark cases whose name it matches count.
        output: the directory to write `<op>.json` into; the package's own by default.
        budget: seconds, for all of them.

    Raises:
        UserError: there is no GPU or no Triton, an op is unknown, or no case matches.
        OutputError: a table cannot be written, found out before anything is timed.
    """
    if not torch.cuda.is_available():
        raise UserError("tune needs a GPU, and PyTorch finds no CUDA device here")
    known = ops()
    for op in chosen or ():
        if op not in known:
            raise UserError(f"no launch configurations of {op!r}; there are: {', '.join(known)}")
    folder = output or _triton.Configurations.folder()
    paths = {op: check_writable(folder / f"{op}.json") for op in chosen or known}
    deadline = time.monotonic() + budget
    for op, path in paths.items():
        cases = registry.select(registry.load(op), case)
        configurations = _triton.kernels(op).CONFIGURATIONS
        table, changes = tune(configurations, current_device(), cases, on_the_device, deadline=deadline)
        write(table, path)
        yield op, path, changes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `imagen-fast tune`."""
    parser.add_argument("--op", action="append", metavar="OP", help="the op to tune; may be repeated (default: all)")
    parser.add_argument("--case", metavar="REGEX", help="tune for the benchmark cases whose name it matches")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write <op>.json there (default: into the package)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="try nothing after these")


def main(args: argparse.Namespace) -> None:
    """Run the command, and print what changed."""
    if not args.budget >= 0:
        raise UserError(f"--budget must be a number of seconds, got {args.budget:g}")
    for op, path, changes in run(args.op, case=args.case, output=args.output, budget=args.budget):
        for change in changes:
            print(f"{op}: {change.kind}: {change.before} -> {change.after}: {change.ratio:.2f} of the time")
        print(f"{path}: {len(changes)} rows changed")
        sys.stdout.flush()
