"""A peer in a process of its own: for libraries whose import changes the process, such as its thread affinity.

    parent -> child   one JSON object on stdin: which case and peer, settings, threads, where to answer
    child  -> parent  a JSON file: a `PeerResult` as a JSON file, or {"failure": why}

The child makes the same inputs from the same seeds, checks the peer's result against the same truth, and times it with
the same clock. Its standard output and error are the peer's own, and are shown only where it dies.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import registry
from .peers import PeerError, PeerResult, time_alone
from .registry import Case
from .timing import Settings, Timing


def run(case: Case, peer: str, settings: Settings, directory: Path, timeout: float = 600.0) -> PeerResult:
    """Time one peer of a case in a new process.

    Raises:
        PeerError: the peer failed there, died, or took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="imagen-fast-bench-") as scratch:
        answer = Path(scratch) / "answer.json"
        request = {
            "directory": str(directory),
            "op": case.op,
            "case": case.name,
            "peer": peer,
            "settings": dataclasses.asdict(settings),
            "threads": torch.get_num_threads(),
            "answer": str(answer),
        }
        try:
            child = subprocess.run(
                [sys.executable, "-m", __name__],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"took longer than {timeout:.0f} s") from error
        if not answer.exists():
            last = (child.stderr.strip() or child.stdout.strip() or "no output").splitlines()[-1]
            raise PeerError(f"its process ended with code {child.returncode}: {last}")
        return _read(json.loads(answer.read_text(encoding="utf-8")))


def _read(values: dict[str, Any]) -> PeerResult:
    if "failure" in values:
        raise PeerError(values["failure"])
    return PeerResult(values["variant"], Timing(**values["timing"]), values["errors"], values["preparation"])


def _main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    directory = Path(request["directory"])
    case = next(case for case in registry.load(request["op"], directory) if case.name == request["case"])
    try:
        found = time_alone(case, case.peer(request["peer"]), Settings(**request["settings"]))
        answer: dict[str, Any] = dataclasses.asdict(found)
    except Exception as error:  # whatever a foreign library raises is this peer's failure
        answer = {"failure": f"{type(error).__name__}: {error}"}
    target = Path(request["answer"])
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.rename(target)


if __name__ == "__main__":
    _main()
