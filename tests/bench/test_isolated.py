from __future__ import annotations

from pathlib import Path

import pytest

from imagen_fast.bench import check, isolated, registry
from imagen_fast.bench.peers import PeerError, PeerResult
from imagen_fast.bench.timing import Settings

TOY = Path(__file__).parent / "cases"
SHORT = Settings(seconds=0.005, batch_seconds=1e-4, min_rounds=5, max_rounds=20)
CASE = registry.load("add_one", TOY)[0]
TRUTH = check.truth(CASE, CASE.checked_inputs())


def run(peer: str, **options: float) -> PeerResult:
    return isolated.run(CASE, CASE.peer(peer), SHORT, TOY, TRUTH, **options)


def test_a_peer_in_its_own_process_is_checked_and_timed() -> None:
    found = run("apart")
    assert found.variant == "apart"
    assert found.errors["output"] < 1e-6
    assert 0 < found.timing.q20 <= found.timing.median <= found.timing.q80
    assert found.timing.rounds >= 5


@pytest.mark.parametrize(
    ("peer", "message"),
    [("apart broken", "RuntimeError: no such peer$"), ("apart dying", "its process ended with code 3")],
)
def test_a_peer_that_fails_there_says_why(peer: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        run(peer)


def test_a_peer_that_hangs_is_given_up() -> None:
    with pytest.raises(PeerError, match="took longer than 0 s"):
        run("apart", timeout=0.05)
