"""What each CUDA kernel takes of a multiprocessor, as ptxas said in the latest build.

    python setup.py build_ext --inplace && python tools/cuda_resources.py           prints a table
    python setup.py build_ext --inplace && python tools/cuda_resources.py --write   commits to it: tests/cuda/resources

`tests/cuda/test_resources.py` holds later builds to what was written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "native" / "libimagen_fast_cuda"
TABLES = ROOT / "tests" / "cuda" / "resources"

# Registers per thread; bytes of static shared memory per block; bytes of local memory per thread (arrays that are
# indexed at run time); bytes of registers that did not fit, per thread
Resources = dict[str, int]
Kernels = dict[str, dict[str, Resources]]  # by name and architecture


def demangled(names: list[str]) -> list[str]:
    """Names as in the sources, without result, namespace of the project and parameters."""
    try:
        run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return names
    plain = (
        re.sub(r"\(anonymous namespace\)::|imagen_fast::|\((bool|int|\w+::\w+)\)", "", n)
        for n in run.stdout.splitlines()
    )
    return [re.sub(r"^void ", "", name).partition("(")[0] for name in plain]


def parse(log: str) -> Kernels:
    """What `nvcc -Xptxas -v` says."""
    kernels: Kernels = defaultdict(dict)
    pattern = (
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'\n"
        r"(?:.*\n)*?"
        r"\s*(?P<local>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for match in re.finditer(pattern, log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels[match["name"]][match["architecture"]] = {
            "registers": int(match["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "local": int(match["local"]),
            "spilled": int(match["stores"]) + int(match["loads"]),
        }
    return dict(zip(demangled(list(kernels)), kernels.values(), strict=True))


def built() -> dict[str, Kernels]:
    """Of each op with CUDA kernels, from the logs of the latest build."""
    ops: dict[str, Kernels] = defaultdict(dict)
    for log in sorted(LOGS.glob("*.log")):
        if kernels := parse(log.read_text()):
            ops[log.name.partition(".")[0]] |= kernels
    return ops


def table(op: str) -> Kernels | None:
    """What is committed of an op."""
    file = TABLES / f"{op}.json"
    return json.loads(file.read_text()) if file.exists() else None


def write(op: str, kernels: Kernels) -> None:
    """One line for each kernel and architecture."""
    lines = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"    {json.dumps(arch)}: {json.dumps(values)}" for arch, values in sorted(by_architecture.items())
        )
        + "\n  }"
        for name, by_architecture in sorted(kernels.items())
    ]
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{op}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of the CUDA kernels in the latest build.")
    parser.add_argument("--write", action="store_true", help="replace the committed tables")
    arguments = parser.parse_args()
    ops = built()
    if not ops:
        raise SystemExit(f"no CUDA kernels have been built in {LOGS}")
    for op, kernels in ops.items():
        rows = [
            {"kernel": name, "sm": architecture, **values}
            for name, by_architecture in kernels.items()
            for architecture, values in by_architecture.items()
        ]
        print(f"{op}\n{tabulate(rows, headers='keys')}\n")
        if arguments.write:
            write(op, kernels)
    if arguments.write:
        for left_over in {file.stem for file in TABLES.glob("*.json")} - set(ops):
            (TABLES / f"{left_over}.json").unlink()


if __name__ == "__main__":
    main()
