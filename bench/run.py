"""The runner behind `imagen-fast bench`: cases in, tables and JSON files out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from .. import provenance
from ..errors import UserError
from ..files import check_writable
from . import registry, report
from .floor import Limits
from .measure import measure
from .registry import Case
from .results import Result, Skip, load
from .timing import Settings

_NOISY = 1.3  # 80 % over 20 % quantile above which a warning is printed
_BUSY = 0.3  # load average per core above which a warning is printed


def run(
    ops: Iterable[str] | None = None,
    *,
    case: str | None = None,
    output: Path | None = None,
    peers: Iterable[str] | None = None,
    settings: Settings | None = None,
    threads: int | None = None,
    budget: float = math.inf,
    append: bool = False,
    progress: bool = True,
    directory: Path = registry.CASES_DIRECTORY,
) -> list[Result]:
    """Measure the cases of some ops.

    Args:
        ops: names of ops; all that have cases by default.
        case: a regular expression; only cases whose name it matches are run.
        output: a directory to write `<op>-<machine>.json` into. The file is written anew after each case, so that an
            interrupted run leaves what it had, marked as not complete.
        peers: names of the peers to time; all by default.
        settings: how long to measure; see `timing.Settings`.
        threads: number of threads of PyTorch and the kernels; unchanged by default.
        budget: seconds after which no further case is begun; the results are then not complete. Cases with the tag
            "headline" come first.
        append: keep the other cases of the file that is there, so that several short runs make one result.
        progress: whether to show a progress bar on stderr.
        directory: where the cases are.

    Returns:
        One result per op.

    Raises:
        UserError: an unknown op, case or peer, with the nearest name; a number of threads below 1; no such device; a
            file to append to that does not come from the same commit, PyTorch, machine and settings.
        OutputError: `output` cannot be written, found out before anything is measured.

    Example:
        >>> [result] = run(["group_norm_act"], case="bf16-nhwc", settings=Settings.quick())
        >>> print(report.markdown(result))
    """
    settings = settings or Settings()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
    chosen = _choose(ops, case, directory)
    names = registry.select_peers([c for cases in chosen.values() for c in cases], peers)
    with _threads(threads):
        source = provenance.collect(settings.device)
        results = {op: Result(op, source, settings, Limits(device=settings.device)) for op in chosen}
        if output is not None:
            for op, result in results.items():
                file = output / f"{result.name}.json"
                check_writable(file)
                if append and file.exists():
                    result.keep(load(file), replaced={each.name for each in chosen[op]})
        queue = []
        for each in (each for cases in chosen.values() for each in cases):
            if reason := each.obstacle(settings.device):
                results[each.op].skipped += (Skip(each.name, reason),)
            else:
                queue.append(each)
        queue.sort(key=lambda each: "headline" not in each.tags)
        waiting = Counter(each.op for each in queue)
        for op, result in results.items():
            result.complete = not waiting[op]
        end = time.monotonic() + budget
        with tqdm(total=len(queue), unit="case", disable=None if progress else True) as bar:
            for each in queue:
                if time.monotonic() > end:
                    break
                bar.set_description(f"{each.op} {each.name}")
                result = results[each.op]
                rows, failures = measure(each, names, settings, result.limits, directory)
                result.rows += tuple(rows)
                result.failures += tuple(failures)
                waiting[each.op] -= 1
                result.complete = not waiting[each.op]
                if output is not None:
                    result.write(output)
                bar.update()
    return list(results.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `imagen-fast bench`."""
    parser.add_argument("--op", action="append", metavar="OP", help="the op to time; may be repeated (default: all)")
    parser.add_argument("--case", metavar="REGEX", help="only cases whose name it matches")
    parser.add_argument("--peers", metavar="NAME,...", help="only these peers, such as eager,compile (default: all)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write <op>-<machine>.json into this directory")
    parser.add_argument("--append", action="store_true", help="keep what the file has of other cases")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (default: PyTorch's)")
    parser.add_argument("--quick", action="store_true", help="a short look instead of a measurement to record")
    parser.add_argument("--rounds", type=int, metavar="N", help="at least so many batches of each (default: 21)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after these")
    parser.add_argument("--cold", action="store_true", help="inputs from memory instead of from the caches")
    parser.add_argument("--list", action="store_true", help="list the cases and their peers, and stop")


def main(args: argparse.Namespace) -> int:
    """Run the command; prints a table per op. Returns 1 if something could not be checked or timed."""
    if not args.budget >= 0:
        raise UserError(f"--budget must be a number of seconds, got {args.budget:g}")
    peers = args.peers.split(",") if args.peers else None
    if args.list:
        chosen = _choose(args.op, args.case, registry.CASES_DIRECTORY)
        registry.select_peers([case for cases in chosen.values() for case in cases], peers)
        for cases in chosen.values():
            for case in cases:
                print(f"{case.op}  {case.name}  ({', '.join(peer.name for peer in case.peers)})", end="")
                print(f"  not here: {reason}" if (reason := case.obstacle(args.device)) else "")
        return 0
    settings = Settings.quick(args.cold, args.device) if args.quick else Settings(cold=args.cold, device=args.device)
    if args.rounds is not None:
        if args.rounds < 1:
            raise UserError(f"--rounds must be at least 1, got {args.rounds}")
        settings = dataclasses.replace(settings, min_rounds=args.rounds)
    results = run(
        args.op,
        case=args.case,
        output=args.output,
        peers=peers,
        settings=settings,
        threads=args.threads,
        budget=args.budget,
        append=args.append,
        progress=sys.stderr.isatty(),
    )
    for result in results:
        print(report.markdown(result))
        if args.output is not None and result.rows:
            print(f"\nwritten to {args.output / result.name}.json")
        for failure in result.failures:
            print(f"{failure.case}: {failure.contender}: {failure.message}", file=sys.stderr)
        if not result.complete:
            print(f"{result.op}: not all cases were measured in the time that --budget gives", file=sys.stderr)
        noisy = sum(row.ours.q80 > _NOISY * row.ours.q20 for row in result.rows)
        if noisy:
            print(f"{noisy} of {len(result.rows)} timings of ours vary by more than {_NOISY:g} times", file=sys.stderr)
        if result.provenance.load > _BUSY * result.provenance.cores:
            print(f"the machine was busy when this began (load {result.provenance.load})", file=sys.stderr)
    return int(any(result.failures for result in results))


def _choose(ops: Iterable[str] | None, pattern: str | None, directory: Path) -> dict[str, list[Case]]:
    """The cases to run, by op. A pattern must match somewhere, not in every op."""
    loaded = {op: registry.load(op, directory) for op in (list(dict.fromkeys(ops or ())) or registry.ops(directory))}
    matching = {case.name for case in registry.select([c for cases in loaded.values() for c in cases], pattern)}
    chosen = {op: [case for case in cases if case.name in matching] for op, cases in loaded.items()}
    return {op: cases for op, cases in chosen.items() if cases}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
