"""The registry under pytest-benchmark, for its own tooling (histograms, comparison of saved runs):

    pytest bench/test_speed.py -k "bf16 and nhwc" --benchmark-group-by=group

Ours and its peers are separate benchmarks here and run one after another; what is recorded in `bench/results` comes
from `imagen-fast bench`, which interleaves them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from imagen_fast.bench import check, peers, registry
from imagen_fast.bench.measure import usable_backends
from imagen_fast.bench.registry import Case, Peer
from imagen_fast.bench.timing import contender

CASES = [case for op in registry.ops() for case in registry.load(op)]


def _benchmarks() -> list[Any]:
    """Ours, and every variant of every peer."""
    return [
        pytest.param(case, peer, variant, id=f"{case.op}-{case.name}-{side}")
        for case in CASES
        for side, peer, variant in (
            ("ours", None, ""),
            *((f"{peer.name}-{label}", peer, label) for peer in case.peers for label in peer.variants),
        )
    ]


@pytest.mark.parametrize(("case", "peer", "variant"), _benchmarks())
def test_speed(case: Case, peer: Peer | None, variant: str, benchmark: Any) -> None:
    inputs = case.checked_inputs()
    values = inputs[0]
    truth = check.truth(case, inputs)
    if peer is None:
        backends, reasons = usable_backends(case, values)
        if not backends:
            pytest.skip(reasons)
        name, context = next(iter(backends.items()))
        check.accuracy(case, check.results(case, case.ours, inputs, context), truth)
        timed = contender(name, case, case.ours, values, context)
    else:
        if peer.isolated:
            pytest.skip(f"{peer.name} needs a process of its own")
        alone = dataclasses.replace(peer, variants={variant: peer.variants[variant]})
        prepared = peers.prepare(case, alone, inputs, truth)
        timed = contender(peer.name, case, prepared[variant].function, values)

    benchmark.group = f"{case.op}-{case.name}"
    with timed.context():
        benchmark.pedantic(timed.call, setup=lambda: ((timed.state(),), {}), rounds=50, warmup_rounds=5, iterations=1)
