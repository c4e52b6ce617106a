"""Every example runs as its docstring says; the one of imagen-pytorch in `integrations/with_imagen_pytorch`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"diffusers_if.py": "diffusers", "transformers_t5.py": "transformers", "own_unet.py": "torch"}


def run(name: str) -> str:
    command = [sys.executable, str(EXAMPLES / name)]
    process = subprocess.run(command, cwd=EXAMPLES.parent, env=os.environ, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_there_is_no_other() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == {*NEEDS, "imagen_pytorch.py"}


@pytest.mark.parametrize("name", ["diffusers_if.py", "transformers_t5.py"])
def test_a_host_library_computes_the_same_and_is_restored(name: str) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    lines = run(name).splitlines()
    assert lines[-1] == "restored, bit for bit the same: True"
    assert float(lines[-2].rpartition(": ")[2]) < 1e-3
    assert any("on fused ops" in line for line in lines)


def test_own_unet() -> None:
    lines = run("own_unet.py").splitlines()
    assert lines[0].startswith("output")
    assert len(lines) == 1 + 20
