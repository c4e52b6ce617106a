"""What each Triton kernel takes of a multiprocessor of each architecture, compiled without any of them.

    python tools/triton_resources.py           prints a table
    python tools/triton_resources.py --write   commits to it: tests/triton/resources

Nothing is launched: an op is called under `_triton.record`, and what its launcher would launch is compiled as Triton
would compile it at that launch, for the architecture that the launcher has planned for. Which calls, says
`tests/triton/calls/<op>.py`, or, where there is no such file, the op's bench cases tagged "headline" and "overhead".

`tests/triton/test_offline.py` holds later kernels to what was written. Triton caches what it has compiled, and
`triton_known` tells, of what has been compiled on any machine, what it takes.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import kernel_resources
import torch
import triton
import triton_known
from kernel_resources import Kernels, Resources
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import imagen_fast
from imagen_fast import _triton, backends
from imagen_fast.bench import registry

ROOT = Path(__file__).resolve().parents[1]
CALLS = ROOT / "tests" / "triton" / "calls"
TABLES = kernel_resources.Tables(ROOT / "tests" / "triton" / "resources")
KERNELS = ROOT / "kernels" / "triton"
OPS = sorted(file.stem for file in KERNELS.glob("[!_]*.py"))

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_RUNS = itertools.count()

Call = Callable[[], Any]
"""Makes random inputs and calls the op. Gradients are taken if a result has them."""


def all_kernels() -> set[str]:
    """The names of all kernels in the files of `kernels/triton`."""
    modules = [_triton.kernels(file.stem) for file in KERNELS.glob("*.py") if file.stem != "__init__"]
    return {
        value.__name__
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction)
    }


def calls(op: str) -> Iterator[tuple[str, Call]]:
    """The representative calls of an op, by name."""
    file = CALLS / f"{op}.py"
    if file.exists():
        spec = importlib.util.spec_from_file_location(f"calls_of_{op}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield from module.calls()
        return
    cases = [c for c in registry.load(op) if c.tags & {"headline", "overhead"} and c.dtype != torch.float16]
    by_name = {case.name.removesuffix(f"-{case.direction}"): case for case in cases}  # backward comes last
    for name, case in by_name.items():
        yield name, lambda case=case: case.ours(**case.make_inputs(0))


class Compiled(NamedTuple):
    """A kernel as one launch of it is compiled."""

    name: str  # of the kernel and of the call
    architecture: str
    kernel: Any  # Triton's CompiledKernel


class _Driver:
    """Stands for the driver of a device that is not there: what Triton asks it before it compiles."""

    def __init__(self, device: _triton.Device, run: int) -> None:
        name, self.run = device.architecture, run
        if name.startswith("gfx"):
            self.target = GPUTarget("hip", name, device.warp_size)
        else:
            self.target = GPUTarget("cuda", int(name.replace(".", "")), device.warp_size)

    def get_current_device(self) -> str:
        return f"{self.target}, {self.run}"  # the key of what a kernel has compiled

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _no_device(device: _triton.Device, run: int) -> Iterator[list[_triton.Launch]]:
    """Ops serve tensors of the CPU by Triton, with launches that are recorded and kernels that Triton can compile."""
    driver.set_active(_Driver(device, run))
    try:
        with (
            mock.patch.dict(backends._EMULATED, triton=True),
            imagen_fast.use_backend("triton"),
            _triton.record(device) as launches,
        ):
            yield launches
    finally:
        driver.set_active(None)  # found anew when it is needed


def compile_all(
    op: str,
    architectures: Iterable[str] = tuple(_triton.KNOWN_DEVICES),
    *,
    known: triton_known.Known | None = None,
    but: str | None = None,
) -> list[Compiled]:
    """Every kernel of an op that its representative calls launch, for every architecture, each specialisation once;
    those that are known, but for one architecture, uncompiled."""
    found: dict[int, Compiled] = {}
    run = next(_RUNS)
    with (
        triton_known.recalled(known or {}, but),
        parsing_one_at_a_time(),
        ThreadPoolExecutor(os.cpu_count()) as threads,
        triton.AsyncCompileMode(threads),
    ):
        for architecture in architectures:
            for name, call in calls(op):
                with _no_device(_triton.KNOWN_DEVICES[architecture], run) as launches:
                    _differentiate(call())
                    for launch in launches:
                        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
                        label = f"{launch.kernel.__name__.removesuffix('_kernel')}, {name}"
                        found.setdefault(id(kernel), Compiled(label, architecture, kernel))
    return list(found.values())


@contextlib.contextmanager
def parsing_one_at_a_time() -> Iterator[None]:
    """While Python 3.11 makes one syntax tree, another thread that makes one has both refused ("AST constructor
    recursion depth mismatch"), as the depth is counted for all threads together."""
    parse, lock = JITFunction.parse, threading.RLock()

    def parse_alone(self: JITFunction[Any]) -> ast.Module:
        with lock:
            return parse(self)

    with mock.patch.object(JITFunction, "parse", parse_alone):
        yield


def _differentiate(outputs: Any) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    wanted = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.ones_like(y) for y in wanted])


def resources(compiled: Compiled) -> Resources:
    """What ptxas or, for AMD, LLVM has written into the binary."""
    kernel = compiled.kernel
    if is_recalled(compiled):
        return kernel.resources
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            report = subprocess.run(
                [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        return {**parse_cuobjdump(report), "shared": kernel.metadata.shared}
    return {**parse_amdgcn(kernel.asm["amdgcn"]), "shared": kernel.metadata.shared}


def is_recalled(compiled: Compiled) -> bool:
    """Whether the kernel was known and not compiled."""
    return hasattr(compiled.kernel, "resources")


def parse_cuobjdump(report: str) -> Resources:
    """Triton has no arrays that would be in local memory: what is there was spilled."""
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def parse_amdgcn(assembly: str) -> Resources:
    """Vector registers. (Scalar ones spill into vector registers.)"""
    used = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    spilled = max(used["private_segment_fixed_size"], 4 * used["vgpr_spill_count"])
    return {"registers": used["vgpr_count"], "spilled": spilled}


def table(compiled: Iterable[Compiled]) -> Kernels:
    """The most that a kernel takes in a call: it may be launched in several ways there."""
    kernels: Kernels = {}
    for each in compiled:
        known = kernels.setdefault(each.name, {}).setdefault(each.architecture, {})
        for what, value in resources(each).items():
            known[what] = max(value, known.get(what, 0))
    return kernels


def main() -> None:
    parser = kernel_resources.arguments("Resources of the Triton kernels, compiled for every architecture.")
    parser.add_argument("--op", action="append", choices=OPS, help="may repeat (default: all)")
    options = parser.parse_args()
    compiled = {op: compile_all(op) for op in options.op or OPS}
    ops = {op: table(kernels) for op, kernels in compiled.items()}
    kernel_resources.show(ops)
    if options.write:
        for op, kernels in compiled.items():
            TABLES.write(op, ops[op])
            triton_known.write(op, {each.kernel.fingerprint: resources(each) for each in kernels})


if __name__ == "__main__":
    sys.exit(main())
