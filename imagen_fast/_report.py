"""What `accelerate` did to an object: the `Report`, which prints as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Accuracy:
    """What `verify` measured: largest errors against float64, relative to the largest value of the result.

    Attributes:
        ours: of the fused module.
        eager: of the original in the same dtype.
        allowed: what `imagen_fast.testing.assert_as_accurate` allows, given eager's.
    """

    ours: float
    eager: float
    allowed: float


@dataclass(frozen=True)
class Swapped:
    """A module that has its fused form.

    Attributes:
        name: as in `named_modules`.
        class_name: the class that it had, with its module.
        fused_name: the class that it has, with its module.
        ops: the ops that this class calls.
        notes: where it calls a child instead, and why. This is so as long as the reason lasts, and no longer.
        accuracy: what `verify` measured; None if it was not asked for, or did not reach the module.
    """

    name: str
    class_name: str
    fused_name: str
    ops: tuple[str, ...]
    notes: tuple[str, ...] = ()
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class Left:
    """A module that could have been expected to be swapped, or a whole part of a system, and why it was left."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Copied:
    """A weight that has a copy beside it, made when it is first needed; the weight itself stays.

    Attributes:
        name: of a packed layer, as in `named_modules`; of a converted weight, as in `named_parameters`.
        kind: "packed" for oneDNN or, on other devices, with others to one product; or "converted" to another dtype.
        bytes: the most that the copy takes.
    """

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; `print` shows it as tables.

    Attributes:
        class_name: of the object, with its module.
        swapped: every module that has its fused form now, from earlier calls too.
        left: every module that was left as it is.
        copies: every weight that has a copy beside it, or gets one in the first call without gradients.
        graphs: whether and of what calls are recorded, to be repeated without their Python.
    """

    class_name: str
    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    copies: tuple[Copied, ...] = ()
    graphs: str = ""

    def bytes_of(self, kind: str) -> int:
        """What all copies of a kind, "packed" or "converted", take."""
        return sum(copied.bytes for copied in self.copies if copied.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries, lists, strings and numbers, for JSON."""
        return _as_plain(asdict(self))

    def __str__(self) -> str:
        from tabulate import tabulate

        swapped = count_modules(len(self.swapped))
        title = f"{short(self.class_name)}: {swapped} on fused ops, {len(self.left)} left as they were"
        tables = [title if self.swapped else f"{title}: there is nothing to swap"]
        if self.swapped:
            tables.append(tabulate(self._swapped_rows(), headers="keys", disable_numparse=True))
        if self.left:
            rows = [
                {"left": name, "class": short(class_name), "why": reason, "times": times}
                for (name, class_name, reason), times in _counted(
                    (_pattern(left.name), left.class_name, left.reason) for left in self.left
                )
            ]
            tables.append(tabulate(rows, headers="keys", disable_numparse=True))
        facts = [
            f"{count} weights {kind}, {self.bytes_of(kind) / 2**20:.1f} MiB beside their originals"
            for kind in ("packed", "converted")
            if (count := sum(copied.kind == kind for copied in self.copies))
        ]
        facts += [f"repeated calls: {self.graphs}"] if self.graphs else []
        return "\n\n".join([*tables, "\n".join(facts)] if facts else tables)

    def _swapped_rows(self) -> list[dict[str, Any]]:
        """One row for all modules whose names differ in numbers alone."""
        rows: list[dict[str, Any]] = []
        for key, times in _counted(map(_row_key, self.swapped)):
            name, class_name, fused_name, ops, notes = key
            row = {"swapped": name, "class": short(class_name), "runs as": short(fused_name), "ops": ", ".join(ops)}
            row["times"] = times
            measured = [s.accuracy for s in self.swapped if s.accuracy is not None and _row_key(s) == key]
            if measured:
                worst = max(measured, key=lambda accuracy: accuracy.ours)
                row["largest error"] = f"{worst.ours:.1e}, eager {worst.eager:.1e}"
            if notes:
                row["note"] = "; ".join(notes)
            rows.append(row)
        return rows


def _row_key(swapped: Swapped) -> tuple[Any, ...]:
    return _pattern(swapped.name), swapped.class_name, swapped.fused_name, swapped.ops, swapped.notes


def _pattern(name: str) -> str:
    """The name with a star for every number in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _counted(items: Iterator[Any]) -> list[tuple[Any, int]]:
    counts: dict[Any, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return list(counts.items())


def count_modules(modules: int) -> str:
    return f"{modules} module{'' if modules == 1 else 's'}"


def short(class_name: str) -> str:
    return class_name.rpartition(".")[2]


def _as_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, list | tuple) else value
