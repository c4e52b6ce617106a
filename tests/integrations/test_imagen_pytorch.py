"""imagen-pytorch, accelerated: each version that `requirements-hosts.txt` lists, in a process of its own.

By hand: `PYTHONPATH=.venv/hosts/imagen-pytorch==2.1.0 python -m pytest tests/integrations/with_imagen_pytorch`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = Path(sys.prefix) / "hosts"
VERSIONS = (ROOT / "requirements-hosts.txt").read_text().split()


@pytest.mark.parametrize("version", VERSIONS)
def test_with(version: str) -> None:
    if not (HOSTS / version).is_dir():
        pytest.skip(f"{version} is not installed (make test installs it)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/integrations/with_imagen_pytorch"]
    environment = os.environ | {
        "PYTHONPATH": str(HOSTS / version),
        "IMAGEN_FAST_EXPECT_HOST": version.partition("==")[2],
    }
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    closing = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""
    if run.returncode:
        pytest.fail(f"{version}: {closing}\n\n{run.stdout[-20000:]}\n{run.stderr[-3000:]}", pytrace=False)
    assert " passed" in closing
    print(f"{version}: {closing}")
