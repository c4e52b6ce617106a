"""Every Triton kernel is compiled for every architecture, without a device: it does, and what it takes is as known.

The tables in `resources/` say what every kernel took of a multiprocessor; what takes noticeably more is a regression.
What has been compiled before (`resources/known`) is compiled again for one architecture alone, or, where
IMAGEN_FAST_COMPILE_ALL=1, for all of them.
Which calls are compiled, and how, says `tools/triton_resources.py`. After a change that is worth it:
`python tools/triton_resources.py --write`.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagen_fast import _triton

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

pytest.importorskip("triton")
if _triton.INTERPRETED:
    pytest.skip("kernels for Triton's interpreter cannot be compiled", allow_module_level=True)

import kernel_resources
import triton_known
import triton_resources
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton_resources import OPS, TABLES, Compiled, compile_all

WRITE = "python tools/triton_resources.py --write"

ops = pytest.mark.parametrize("op", OPS)


ALWAYS = "9.0"  # the architecture for which everything is compiled


@functools.cache
def compiled(op: str) -> list[Compiled]:
    known = {} if os.environ.get("IMAGEN_FAST_COMPILE_ALL") == "1" else triton_known.read(op)
    return compile_all(op, known=known, but=ALWAYS)


@functools.cache
def table(op: str) -> kernel_resources.Kernels:
    return triton_resources.table(compiled(op))


@ops
def test_an_op_is_compiled_for_every_architecture(op: str, record_property: Callable[[str, object], None]) -> None:
    start = time.monotonic()
    kernels = compiled(op)
    fresh = sum(not triton_resources.is_recalled(each) for each in kernels)
    took = f"in {time.monotonic() - start:.0f} s, {len(kernels) - fresh} known"
    record_property("closing line", f"{op}: {fresh} Triton kernels compiled {took}")
    for architecture in _triton.KNOWN_DEVICES:
        pointers = [
            {kind for kind in each.kernel.src.signature.values() if kind in ("*fp16", "*bf16")}
            for each in kernels
            if each.architecture == architecture
        ]
        where = f"add calls to tests/triton/calls/{op}.py"
        assert any(pointers), f"no kernel of 16-bit numbers is compiled for {architecture}: {where}"
        assert not all(pointers), f"no kernel of 32-bit numbers is compiled for {architecture}: {where}"


def test_syntax_trees_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most = 0, 0

    def slow_parse(self: object) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1

    monkeypatch.setattr(JITFunction, "parse", slow_parse)
    function = JITFunction(slow_parse)
    with triton_resources.parsing_one_at_a_time(), ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: function.parse(), range(4)))
    assert most == 1


def test_no_kernel_is_left_out() -> None:
    for architecture in _triton.KNOWN_DEVICES:
        seen = {e.kernel.src.fn.__name__ for op in OPS for e in compiled(op) if e.architecture == architecture}
        left_out = triton_resources.all_kernels() - seen
        assert not left_out, f"not compiled for {architecture}: add a call to tests/triton/calls: {left_out}"


@ops
def test_compiled_graphs_on_disk_are_told_of_every_kernel(op: str) -> None:
    told = {kernel.__name__ for kernel in _triton._kernels_of(_triton.kernels(op))}
    assert {each.kernel.src.fn.__name__ for each in compiled(op)} <= told


@ops
def test_shared_memory_suffices(op: str) -> None:
    limits = {architecture: device.shared_memory for architecture, device in _triton.KNOWN_DEVICES.items()}
    too_much = too_much_shared_memory(table(op), limits)
    assert not too_much, "\n".join(too_much)


def too_much_shared_memory(kernels: kernel_resources.Kernels, limits: dict[str, int]) -> list[str]:
    return [
        f"{name}, {architecture}: {values['shared']} bytes of shared memory, of {limits[architecture]}"
        for name, by_architecture in kernels.items()
        for architecture, values in by_architecture.items()
        if values["shared"] > limits[architecture]
    ]


@ops
def test_nothing_spills(op: str) -> None:
    spilled = kernel_resources.spills({op: table(op)})
    assert not spilled, f"registers spill to memory; change kernels/triton/{op}.json:\n" + "\n".join(spilled)


@ops
def test_no_kernel_takes_more_than_it_did(op: str) -> None:
    problems = [*TABLES.regressions(op, table(op))]
    known = {(name, architecture) for name, each in (TABLES.read(op) or {}).items() for architecture in each}
    now = {(name, architecture) for name, each in table(op).items() for architecture in each}
    problems += [f"{op}: {', '.join(row)} is new or gone" for row in sorted(known ^ now)]
    assert not problems, "\n".join([*problems, f"If all of this is meant: {WRITE}"])


@ops
def test_what_is_known_is_what_the_compiler_says(op: str) -> None:
    known = triton_known.read(op)
    fresh = [each for each in compiled(op) if not triton_resources.is_recalled(each)]
    assert {each.architecture for each in fresh} >= {ALWAYS}
    wrong = [
        f"{each.name}, {each.architecture}"
        for each in fresh
        if each.kernel.fingerprint in known and triton_resources.resources(each) != known[each.kernel.fingerprint]
    ]
    assert not wrong, "\n".join([*wrong, f"Was it written by another machine's compiler? {WRITE}"])


def test_what_is_not_known_is_compiled() -> None:
    fresh = compile_all("gated_gelu", [ALWAYS])
    known = {each.kernel.fingerprint: triton_resources.resources(each) for each in fresh}
    assert len(known) == len(fresh)
    assert not any(map(triton_resources.is_recalled, fresh))
    assert all(map(triton_resources.is_recalled, compile_all("gated_gelu", [ALWAYS], known=known)))
    assert not any(map(triton_resources.is_recalled, compile_all("gated_gelu", ["8.0"], known=known)))
    assert not any(map(triton_resources.is_recalled, compile_all("gated_gelu", [ALWAYS], known=known, but=ALWAYS)))
    forgotten, _ = known.popitem()
    again = [
        each for each in compile_all("gated_gelu", [ALWAYS], known=known) if not triton_resources.is_recalled(each)
    ]
    assert [each.kernel.fingerprint for each in again] == [forgotten]


def test_a_fingerprint_tells_options_and_architectures_apart() -> None:
    kernel = compile_all("gated_gelu", [ALWAYS])[0].kernel
    target = kernel.metadata.target
    keys = {
        triton_known.fingerprint(kernel.src, each, options)
        for each in (target, GPUTarget("cuda", 80, 32))
        for options in ({}, {"num_warps": 8}, {"num_stages": 5})
    }
    assert len(keys) == 6


def test_more_shared_memory_than_there_is_is_seen() -> None:
    kernels = {"k": {"9.0": {"shared": 100}, "12.0": {"shared": 100}}}
    assert too_much_shared_memory(kernels, {"9.0": 100, "12.0": 99}) == ["k, 12.0: 100 bytes of shared memory, of 99"]


def test_reports_are_read() -> None:
    report = " Function k:\n  REG:40 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:472 TEXTURE:0\n"
    assert triton_resources.parse_cuobjdump(report) == {"registers": 40, "spilled": 24}
    metadata = "    .private_segment_fixed_size: 12\n    .sgpr_count:     56\n    .vgpr_count:     43\n"
    metadata += "    .vgpr_spill_count: 4\n"
    assert triton_resources.parse_amdgcn(metadata) == {"registers": 43, "spilled": 16}
