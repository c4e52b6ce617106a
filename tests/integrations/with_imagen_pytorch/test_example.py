"""`examples/imagen_pytorch.py`, with the library as it is imported here."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "imagen_pytorch.py"


def test_it_computes_the_same_and_is_restored(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "restored, bit for bit the same: True"
    assert float(lines[-2].rpartition(": ")[2]) < 1e-3
