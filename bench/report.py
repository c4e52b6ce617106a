"""Tables and plots from recorded results.

    python -m imagen_fast.bench.report bench/results/*.json [--output DIR] [--case REGEX] [--tag headline]

prints a Markdown table for each file and, with `--output`, writes it and a plot as `<op>-<machine>.md` and `.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from ..errors import UserError
from ..files import atomic_file
from . import plots
from .results import Cost, Result, Row, comparisons, load, peers_of

OURS = "**imagen_fast**"
_NOTABLE_WAIT = 0.1  # seconds


def markdown(result: Result) -> str:
    """The rows as a Markdown table, with a line above it that says where they come from."""
    heading = f"**{result.op}**, {result.heading}"
    if any(row.our_cost for row in result.rows):
        return "\n\n".join(filter(None, [heading, _models(result.rows), throughput(result), *_skipped(result)]))
    peers = peers_of(result.rows)
    table = []
    for rows in comparisons(result.rows):
        first, by_peer = next(iter(rows.values())), rows
        line: list[Any] = [first.title, first.dtype, first.layout.upper(), first.direction.replace("_", " + ")]
        line += [first.backend, _time(first.ours.median)]
        for peer in peers:
            row = by_peer.get(peer)
            line += [_time(row.theirs.median), f"{row.ratio:.2f}×"] if row else ["", ""]
        table.append([*line, f"{first.percent_of_floor:.0f} %", f"{first.error:.1e} ({first.allowed_error:.1e})"])
    headers = ["case", "dtype", "layout", "direction", "backend", "ours"]
    for peer in peers:
        headers += [peer, "speed-up"]
    headers += ["of floor", "error (allowed)"]
    columns = ("left",) * 5 + ("right",) * (len(headers) - 5)
    body = tabulate(table, headers, tablefmt="github", colalign=columns, disable_numparse=True) if table else "no rows"
    return "\n\n".join([heading, body, *_notes(result), *_skipped(result)])


def _models(rows: Sequence[Row]) -> str:
    """Of whole models: a line for each contender, with what it costs besides time."""
    table = []
    for by_peer in comparisons(rows):
        first = next(iter(by_peer.values()))
        case = (first.title, first.dtype)
        ours = [*case, OURS, _time(first.ours.median), "", *_costs(first.our_cost)]
        table.append([*ours, f"{first.error:.1e}"])
        for row in by_peer.values():
            variant = f" ({row.variant})" if row.variant not in (row.peer, row.dtype) else ""
            line = [*case, f"{row.peer}{variant}", _time(row.theirs.median), f"{row.ratio:.2f}×"]
            table.append([*line, *_costs(row.their_cost), f"{row.peer_error:.1e}"])
    headers = ["case", "dtype", "contender", "time", "ours is faster", "samples/s", "prepared in", "first result after"]
    headers += ["peak memory", "error"]
    return tabulate(table, headers, tablefmt="github", colalign=("left",) * 3 + ("right",) * 7, disable_numparse=True)


def _costs(cost: Cost | None) -> list[str]:
    """Throughput, time to the first result, and memory."""
    if cost is None:
        return [""] * 4
    waits = [f"{seconds:.1f} s" for seconds in (cost.preparation, cost.first_result)]
    return [f"{cost.throughput:.3g}", *waits, f"{cost.memory / 1024:.2f} GiB"]


def throughput(result: Result) -> str:
    """Samples per second by batch, of the models that were timed in more than one; nothing if there are none."""
    series: dict[tuple[str, str], dict[int, dict[str, Row]]] = {}
    for by_peer in comparisons(result.rows):
        first = next(iter(by_peer.values()))
        if first.our_cost:
            series.setdefault((_without_batch(first), first.dtype), {})[first.shape[0]] = by_peer
    series = {key: by_batch for key, by_batch in series.items() if len(by_batch) > 1}
    batches = sorted({batch for by_batch in series.values() for batch in by_batch})
    table = []
    for (title, dtype), by_batch in series.items():
        costs = {OURS: {batch: next(iter(rows.values())).our_cost for batch, rows in by_batch.items()}}
        for batch, rows in by_batch.items():
            for peer, row in rows.items():
                costs.setdefault(peer, {})[batch] = row.their_cost
        for contender, found in costs.items():
            line = [f"{cost.throughput:.3g}" if (cost := found.get(batch)) else "" for batch in batches]
            table.append([title, dtype, contender, *line])
    if not table:
        return ""
    headers = ["samples per second", "dtype", "contender", *(f"batch {batch}" for batch in batches)]
    columns = ("left",) * 3 + ("right",) * len(batches)
    return tabulate(table, headers, tablefmt="github", colalign=columns, disable_numparse=True)


def _without_batch(row: Row) -> str:
    """The title, with B for the batch that it begins its sizes with."""
    return re.sub(rf"\b{row.shape[0]}×", "B×", row.title, count=1)


def _notes(result: Result) -> list[str]:
    """What the numbers leave out: the wait for peers that must be prepared."""
    notes = []
    for peer in peers_of(result.rows):
        waits = [row.preparation for row in result.rows if row.peer == peer]
        if max(waits) > _NOTABLE_WAIT:
            notes.append(f"{peer}: {median(waits):.1f} s of preparation for each case (median), which is not counted.")
    return notes


def _skipped(result: Result) -> list[str]:
    """Cases that this machine cannot run, and why."""
    reasons: dict[str, list[str]] = {}
    for skip in result.skipped:
        reasons.setdefault(skip.reason, []).append(skip.case)
    return [f"not run: {', '.join(names)}: {reason}." for reason, names in reasons.items()]


def select(result: Result, *, case: str | None = None, tag: str | None = None) -> Result:
    """The same result with only the rows of some cases: of a name that matches, or with a tag."""
    rows = (row for row in result.rows if (not case or re.search(case, row.case)) and (not tag or tag in row.tags))
    return dataclasses.replace(result, rows=tuple(rows), failures=())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command at the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m imagen_fast.bench.report", description="Tables and plots of results."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a result written by imagen-fast bench")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the name of each file as .md and .png into this directory"
    )
    parser.add_argument("--case", metavar="REGEX", help="only cases whose name it matches")
    parser.add_argument("--tag", help="only cases with this tag, such as headline")
    args = parser.parse_args(arguments)
    try:
        for file in args.files:
            result = select(load(file), case=args.case, tag=args.tag)
            text = markdown(result)
            print(text, end="\n\n")
            if args.output is not None:
                with atomic_file(args.output / f"{file.stem}.md") as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
                plots.plot(result, args.output / f"{file.stem}.png")
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    sys.exit(main())
