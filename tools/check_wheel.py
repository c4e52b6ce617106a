"""Builds the wheel, installs it into a new environment with a PyTorch of your choice, and uses it there.

    python tools/check_wheel.py                 the pinned PyTorch
    python tools/check_wheel.py --torch 2.12.0  another one: the library is built once, for every PyTorch >= 2.11

It downloads that PyTorch, which can be gigabytes, and is no part of the tests.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.search(r"^torch==(\S+)", (ROOT / "requirements-torch.txt").read_text(), re.MULTILINE)

SMOKE = """
import warnings
import torch
import imagen_fast
from imagen_fast import ops

x = torch.randn(2, 64, 9, 7, requires_grad=True)
with imagen_fast.use_backend("cpu"):
    y = ops.group_norm_act(x, 32)
expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32))
torch.testing.assert_close(y, expected)
torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))

model = imagen_fast.models.Imagen.from_pretrained("emoji")
print(imagen_fast.accelerate(model))
model.sample(["a cute cat"], steps=2, progress=False)
print(f"The wheel works with torch {torch.__version__} from {imagen_fast.__file__}.")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Use the wheel in a new environment.")
    parser.add_argument(
        "--torch", default=PINNED[1] if PINNED else None, help="PyTorch's version (default: %(default)s)"
    )
    version = parser.parse_args().torch
    folder = ROOT / "build" / f"check-wheel-torch-{version}"
    for old in folder.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--clear", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"torch=={version}")
    run(python, "-m", "pip", "install", "-q", wheel, f"torch=={version}")
    run(python, "-c", SMOKE, cwd=folder)  # away from the checkout, so that the wheel is what is imported
    return 0


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd)


if __name__ == "__main__":
    sys.exit(main())
