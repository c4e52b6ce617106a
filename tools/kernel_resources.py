"""What GPU kernels take of a multiprocessor, as committed tables, and what of it is a regression.

`cuda_resources.py` and `triton_resources.py` find out; this is what they share. A table is a JSON file for each op.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tabulate import tabulate

# Registers per thread; bytes of shared memory per block; bytes of local memory per thread; bytes of registers that did
# not fit, per thread
Resources = dict[str, int]
Kernels = dict[str, dict[str, Resources]]  # by name and architecture


class Tables:
    """The committed tables of one kind of kernels, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, op: str) -> Kernels | None:
        """What is committed of an op."""
        file = self.folder / f"{op}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, op: str, kernels: Kernels) -> None:
        """One line for each kernel and architecture."""
        lines = [
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(
                f"    {json.dumps(arch)}: {json.dumps(values)}" for arch, values in sorted(by_architecture.items())
            )
            + "\n  }"
            for name, by_architecture in sorted(kernels.items())
        ]
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{op}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def write_all(self, ops: Mapping[str, Kernels]) -> None:
        """The tables of these ops, and of no others."""
        for op, kernels in ops.items():
            self.write(op, kernels)
        for left_over in {file.stem for file in self.folder.glob("*.json")} - set(ops):
            (self.folder / f"{left_over}.json").unlink()

    def regressions(self, op: str, kernels: Kernels) -> Iterator[str]:
        """How what an op's kernels take is worse than its table; of architectures that both know."""
        known = self.read(op) or {}
        for name in known.keys() - kernels.keys():
            yield f"{op}: {name} is gone"
        for name, by_architecture in kernels.items():
            if name not in known:
                yield f"{op}: {name} is new"
                continue
            for architecture in by_architecture.keys() & known[name].keys():
                label = f"{op}: {name}, {architecture}"
                yield from regressions(label, known[name][architecture], by_architecture[architecture])


def regressions(kernel: str, before: Resources, now: Resources) -> list[str]:
    """The compiler's version moves registers a little; the rest is what the source says."""
    allowed = {**before, "registers": before["registers"] + max(4, before["registers"] // 10)}
    return [f"{kernel}: {now[what]} of {what}, was {before[what]}" for what in before if now[what] > allowed[what]]


def spills(ops: Mapping[str, Kernels]) -> list[str]:
    """Every kernel whose registers do not suffice, with the bytes."""
    return [
        f"{op}: {name}, {architecture}: {resources['spilled']} bytes"
        for op, kernels in ops.items()
        for name, by_architecture in kernels.items()
        for architecture, resources in by_architecture.items()
        if resources["spilled"]
    ]


def show(ops: Mapping[str, Kernels]) -> None:
    """Print a table for each op."""
    for op, kernels in ops.items():
        rows = [
            {"kernel": name, "architecture": architecture, **values}
            for name, by_architecture in kernels.items()
            for architecture, values in by_architecture.items()
        ]
        print(f"{op}\n{tabulate(rows, headers='keys')}\n")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of both tools."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help="replace the committed tables")
    return parser
