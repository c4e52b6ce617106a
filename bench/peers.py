"""Making peers ready and checking them; and the peers that many ops share."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from . import check
from .registry import Case, Function, Peer
from .timing import Timing


class PeerError(RuntimeError):
    """A peer cannot run a case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A variant of a peer, ready to be timed: its function, its results, and its error on every output and gradient.

    `seconds` went by until it had its first results.
    """

    function: Function
    errors: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class PeerResult:
    """A peer's fastest variant. `preparation` is the seconds that all variants took to their first results."""

    variant: str
    timing: Timing
    errors: dict[str, float]
    preparation: float


def prepare(case: Case, peer: Peer, inputs: Sequence[dict[str, Any]], truth: check.Truth) -> dict[str, Prepared]:
    """Build every variant of a peer and measure its errors.

    Raises:
        PeerError: a variant cannot be built or run, or computes something else.
    """
    return {label: prepare_variant(case, peer, label, inputs, truth) for label in peer.variants}


def prepare_variant(
    case: Case, peer: Peer, label: str, inputs: Sequence[dict[str, Any]], truth: check.Truth
) -> Prepared:
    """The same for one variant. Its preparation lasts until it has a result for the first inputs."""
    try:
        peer.load()
        start = time.perf_counter()
        with peer.preparing():
            function = peer.variants[label](case)
            found = check.results(case, function, inputs[:1])
        seconds = time.perf_counter() - start
        if len(inputs) > 1:
            found = check.results(case, function, inputs)
    except Exception as error:  # compilers and foreign libraries raise what they like
        raise PeerError(f"{peer.name} ({label}): {type(error).__name__}: {_first_line(error)}") from error
    for name, exact in truth.truth.items():
        if name not in found or found[name].shape != exact.shape:
            raise PeerError(f"{peer.name} ({label}) does not compute the same thing: {name} is missing or differs")
    errors = {name: check.error(case, found[name], exact) for name, exact in truth.truth.items()}
    for name, error in errors.items():
        computed_in = case.dtype if case.apart else found[name].dtype  # a cascade's pictures are sampled in float32
        if not error <= _wrong(computed_in):  # NaN is wrong too
            raise PeerError(
                f"{peer.name} ({label}) does not compute the same thing: {name} is off by {error:.2g}, relatively"
            )
    return Prepared(function, errors, seconds)


def _wrong(dtype: torch.dtype) -> float:
    """A relative error above round-off: half the digits are lost. Below it, a peer may differ from ours."""
    return float(torch.finfo(dtype).eps ** 0.5)


def compiled(function: Function, modes: tuple[str, ...] = ("default", "max-autotune")) -> Peer:
    """The peer "compile": `torch.compile` of `function` in several modes, of which the fastest counts.

    It is compiled for the exact shapes of the case (`dynamic=False`), as a model in use is after its first steps, and
    from empty caches, so that its preparation is what a user waits for after a change.
    """

    def variant(mode: str) -> Callable[[Case], Function]:
        return lambda case: torch.compile(function, mode=mode, dynamic=False, fullgraph=True)

    variants: Mapping[str, Callable[[Case], Function]] = {mode: variant(mode) for mode in modes}
    return Peer("compile", variants, load=load_compiler, preparing=empty_caches)


def empty_caches() -> AbstractContextManager[Any]:
    """A block in which nothing that was compiled before is found."""
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


@functools.cache
def load_compiler() -> None:
    """Import the compiler and let it build what it builds once per machine, before any case's clock runs."""
    torch.compile(lambda x: x.sin().sum())(torch.ones(4096))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
