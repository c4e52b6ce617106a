"""Plots of results: of an op, how many times faster ours is; of whole models, what every contender takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files import atomic_file
from .results import Cost, Result, Row, comparisons, peers_of

# One colour per peer, told apart by people who do not see red and green as different (Okabe and Ito's palette).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_OURS = "#333333"


def plot(result: Result, path: Path) -> None:
    """Draw a result; the suffix of `path` is the format.

    Raises:
        UserError: matplotlib is not installed, or there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib (pip install 'imagen-fast[bench]')") from error
    if not result.rows:
        raise UserError(f"{result.name} has no rows to plot")
    draw = _models if any(row.our_cost for row in result.rows) else _speed_ups
    figure = draw(Figure, result)
    figure.suptitle(f"{result.op}\n", fontsize=13, fontweight="bold")
    figure.text(0.5, 1 - 0.42 / figure.get_figheight(), result.heading, ha="center", fontsize=7, color="#555555")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150)


# ---- Ops


def _speed_ups(new_figure: Callable[..., Any], result: Result) -> Any:
    """Horizontal bars: for each case, how many times faster ours is than each peer."""
    peers = peers_of(result.rows)
    rows, headings = _lay_out(comparisons(result.rows))
    thickness = 0.84 / len(peers)
    height = 1.9 + (len(rows) + len(headings)) * (0.12 + 0.13 * len(peers))
    figure = new_figure(figsize=(9, height), layout="constrained")
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
    _style(axes, "times faster than the peer (1: the same speed)")
    figure.legend(loc="outside lower center", ncols=len(peers), frameon=False, fontsize=9)
    return figure


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


# ---- Whole models


class _Bar(NamedTuple):
    """One contender of a case; `seconds` of a call."""

    seconds: float
    cost: Cost


# What a panel shows, how it is written beside a bar, and whether its axis is logarithmic
_PANELS: tuple[tuple[str, Callable[[_Bar], float], bool], ...] = (
    ("seconds for a call", lambda bar: bar.seconds, False),
    ("samples per second", lambda bar: bar.cost.throughput, False),
    ("seconds to the first result", lambda bar: bar.cost.first_result, True),
    ("peak memory, GiB", lambda bar: bar.cost.memory / 1024, False),
)


def _models(new_figure: Callable[..., Any], result: Result) -> Any:
    """A panel each for time, throughput, time to the first result and memory; in them a bar for each contender."""
    peers = peers_of(result.rows)
    contenders = ["imagen_fast", *peers]
    groups = comparisons(result.rows)
    thickness = 0.86 / len(contenders)
    figure = new_figure(figsize=(13, 1.9 + len(groups) * (0.15 + 0.16 * len(contenders))), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (title, value, logarithmic) in zip(panels, _PANELS, strict=True):
        for i, name in enumerate(contenders):
            bars = [(y + (i + 0.5) * thickness - 0.43, _bar(group, name)) for y, group in enumerate(groups)]
            known = [(y, value(bar)) for y, bar in bars if bar is not None]
            colour = _COLOURS[(i - 1) % len(_COLOURS)] if i else _OURS
            positions, lengths = [y for y, _ in known], [length for _, length in known]
            drawn = axes.barh(positions, lengths, height=thickness * 0.88, color=colour, label=name)
            axes.bar_label(drawn, [f"{length:.3g}" for length in lengths], padding=2, fontsize=6.5, color="#333333")
        if logarithmic:
            axes.set_xscale("log")
        axes.margins(x=0.16)
        _style(axes, f"{title}{' (logarithmic)' if logarithmic else ''}")
    labels = [f"{row.title}\n{row.dtype}" for row in (next(iter(group.values())) for group in groups)]
    panels[0].set_yticks(range(len(groups)), labels, fontsize=8)
    panels[0].set_ylim(len(groups) - 0.5, -0.5)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def _bar(group: dict[str, Row], contender: str) -> _Bar | None:
    """Of a contender in a case, or None if it has no result there."""
    row = group.get(contender)
    if row is not None:
        return _Bar(row.theirs.median, row.their_cost) if row.their_cost else None
    first = next(iter(group.values()))
    return _Bar(first.ours.median, first.our_cost) if contender == "imagen_fast" and first.our_cost else None


def _style(axes: Any, label: str) -> None:
    axes.set_xlabel(label, fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
