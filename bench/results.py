"""What a run leaves behind: one JSON file per op and machine, read back with every key checked.

    {"schema": 1, "op": ..., "complete": true, "settings": {...}, "provenance": {...}, "limits": {...},
     "rows": [{"case": ..., "backend": ..., "peer": ..., "ours": {"median": ...}, "ratio": ..., ...}], "failures": [],
     "skipped": []}

A row is one comparison: a case, the backend of ours, and a peer. Times are seconds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import from_dict
from ..errors import UserError
from ..files import atomic_file
from ..provenance import Provenance
from .check import Accuracy
from .floor import Limits
from .peers import PeerResult
from .registry import Case, dtype_name
from .timing import Settings, Timing

SCHEMA = 1


@dataclass(frozen=True)
class Cost:
    """Of a contender in a process of its own.

    Attributes:
        first_result: seconds from a model in memory to its first result: accelerating, compiling, exporting included.
        preparation: of them, what an ordinary call does not take.
        throughput: samples per second, of calls with the case's batch.
        memory: the largest resident memory of the process after its first result, in MiB, libraries included; on a GPU
            what was allocated there.
    """

    first_result: float
    preparation: float
    throughput: float
    memory: float

    @classmethod
    def of(cls, batch: int, call: float, first_result: float, memory: float) -> Cost:
        """From seconds per call and to the first result."""
        return cls(first_result, max(first_result - call, 0.0), batch / call, memory)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        case, title, shape, dtype, layout, direction, tags: of the case (see `registry.Case`).
        backend: which of our backends ran.
        peer: what it was timed against; `variant` is the fastest of the peer's variants, whose times these are.
        ours, theirs: seconds per call.
        ratio: their median over ours; above 1, ours is faster.
        floor: seconds below which this machine cannot go; `percent_of_floor` is how near ours comes (100 is the limit).
        error, allowed_error: of ours against float64, of the output or gradient `worst` that came nearest to its limit.
        peer_error: of the peer, on the same output or gradient.
        preparation: seconds that the peer took before its first result (compiling), all its variants together.
        interleaved: timed in turns with ours; false for a peer of an op in a process of its own.
        our_cost, their_cost: of a whole model, what using the contender takes besides: of ours and of this variant.
    """

    case: str
    title: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    direction: str
    tags: tuple[str, ...]
    backend: str
    peer: str
    variant: str
    ours: Timing
    theirs: Timing
    ratio: float
    floor: float
    percent_of_floor: float
    error: float
    allowed_error: float
    peer_error: float
    worst: str
    preparation: float
    interleaved: bool
    our_cost: Cost | None = None
    their_cost: Cost | None = None


@dataclass(frozen=True)
class Failure:
    """A comparison that could not be made, and why."""

    case: str
    contender: str
    message: str


@dataclass(frozen=True)
class Skip:
    """A case that cannot run on this machine, and why."""

    case: str
    reason: str


def row(
    case: Case,
    backend: str,
    ours: Timing,
    accuracy: Accuracy,
    peer: str,
    theirs: PeerResult,
    floor: float,
    interleaved: bool,
    our_cost: Cost | None = None,
    their_cost: Cost | None = None,
) -> Row:
    """The comparison of ours with one peer on a case."""
    return Row(
        case=case.name,
        title=case.title,
        shape=case.shape,
        dtype=dtype_name(case.dtype),
        layout=case.layout,
        direction=case.direction,
        tags=tuple(sorted(case.tags)),
        backend=backend,
        peer=peer,
        variant=theirs.variant,
        ours=ours,
        theirs=theirs.timing,
        ratio=theirs.timing.median / ours.median,
        floor=floor,
        percent_of_floor=100 * floor / ours.median,
        error=accuracy.error,
        allowed_error=accuracy.allowed,
        peer_error=theirs.errors[accuracy.worst],
        worst=accuracy.worst,
        preparation=theirs.preparation,
        interleaved=interleaved,
        our_cost=our_cost,
        their_cost=their_cost,
    )


@dataclass
class Result:
    """All rows of one op on one machine. `complete` is false until the last case is done."""

    op: str
    provenance: Provenance
    settings: Settings
    limits: Limits = field(default_factory=Limits)
    rows: tuple[Row, ...] = ()
    failures: tuple[Failure, ...] = ()
    skipped: tuple[Skip, ...] = ()
    complete: bool = False

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return f"{self.op}-{self.provenance.slug}{'-cold' if self.settings.cold else ''}"

    @property
    def heading(self) -> str:
        """One line: machine, software, commit, date."""
        source = self.provenance
        machine = f"{source.machine}, {source.capability}, {source.driver}"
        if not source.driver:
            threads = f"{source.threads} thread{'s' if source.threads != 1 else ''}"
            machine = f"{source.machine}, {threads}, {source.capability}"
        parts = (
            machine,
            f"torch {source.torch}",
            f"imagen_fast {source.imagen_fast}",
            f"commit {source.commit[:10]}{' with changes' if source.dirty else ''}" if source.commit else "",
            source.date[:10],
            "inputs from memory" if self.settings.cold else "inputs in cache where they fit",
        )
        return "; ".join(part for part in parts if part)

    def keep(self, earlier: Result, replaced: set[str]) -> None:
        """Begin with the rows of an earlier result, but for those of some cases.

        Raises:
            UserError: it does not come from the same commit, PyTorch, machine and settings.
        """

        def source(result: Result) -> tuple[Any, ...]:
            found = result.provenance
            return found.commit, found.dirty, found.torch, result.name, result.settings

        if source(earlier) != source(self):
            raise UserError(f"--append: {self.name}.json comes from another commit, PyTorch, machine or settings")
        self.limits = earlier.limits
        self.rows = tuple(row for row in earlier.rows if row.case not in replaced)
        self.failures = tuple(failure for failure in earlier.failures if failure.case not in replaced)
        self.skipped = tuple(skip for skip in earlier.skipped if skip.case not in replaced)

    def write(self, directory: Path) -> Path:
        """Write `<op>-<machine>.json`, whole or not at all."""
        path = directory / f"{self.name}.json"
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"schema": SCHEMA, **_rounded(dataclasses.asdict(self))}


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Names of the peers, in the order in which they come."""
    return list(dict.fromkeys(row.peer for row in rows))


def comparisons(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows that share a case and a backend, by peer."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.backend), {})[row.peer] = row
    return list(groups.values())


def load(path: Path) -> Result:
    """Read a result file.

    Raises:
        UserError: it is missing, is no JSON, is of another schema, or has a key that does not belong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{path} is not a benchmark result of schema {SCHEMA} (found {found!r})")
    return from_dict(Result, {key: value for key, value in values.items() if key != "schema"}, str(path))


def _rounded(value: Any) -> Any:
    """Floats to five digits: a timing holds no more, and the files stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
