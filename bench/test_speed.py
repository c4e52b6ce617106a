"""The registry under pytest-benchmark, for its own tooling (histograms, comparison of saved runs):

    pytest bench/test_speed.py -k "bf16 and nhwc" --benchmark-group-by=group

Ours and its peers are separate benchmarks here and run one after another; what is recorded in `bench/results` comes
from `imagen-fast bench`, which interleaves them.
"""

from __future__ import annotations

from typing import Any

import pytest

from imagen_fast.bench import check, registry
from imagen_fast.bench.measure import usable_backends
from imagen_fast.bench.registry import Case
from imagen_fast.bench.timing import contender

CASES = [case for op in registry.ops() for case in registry.load(op)]


def _benchmarks() -> list[Any]:
    names = [(case, side) for case in CASES for side in ("ours", *(peer.name for peer in case.peers))]
    return [pytest.param(case, side, id=f"{case.op}-{case.name}-{side}") for case, side in names]


@pytest.mark.parametrize(("case", "side"), _benchmarks())
def test_speed(case: Case, side: str, benchmark: Any) -> None:
    values = case.make_inputs(0)
    if side == "ours":
        backends, reasons = usable_backends(case, values)
        if not backends:
            pytest.skip(reasons)
        name, context = next(iter(backends.items()))
        check.accuracy(check.results(case, case.ours, values, context), check.truth(case, values))
        timed = contender(name, case, case.ours, values, context)
    else:
        peer = case.peer(side)
        if peer.isolated:
            pytest.skip(f"{side} needs a process of its own")
        peer.load()
        timed = contender(side, case, next(iter(peer.variants.values()))(case), values)

    benchmark.group = f"{case.op}-{case.name}"
    with timed.context():
        benchmark.pedantic(timed.call, setup=lambda: ((timed.state(),), {}), rounds=50, warmup_rounds=5, iterations=1)
