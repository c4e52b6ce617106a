"""One case, measured: every backend of ours checked, then timed in turns with every peer; gives the rows.

Whole models are measured by `turns`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..backends import NAMES, BackendError, use_backend
from . import check, isolated
from .floor import Limits
from .peers import PeerError, PeerResult, prepare
from .registry import CASES_DIRECTORY, Case
from .results import Failure, Row, row
from .timing import Settings, contender, interleave
from .turns import measure_apart

Context = Callable[[], AbstractContextManager[Any]]


def measure(
    case: Case,
    peers: Sequence[str],
    settings: Settings,
    limits: Limits,
    directory: Path = CASES_DIRECTORY,
) -> tuple[list[Row], list[Failure]]:
    """Check and time one case on the device of the settings.

    Args:
        case: what to measure.
        peers: names of the peers to time; those the case does not have are left out.
        settings: how long.
        limits: the machine's rates, extended by what this case needs.
        directory: where the case's file stands, for processes of their own.

    Returns:
        A row for each backend of ours and peer, and a failure for whatever could not be checked or timed.
    """
    if case.apart is not None:
        return measure_apart(case, peers, settings, limits, directory)
    if "torch._dynamo" in sys.modules:  # else earlier cases' compilations make this one's shapes dynamic
        torch._dynamo.reset()
    inputs = case.checked_inputs(settings.device)
    values = inputs[0]
    truth = check.truth(case, inputs)
    backends, reasons = usable_backends(case, values)
    failures = [] if backends else [Failure(case.name, "ours", f"no kernel can run it ({reasons})")]

    accuracies = {}
    for name, context in backends.items():
        try:
            accuracies[name] = check.accuracy(case, check.results(case, case.ours, inputs, context), truth)
        except Exception as error:  # a wrong result, or a kernel that fails: one case less, not the end of the run
            failures.append(Failure(case.name, name, f"{type(error).__name__}: {error}"))
    if not accuracies:
        return [], failures

    contenders = [contender(f"ours {name}", case, case.ours, values, backends[name]) for name in accuracies]
    chosen = [peer for peer in case.peers if peer.name in peers]
    prepared = {}
    for peer in chosen:
        if not peer.isolated:
            try:
                prepared[peer.name] = prepare(case, peer, inputs, truth)
            except PeerError as error:
                failures.append(Failure(case.name, peer.name, str(error)))
                continue
            variants = prepared[peer.name].items()
            contenders += [contender(f"{peer.name} {v}", case, p.function, values) for v, p in variants]

    timings = interleave(contenders, settings)
    found: dict[str, PeerResult] = {}
    for peer in chosen:
        if peer.isolated:
            try:
                found[peer.name] = isolated.run(case, peer, settings, directory, truth)
            except PeerError as error:
                failures.append(Failure(case.name, peer.name, str(error)))
        elif peer.name in prepared:
            ready = prepared[peer.name]
            best = min(ready, key=lambda v, name=peer.name: timings[f"{name} {v}"].median)  # type: ignore[misc]
            seconds = sum(variant.seconds for variant in ready.values())
            found[peer.name] = PeerResult(best, timings[f"{peer.name} {best}"], ready[best].errors, seconds)

    floor = limits.floor(case.bytes, case.flops, case.dtype, settings.cold)
    rows = [
        row(case, backend, timings[f"ours {backend}"], accuracy, peer.name, found[peer.name], floor, not peer.isolated)
        for backend, accuracy in accuracies.items()
        for peer in chosen
        if peer.name in found
    ]
    return rows, failures


def usable_backends(case: Case, values: dict[str, Any]) -> tuple[dict[str, Context], str]:
    """The kernel backends that can run the case, whether well or not, and why the others cannot."""
    able: dict[str, Context] = {}
    reasons = []
    for name in NAMES:
        if name == "eager":
            continue
        context = partial(use_backend, name)
        try:
            with context(), torch.no_grad():
                case.ours(**values)
        except BackendError as error:
            reasons.append(str(error))
            continue
        except Exception:  # the check that follows meets it again, and reports it
            pass
        able[name] = context
    return able, "; ".join(reasons)
