"""What a machine with a GPU adds: `make test-gpu` and `make bench-gpu`.

    python tools/gpu.py test  [--output DIR]    the ops' tests on the device, then compute-sanitizer
    python tools/gpu.py bench [--output DIR]    the benchmarks against eager PyTorch and torch.compile, hot and cold

Nothing is installed, so that it runs where no package index can be reached: on the Python, PyTorch (2.11 or newer) and
Triton (3.6 or newer) that are there, with setuptools, ninja, pytest and tabulate. The package is put together from
links in `build/gpu`, and the libraries are built for the device at hand (`IMAGEN_FAST_CUDA_ARCHS` asks for others).
Both together take nine minutes at most. DIR gets the log and a JSON summary of the tests; JSON, Markdown and plots of
the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu"
LINKS = {"kernels": ROOT / "kernels" / "triton", "bench": ROOT / "bench"}  # as `package_dir` in setup.py has them

TEST_SECONDS = 200
SANITIZER_SECONDS = 60  # for each tool
BENCH_SECONDS = 100  # of beginning new cases, hot and cold each


@dataclass(frozen=True)
class Step:
    """One command of a run and how it ended; `closing` is its last line."""

    name: str
    status: int
    seconds: float
    closing: str


def put_together(site: Path = SITE) -> None:
    """Make `site`/imagen_fast from links, as an installation would arrange it."""
    package = site / "imagen_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (ROOT / "imagen_fast").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    for name, folder in LINKS.items():
        if folder.exists():
            (package / name).symlink_to(folder)


def device_architecture() -> str:
    """The compute capability of the device, such as "9.0a"; ends the program where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: this PyTorch ({torch.__version__}) finds none")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"


def build(environment: Mapping[str, str]) -> None:
    """The libraries, in place."""
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)


def run(name: str, command: Sequence[str], environment: Mapping[str, str], limit: float, log: Path) -> Step:
    """Run a command, shown and logged, and ended after `limit` seconds (status 124)."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {name}: {' '.join(command)}\n")
        child = subprocess.Popen(
            ["timeout", "--kill-after=10", str(limit), *command],
            cwd=SITE,  # not the checkout: `python -m` looks for the package there first
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        closing = ""
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            file.write(line)
            closing = line.strip() or closing
        status = child.wait()
    return Step(name, status, round(time.monotonic() - start, 1), closing)


def test_steps(environment: Mapping[str, str], log: Path) -> list[Step]:
    """The tests on the device, and the small ones under compute-sanitizer."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    tests = ROOT / "tests" / "gpu"
    steps = [run("tests", [*pytest, str(tests)], environment, TEST_SECONDS, log)]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return [*steps, Step("compute-sanitizer", 0, 0.0, "not installed: skipped")]
    small = [str(tests / "test_every_op.py"), "-k", "accurate and bfloat16 and nchw", "-x"]
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kns=at", *pytest]
        # PyTorch's allocator would hide accesses past the end of a tensor in its pool.
        checked = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(run(f"compute-sanitizer {tool}", [*command, *small], checked, SANITIZER_SECONDS, log))
    return steps


def bench_steps(environment: Mapping[str, str], log: Path, output: Path) -> list[Step]:
    """Every case hot, then cold, headline cases first; then tables and plots of what was measured."""
    command = [sys.executable, "-m", "imagen_fast.bench", "--device", "cuda", "--quick", "--output", str(output)]
    command += ["--budget", str(BENCH_SECONDS)]
    limit = BENCH_SECONDS + 40
    steps = [
        run("benchmarks, hot", command, environment, limit, log),
        run("benchmarks, cold", [*command, "--cold"], environment, limit, log),
    ]
    if files := sorted(map(str, output.glob("*.json"))):
        report = [sys.executable, "-m", "imagen_fast.bench.report", *files, "--output", str(output)]
        steps.append(run("report", report, environment, 60, log))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("test", "bench"))
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu", metavar="DIR", help="default: out/gpu")
    args = parser.parse_args()
    args.output = args.output.absolute()
    architecture = device_architecture()
    args.output.mkdir(parents=True, exist_ok=True)
    environment = {
        "IMAGEN_FAST_CUDA_ARCHS": architecture,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH")))),
        "IMAGEN_FAST_TEST_DEVICE": "cuda",
    }
    put_together()
    start = time.monotonic()
    build(environment)
    steps = [Step("build", 0, round(time.monotonic() - start, 1), f"for {environment['IMAGEN_FAST_CUDA_ARCHS']}")]
    log = args.output / f"{args.what}.log"
    log.unlink(missing_ok=True)
    if args.what == "test":
        steps += test_steps(environment, log)
        summary = json.dumps({"architecture": architecture, "steps": [asdict(step) for step in steps]}, indent=1)
        (args.output / "test-gpu.json").write_text(summary + "\n", encoding="utf-8")
    else:
        results = args.output / "results"
        results.mkdir(exist_ok=True)
        steps += bench_steps(environment, log, results)
    print()
    for step in steps:
        verdict = "ok" if step.status == 0 else f"status {step.status}"
        print(f"{step.name:<28} {verdict:<12} {step.seconds:6.1f} s  {step.closing}")
    return int(any(step.status for step in steps))


if __name__ == "__main__":
    sys.exit(main())
