"""A contender in a process of its own: for libraries whose import changes the process, such as its thread affinity, and
for whole models, whose memory is of interest.

    parent -> child   lines of JSON on stdin: which case, peer and variant, settings, threads, the truth; then, for
                      each turn, {}. The end of stdin ends the child.
    child  -> parent  a line of JSON for each, in a pipe of their own: `Ready`; then a `Turn`; or {"failure": why}

The child makes the same inputs from the same seeds, checks its result against the parent's truth, and times it with the
same clock. Its standard output and error are the peer's own, and are shown only where it dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from . import check, registry
from .peers import PeerError, PeerResult, prepare_variant
from .registry import Case, Peer
from .timing import InTurns, Settings, contender, summarise

OURS = "ours"
"""How ours is called where a peer's name is asked for (`Case.apart`)."""


@dataclass(frozen=True)
class Ready:
    """A contender that has its first results.

    Attributes:
        errors: against the truth, by output.
        seconds: to the first results, from a model in memory.
        accuracy: of ours: how near it comes to what the rule allows.
        calls_per_sample: as many calls are averaged in a sample.
    """

    errors: dict[str, float]
    seconds: float
    accuracy: check.Accuracy | None
    calls_per_sample: int


@dataclass(frozen=True)
class Turn:
    """Seconds per call, batch by batch; and the largest resident memory since the first results, in MiB."""

    samples: list[float]
    memory: float


class Process:
    """The process of one variant of a peer, or of ours. Leaving its block ends it.

    Args:
        case: what to measure.
        peer, variant: who measures it.
        settings: how long, over all turns.
        directory: where the case's file stands.
        truth: a file that `check.Truth.save` wrote.
        turns: how many are going to be asked for.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self,
        case: Case,
        peer: str,
        variant: str,
        settings: Settings,
        directory: Path,
        truth: Path,
        turns: int = 1,
        timeout: float = 600.0,
    ) -> None:
        self._timeout = timeout
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the process
        answers, their_end = os.pipe()
        self._answers = os.fdopen(answers, encoding="utf-8")
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(their_end)],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(their_end,),
        )
        os.close(their_end)
        self._request = {
            "directory": str(directory),
            "op": case.op,
            "case": case.name,
            "peer": peer,
            "variant": variant,
            "settings": dataclasses.asdict(settings),
            "threads": torch.get_num_threads(),
            "truth": str(truth),
            "turns": turns,
        }

    def prepare(self) -> Ready:
        """Have it build its variant and check its first results.

        Raises:
            PeerError: it failed there, died, or took longer than `timeout` seconds.
        """
        values = self._ask(self._request)
        accuracy = values["accuracy"]
        return Ready(**{**values, "accuracy": None if accuracy is None else check.Accuracy(*accuracy)})

    def turn(self) -> Turn:
        """Have it time a share of its rounds; raises as `prepare` does."""
        return Turn(**self._ask({}))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            if not select.select([self._answers], [], [], self._timeout)[0]:
                raise PeerError(f"took longer than {self._timeout:.0f} s")
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._child.wait()
            self._output.seek(0)
            last = (self._output.read().strip() or "no output").splitlines()[-1]
            raise PeerError(f"its process ended with code {code}: {last}")
        values = json.loads(answer)
        if "failure" in values:
            raise PeerError(values["failure"])
        return values

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.kill()  # it may be in the midst of something
        self._child.communicate()
        self._answers.close()
        self._output.close()


def run(
    case: Case, peer: Peer, settings: Settings, directory: Path, truth: check.Truth, timeout: float = 600.0
) -> PeerResult:
    """Time the variants of a peer of a case one after another, each in a new process; the fastest counts.

    Raises:
        PeerError: as `Process.prepare` says.
    """
    timings, ready = {}, {}
    with tempfile.TemporaryDirectory(prefix="imagen-fast-bench-") as scratch:
        file = Path(scratch) / "truth.pt"
        truth.save(file)
        for variant in peer.variants:
            with Process(case, peer.name, variant, settings, directory, file, timeout=timeout) as process:
                ready[variant] = process.prepare()
                timings[variant] = summarise(process.turn().samples, ready[variant].calls_per_sample)
    best = min(timings, key=lambda variant: timings[variant].median)
    return PeerResult(best, timings[best], ready[best].errors, sum(each.seconds for each in ready.values()))


# ---- In the child


def _main() -> None:
    questions = iter(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        for answer in _answers(questions):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answers(questions: Any) -> Any:
    try:
        request = json.loads(next(questions))
        torch.set_num_threads(request["threads"])
        settings = Settings(**request["settings"])
        case = next(c for c in registry.load(request["op"], Path(request["directory"])) if c.name == request["case"])
        ready, turns = _prepare(case, request, settings)
        yield dataclasses.asdict(ready)
        _forget_peak()
        for _ in questions:
            yield dataclasses.asdict(Turn(turns.turn(), _peak(settings.device)))
    except Exception as error:  # whatever a foreign library raises is this peer's failure
        yield {"failure": str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"}


def _prepare(case: Case, request: dict[str, Any], settings: Settings) -> tuple[Ready, InTurns]:
    truth = check.Truth.load(Path(request["truth"]))
    is_ours = request["peer"] == OURS
    peer = case.apart if is_ours else case.peer(request["peer"])
    assert peer is not None
    inputs = case.checked_inputs(settings.device)
    prepared = prepare_variant(case, peer, request["variant"], inputs, truth)
    accuracy = None
    if is_ours:
        accuracy = check.accuracy(case, check.results(case, prepared.function, inputs), truth)
    turns = InTurns(contender(peer.name, case, prepared.function, inputs[0]), settings, request["turns"])
    return Ready(prepared.errors, prepared.seconds, accuracy, turns.calls_per_sample), turns


def _forget_peak() -> None:
    """Begin to count the largest memory anew: of this process, and of the CUDA device if it is in use."""
    with contextlib.suppress(OSError):  # where it cannot be reset, the peak is that of the preparation
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float:
    """MiB: of a device what PyTorch has allocated there, else the resident memory, libraries included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


if __name__ == "__main__":
    _main()
