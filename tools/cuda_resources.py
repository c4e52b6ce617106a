"""What each CUDA kernel takes of a multiprocessor, as ptxas said in the latest build.

    python setup.py build_ext --inplace && python tools/cuda_resources.py           prints a table
    python setup.py build_ext --inplace && python tools/cuda_resources.py --write   commits to it: tests/cuda/resources

`tests/cuda/test_resources.py` holds later builds to what was written.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import kernel_resources
from kernel_resources import Kernels

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "native" / "libimagen_fast_cuda"
TABLES = kernel_resources.Tables(ROOT / "tests" / "cuda" / "resources")


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
    """What `nvcc -Xptxas -v` says: static shared memory alone, and local memory of arrays indexed at run time too."""
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


def main() -> None:
    options = kernel_resources.arguments("Resources of the CUDA kernels in the latest build.").parse_args()
    ops = built()
    if not ops:
        raise SystemExit(f"no CUDA kernels have been built in {LOGS}")
    kernel_resources.show(ops)
    if options.write:
        TABLES.write_all(ops)


if __name__ == "__main__":
    main()
