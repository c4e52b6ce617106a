"""The host SIMT emulator itself: right kernels give right results, and each planted fault is found.

The kernels are in `kernels/correct.cu` and `kernels/faults.cu`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = Path(__file__).parent / "kernels"
ORDERS = ("forward", "reverse", "random")

sys.path.insert(0, str(ROOT / "tools"))
import build_emulator  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++")


def names(file: str) -> list[str]:
    return re.findall(r"^CASE\((\w+)\)", (KERNELS / file).read_text(), re.MULTILINE)


@cache
def built(flavour: str) -> Path:
    return build_emulator.build(flavour, sorted(KERNELS.glob("*.cu")), "emulator_cases")


def run(name: str, flavour: str = "plain", order: str = "forward", **options: int) -> str:
    """What the emulator says of a case; "" if nothing."""
    settings = " ".join(["capability=90 seed=0", *(f"{key}={value}" for key, value in options.items())])
    arguments = name.encode(), f"{settings} order={order}".encode()
    if flavour != "address":
        library = ctypes.CDLL(str(built(flavour)))
        library.run_case.restype = ctypes.c_char_p
        return library.run_case(*arguments).decode()
    # AddressSanitizer ends its process.
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.run_case.restype = ctypes.c_char_p; "
        "print(library.run_case(sys.argv[2].encode(), sys.argv[3].encode()).decode())"
    )
    command = [sys.executable, "-S", "-c", code, str(built(flavour)), *(a.decode() for a in arguments)]
    variables = os.environ | build_emulator.environment(flavour)
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flavour", ["plain", "races"])
@pytest.mark.parametrize("name", names("correct.cu"))
def test_right_kernels_are_right_and_no_fault_is_found(name: str, flavour: str, order: str) -> None:
    assert run(name, flavour, order) == ""


@pytest.mark.parametrize("name", names("correct.cu"))
def test_right_kernels_stay_within_bounds(name: str) -> None:
    assert run(name, "address") == ""


@pytest.mark.parametrize("seed", range(5))
def test_random_orders(seed: int) -> None:
    for name in names("correct.cu"):
        assert run(name, order="random", seed=seed) == "", name


# Where each fault shows: flavour and order, and what is said. A message of its own is better than "wrong".
FAULTS: dict[str, dict[str, str]] = {
    "missing_barrier": {
        "plain-reverse": "wrong: element",
        "races": r"data race on shared memory at offset .*: read at .*faults.cu:\d+, written by thread .* at .*faults",
    },
    "missing_second_barrier": {"races": r"data race on shared memory at offset .*: (read|written) at .*faults"},
    "missing_syncwarp": {"races": "data race on shared memory"},
    "divergent_barrier": {"plain": r"divergent __syncthreads: this thread is at .*faults.cu:\d+, 32 others wait at"},
    "barrier_that_some_skip": {
        "plain": "this thread has returned, but 32 threads wait for it at __syncthreads, .*faults.cu:",
        "plain-reverse": "__syncthreads, .*faults.cu:.*: 32 threads have returned and will never arrive",
    },
    "deadlock": {"plain": r"deadlock; 16 threads wait at __shfl_xor_sync, .*; 16 threads wait at __syncthreads, .*"},
    "lanes_that_disagree": {
        "plain": "the lanes of a warp disagree: this one is in __shfl_sync, .*, others are in __shfl_xor_sync"
    },
    "shuffle_from_a_lane_that_takes_no_part": {"plain": "wrong: NaN"},
    "grid_sync_without_cooperative_launch": {"plain": "grid_sync, .*: the launch is not cooperative"},
    "uninitialised_shared_memory": {"plain": "wrong: NaN"},
    "shared_variable_overrun": {
        "plain": "shared memory was written 0 bytes past the end of a shared variable of 128 bytes",
        "address": "AddressSanitizer: use-after-poison",
    },
    "dynamic_shared_memory_overrun": {
        "plain": "shared memory was written 0 bytes past the end of the 128 bytes of dynamic shared memory",
        "address": "AddressSanitizer: use-after-poison",
    },
    "dynamic_shared_memory_overread": {"address": "AddressSanitizer: use-after-poison"},
    "too_much_static_shared_memory": {"plain": "SHARED variables exceed 48 KB"},
    "read_past_the_end": {"address": r"AddressSanitizer: heap-buffer-overflow(.|\n)*READ of size 4"},
    "write_past_the_end": {"address": r"AddressSanitizer: heap-buffer-overflow(.|\n)*WRITE of size 4"},
    "two_blocks_write_one_element": {"races": "data race on memory: written at .*, written by thread"},
    "counting_without_atomics": {"races": "data race on memory"},
    "missing_grid_sync": {"plain-forward": "wrong: sum", "races": "data race on memory: .* of block"},
    "misaligned_vector": {"plain": "misaligned access, .*: the address of 16 bytes is 2 past a multiple of 16"},
    "misaligned_pointer": {"address": "runtime error: .*misaligned address"},
    "misaligned_ldmatrix": {"plain": "misaligned access, .*faults.cu:"},
    "ldmatrix_of_global_memory": {"plain": "ldmatrix, .*: the row is not in shared memory"},
    "missing_wait_for_copies": {"plain": "wrong: element", "races": "wrong: element|data race"},
    "wait_for_too_few_copies": {"plain": "wrong: element"},
    "missing_barrier_after_copies": {"plain": "wrong: element", "races": "data race on shared memory"},
    "copy_over_what_others_read": {"races": "data race on shared memory"},
    "cluster_rank_that_is_none": {"plain": r"map_shared_rank: there is no block \d+ in a cluster of 4"},
    "missing_first_cluster_sync": {
        "plain-forward": "wrong: block",
        "races": "shared memory of block 1 of the cluster is accessed before any cluster_sync",
    },
    "missing_last_cluster_sync": {
        "races": "this block ends, but another of its cluster has accessed its shared memory since"
        "|has ended, its shared memory is gone; a cluster_sync is missing",
    },
    "map_of_what_is_not_shared": {"plain": "the pointer is not to this block's shared memory"},
    "too_many_threads": {"plain": r"a block of \(1025, 1, 1\) threads; it needs 1 to 1024"},
    "empty_grid": {"plain": r"a grid of \(0, 1, 1\) blocks; it needs at least 1"},
    "too_much_shared_memory": {"plain": "232449 bytes of shared memory; a block has at most 232448"},
    "too_large_a_cluster": {"plain": "a cluster of 16 blocks; every device takes up to 8"},
    "cluster_that_does_not_divide_the_grid": {"plain": "clusters of 4 blocks do not divide 6 blocks along x"},
    "cluster_of_two": {"plain-80": "clusters need capability 9.0"},
    "too_large_a_cooperative_grid": {"plain": "a cooperative grid of 9 blocks; of this size the device holds 8"},
    "stack_overflow": {"plain": r"thread \(\d, 0, 0\) of block \(0, 0, 0\) needs more stack"},
}


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        pytest.param(name, where, message, id=f"{name}-{where}")
        for name, found in FAULTS.items()
        for where, message in found.items()
    ],
)
def test_a_planted_fault_is_found(name: str, where: str, message: str) -> None:
    flavour, _, rest = where.partition("-")
    options = {"capability": int(rest)} if rest.isdigit() else {}
    said = run(name, flavour, rest if rest in ORDERS else "forward", **options)
    assert re.search(message, said), f"the emulator said: {said or 'nothing'}"


def test_every_fault_has_its_test() -> None:
    assert set(FAULTS) == set(names("faults.cu"))


def test_the_emulator_goes_on_after_a_fault() -> None:
    for name in names("faults.cu"):
        if "plain" in FAULTS[name]:
            run(name)
            assert run("distributed_shared_memory") == "", name


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_devices_hold_what_they_hold(capability: int) -> None:
    assert run("what_the_device_can_hold", capability=capability) == ""


def test_an_unknown_option_is_an_error() -> None:
    assert "there is no option colour=1" in run("deadlock", colour=1)
