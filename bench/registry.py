"""What a benchmark case is, and how the cases of an op are found.

Each file `cases/<op>.py` has a function `cases()` that gives the cases of that op; adding a file adds an op, and no
list is kept by hand. A case knows how to make its random inputs, how to call ours and every peer on them, the function
whose float64 result is the truth, and the bytes and flops that no implementation can avoid.

A whole model has cases as an op has, in `cases/model_<name>.py`. There every contender, ours included, is in a process
of its own (`Case.apart`).
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError

CASES_DIRECTORY = Path(__file__).parent / "cases"

Function = Callable[..., Any]
"""Called with a case's inputs by name; returns a tensor or a tuple of tensors."""

Direction = Literal["forward", "backward", "forward_backward"]


@dataclass(frozen=True)
class Peer:
    """Something that users could run in our place.

    Args:
        name: how rows and the option `--peers` call it.
        variants: label -> builder. A builder gets the case and returns the function to time, ready to run; it may take
            long (compilers do), and its seconds are recorded as preparation. All variants are timed, and the fastest
            one stands for the peer.
        isolated: the peer runs in a process of its own, because importing it changes this one.
        load: called before the first builder: what is done once per process and no fault of the case (imports).
        preparing: entered around the building of a variant and its first call.
    """

    name: str
    variants: Mapping[str, Callable[[Case], Function]]
    isolated: bool = False
    load: Callable[[], object] = lambda: None
    preparing: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Case:
    """One measurement to make.

    Args:
        op: the op's name, that of the file the case stands in.
        name: unique within the op; what `--case` is matched with.
        title: the same for people, short enough for a table.
        shape, dtype, layout: of the main input; of a whole model, the shape begins with the batch.
        direction: "forward" (without gradients), "backward" (the gradients alone) or "forward_backward".
        inputs: (generator, device) -> the inputs by name, random, in the case's dtype and layout.
        ours: calls the public op on the inputs; the runner chooses the backend around it.
        eager: plain PyTorch; its error against the truth is what ours is held to.
        truth: the function that is run on the inputs in float64.
        peers: what ours is timed against.
        bytes, flops: the least that any implementation moves and computes.
        differentiable: names of the inputs whose gradients are taken, where the direction has a backward.
        renewed: names of the inputs that are drawn anew, outside the clock, for every call (a direction of "forward").
        apart: of a whole model, ours as a contender in a process of its own. Every variant of every peer is in one,
            too; they take turns, the time to the first result and the memory of each are recorded, and errors are
            those of `testing.assert_model_as_accurate`.
        samples_checked: of a whole model that samples in a loop, at least how many samples it is held to; errors are
            those of `testing.assert_sampling_as_accurate`.
        needs_gpu: why it is not run on a CPU, if so.
        tags: "headline" (the cases a README shows), "overhead" (the cost of a call rules), "quick" (a smoke run).
    """

    op: str
    name: str
    title: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    direction: Direction
    inputs: Callable[[torch.Generator, str], dict[str, Any]]
    ours: Function
    eager: Function
    truth: Function
    peers: tuple[Peer, ...]
    bytes: int
    flops: int
    differentiable: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()
    apart: Peer | None = None
    samples_checked: int = 0
    needs_gpu: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)

    def make_inputs(self, seed: int, device: str = "cpu") -> dict[str, Any]:
        """The inputs for `seed`; the same seed gives the same values, in every process."""
        values = self.inputs(torch.Generator("cpu").manual_seed(seed), device)
        if self.direction != "forward":
            for name in self.differentiable:
                values[name].requires_grad_()
        return values

    def checked_inputs(self, device: str = "cpu") -> list[dict[str, Any]]:
        """What results are checked on: the inputs for seed 0, and of a sampling loop for as many seeds as it takes."""
        batches = max(1, math.ceil(self.samples_checked / self.shape[0]))
        return [self.make_inputs(seed, device) for seed in range(batches)]

    def obstacle(self, device: str) -> str:
        """Why it cannot be run on a type of device; empty if it can."""
        return f"it runs on a GPU alone ({self.needs_gpu})" if self.needs_gpu and device == "cpu" else ""

    def peer(self, name: str) -> Peer:
        return next(peer for peer in self.peers if peer.name == name)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bf16"; the names that cases, tables and options use."""
    return {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def random_normal(
    generator: torch.Generator, shape: Iterable[int], dtype: torch.dtype, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Normal values drawn in float32 and rounded to `dtype`, so that every dtype of a case holds the same numbers."""
    return torch.randn(tuple(shape), generator=generator).mul_(std).add_(mean).to(dtype)


def ops(directory: Path = CASES_DIRECTORY) -> list[str]:
    """Names of the ops that have cases, and "model_<name>" of whole models."""
    return sorted(path.stem for path in directory.glob("*.py") if not path.stem.startswith("_"))


def load(op: str, directory: Path = CASES_DIRECTORY) -> list[Case]:
    """The cases of one op.

    Raises:
        UserError: there are none; the nearest name is suggested.
    """
    known = ops(directory)
    if op not in known:
        raise UserError(f"no benchmark for {op!r}; {_suggest(op, known)}")
    cases = list(_import(op, directory).cases())
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"{op}: two cases share a name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    if strays := [case.name for case in cases if case.op != op]:
        raise ValueError(f"{op}: cases of another op stand in its file: {strays}")
    return cases


def select(cases: list[Case], pattern: str | None) -> list[Case]:
    """The cases whose name holds a match of the regular expression `pattern`.

    Raises:
        UserError: the pattern is not valid, or nothing matches; the nearest name is suggested.
    """
    if not pattern:
        return cases
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--case {pattern!r} is not a regular expression: {error}") from error
    chosen = [case for case in cases if expression.search(case.name)]
    if not chosen:
        raise UserError(f"no case matches {pattern!r}; {_suggest(pattern, [case.name for case in cases], cutoff=0.0)}")
    return chosen


def select_peers(cases: list[Case], names: Iterable[str] | None) -> list[str]:
    """The names of the peers to time: `names` if given, otherwise all that the cases have, in their order."""
    known = list(dict.fromkeys(peer.name for case in cases for peer in case.peers))
    if names is None:
        return known
    names = list(names)
    for name in names:
        if name not in known:
            raise UserError(f"no peer {name!r}; {_suggest(name, known)}")
    return [name for name in known if name in names]


def _suggest(name: str, known: list[str], cutoff: float = 0.5) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def _import(op: str, directory: Path) -> ModuleType:
    if directory == CASES_DIRECTORY:
        return importlib.import_module(f"{__package__}.cases.{op}")
    spec = importlib.util.spec_from_file_location(
        f"{__package__}.cases_in_{directory.name}.{op}", directory / f"{op}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def elements(shape: Iterable[int]) -> int:
    """Number of elements of a tensor of this shape."""
    return math.prod(shape)
