"""Tables and plots from recorded results.

    python -m imagen_fast.bench.report bench/results/*.json [--output DIR] [--case REGEX] [--tag headline]

prints a Markdown table for each file and, with `--output`, writes it and a plot of the speed-ups beside each other as
`<op>-<machine>.md` and `.png`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from ..errors import UserError
from ..files import atomic_file
from ..provenance import Provenance
from .results import Cost, Result, Row, load

# One colour per peer, told apart by people who do not see red and green as different (Okabe and Ito's palette).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

_NOTABLE_WAIT = 0.1  # seconds


def markdown(result: Result) -> str:
    """The rows as a Markdown table, with a line above it that says where they come from."""
    if any(row.our_cost for row in result.rows):
        return "\n\n".join([f"**{result.op}**, {_describe(result)}", _models(result.rows)])
    peers = _peers(result.rows)
    table = []
    for rows in _by_comparison(result.rows):
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
    return "\n\n".join([f"**{result.op}**, {_describe(result)}", body, *_notes(result)])


def _models(rows: Sequence[Row]) -> str:
    """Of whole models: a line for each contender, with what it costs besides time."""
    table = []
    for by_peer in _by_comparison(rows):
        first = next(iter(by_peer.values()))
        case = (first.title, first.dtype)
        ours = [*case, "**imagen_fast**", _time(first.ours.median), "", *_costs(first.our_cost)]
        table.append([*ours, f"{first.error:.1e}"])
        for row in by_peer.values():
            variant = f" ({row.variant})" if row.variant not in (row.peer, row.dtype) else ""
            line = [*case, f"{row.peer}{variant}", _time(row.theirs.median), f"{row.ratio:.2f}×"]
            table.append([*line, *_costs(row.their_cost), f"{row.peer_error:.1e}"])
    headers = ["case", "dtype", "contender", "time", "ours is faster", "first result after", "peak memory", "error"]
    return tabulate(table, headers, tablefmt="github", colalign=("left",) * 3 + ("right",) * 5, disable_numparse=True)


def _costs(cost: Cost | None) -> list[str]:
    """Time to the first result, and memory."""
    return [f"{cost.first_result:.1f} s", f"{cost.memory / 1024:.2f} GiB"] if cost else ["", ""]


def _notes(result: Result) -> list[str]:
    """What the numbers leave out: the wait for peers that must be prepared."""
    notes = []
    for peer in _peers(result.rows):
        waits = [row.preparation for row in result.rows if row.peer == peer]
        if max(waits) > _NOTABLE_WAIT:
            notes.append(f"{peer}: {median(waits):.1f} s of preparation for each case (median), which is not counted.")
    return notes


def _describe(result: Result) -> str:
    """One line: machine, software, commit, date."""
    source = result.provenance
    commit = f"commit {source.commit[:10]}{' with changes' if source.dirty else ''}" if source.commit else ""
    parts = (
        _machine(source),
        f"torch {source.torch}",
        f"imagen_fast {source.imagen_fast}",
        commit,
        source.date[:10],
        "inputs from memory" if result.settings.cold else "inputs in cache where they fit",
    )
    return "; ".join(part for part in parts if part)


def _machine(source: Provenance) -> str:
    if source.driver:
        return f"{source.machine}, {source.capability}, {source.driver}"
    return f"{source.machine}, {source.threads} thread{'s' if source.threads != 1 else ''}, {source.capability}"


def plot(result: Result, path: Path) -> None:
    """Horizontal bars: for each case, how many times faster ours is than each peer. The suffix of `path` is the format.

    Raises:
        UserError: matplotlib is not installed, or there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib (pip install 'imagen-fast[bench]')") from error
    groups = _by_comparison(result.rows)
    peers = _peers(result.rows)
    if not groups:
        raise UserError(f"{result.name} has no rows to plot")

    rows, headings = _lay_out(groups)
    thickness = 0.84 / len(peers)
    figure = Figure(figsize=(9, 1.9 + (len(rows) + len(headings)) * (0.12 + 0.13 * len(peers))), layout="constrained")
    axes = figure.subplots()
    longest = max(row.ratio for row in result.rows)
    for i, peer in enumerate(peers):
        bars = [(y + (i - (len(peers) - 1) / 2) * thickness, by_peer[peer]) for y, by_peer in rows if peer in by_peer]
        positions, ratios = [y for y, _ in bars], [row.ratio for _, row in bars]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.barh(positions, ratios, height=thickness * 0.88, color=colour, label=f"against {peer}")
        for y, ratio in zip(positions, ratios, strict=True):
            axes.text(ratio + longest * 0.006, y, f"{ratio:.1f}", va="center", fontsize=6.5, color="#333333")
    for y, title in headings:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # over the line at 1
        axes.text(0, y + 0.12, title, va="center", fontsize=9, fontweight="bold", bbox=box)
    axes.axvline(1.0, color="#333333", linewidth=0.8)
    axes.set_yticks([y for y, _ in rows], [_label(next(iter(by_peer.values()))) for _, by_peer in rows], fontsize=8)
    axes.set_ylim(rows[-1][0] + 0.6, headings[0][0] - 0.5)
    axes.set_xlim(0, longest * 1.08)
    axes.set_xlabel("times faster than the peer (1: the same speed)", fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"{result.op}\n", fontsize=13, fontweight="bold")
    figure.text(0.5, 1 - 0.42 / figure.get_figheight(), _describe(result), ha="center", fontsize=7, color="#555555")
    figure.legend(loc="outside lower center", ncols=len(peers), frameon=False, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150)


def select(result: Result, *, case: str | None = None, tag: str | None = None) -> Result:
    """The same result with only the rows of some cases: of a name that matches, or with a tag."""
    rows = (row for row in result.rows if (not case or re.search(case, row.case)) and (not tag or tag in row.tags))
    return Result(result.op, result.provenance, result.settings, result.limits, tuple(rows), (), result.complete)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command at the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m imagen_fast.bench.report", description="Tables and plots of results."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a result written by imagen-fast bench")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write <op>-<machine>.md and .png into this directory"
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
                with atomic_file(args.output / f"{result.name}.md") as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
                plot(result, args.output / f"{result.name}.png")
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _peers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.peer for row in rows))


def _by_comparison(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows that share a case and a backend, by peer."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.backend), {})[row.peer] = row
    return list(groups.values())


def _lay_out(groups: Sequence[dict[str, Row]]) -> tuple[list[tuple[float, dict[str, Row]]], list[tuple[float, str]]]:
    """Heights of the groups and of the headings between them, from the top down."""
    rows: list[tuple[float, dict[str, Row]]] = []
    headings: list[tuple[float, str]] = []
    for group in groups:
        title = next(iter(group.values())).title
        if not headings or headings[-1][1] != title:
            headings.append((len(rows) + len(headings), title))
        rows.append((len(rows) + len(headings), group))
    return rows, headings


def _label(row: Row) -> str:
    return f"{row.dtype} {row.layout.upper()} {row.direction.replace('_', ' + ')} ({row.backend})"


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    sys.exit(main())
