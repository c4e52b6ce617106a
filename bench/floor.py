"""The limit of this machine, measured: how fast it copies memory, and how fast it multiplies matrices.

    floor = max(bytes / copy bandwidth, flops / matmul rate)          percent of floor = floor / time

The copy bandwidth is taken at the working-set size of the case, because a tensor that fits a cache is copied many times
faster than one that does not: source and destination together have the bytes that the case must move. The matmul rate
is that of the case's dtype, or of float32 where that is faster (a machine without fp16 arithmetic can still convert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..provenance import last_level_cache
from .registry import dtype_name
from .timing import Contender, Settings, interleave

_COLD_FACTOR = 4  # a copy of this many last-level caches runs at the speed of main memory
_MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_MATMUL_SECONDS = 0.2  # the next size is tried only while a product stays below this


@dataclass(frozen=True)
class CopyRate:
    """Bytes read and written per second by a copy that moves `moved` bytes, both ways counted."""

    moved: int
    bytes_per_second: float


@dataclass(frozen=True)
class MatmulRate:
    """Flops per second of a product of square matrices."""

    dtype: str
    flops_per_second: float


@dataclass
class Limits:
    """The rates measured in this run: each when it is first needed, and once."""

    copy: tuple[CopyRate, ...] = ()
    matmul: tuple[MatmulRate, ...] = ()
    device: str = "cpu"

    def floor(self, moved: int, flops: int, dtype: torch.dtype, cold: bool = False) -> float:
        """The least seconds in which `moved` bytes and `flops` operations can be done, by what was measured.

        With `cold` the bytes come from main memory, whatever their number.
        """
        working_set = max(moved, _COLD_FACTOR * last_level_cache(self.device)) if cold else moved
        rate = self.matmul_rate(dtype)
        if dtype != torch.float64:
            rate = max(rate, self.matmul_rate(torch.float32))
        return max(moved / self.copy_rate(working_set), flops / rate)

    def copy_rate(self, moved: int) -> float:
        """Bytes per second for a working set of `moved` bytes."""
        for known in self.copy:
            if known.moved == moved:
                return known.bytes_per_second
        self.copy += (CopyRate(moved, copy_bandwidth(moved, self.device)),)
        return self.copy[-1].bytes_per_second

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Flops per second in `dtype`."""
        name = dtype_name(dtype)
        for known in self.matmul:
            if known.dtype == name:
                return known.flops_per_second
        self.matmul += (MatmulRate(name, matmul_rate(dtype, self.device)),)
        return self.matmul[-1].flops_per_second


def copy_bandwidth(moved: int, device: str = "cpu", seconds: float = 0.15) -> float:
    """Bytes read and written per second by a copy that reads `moved / 2` bytes and writes as many.

    On the CPU the better of PyTorch's copy, which uses all threads, and numpy's, which uses one and costs less to call.
    """
    source = torch.ones(max(moved // 2, 8) // 4 + 1, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copies: dict[str, Callable[[], object]] = {"torch": lambda: target.copy_(source)}
    if device == "cpu":
        source_array, target_array = source.numpy(), target.numpy()
        copies["numpy"] = lambda: target_array.__setitem__(slice(None), source_array)
    return 2 * source.numel() * 4 / _fastest(copies, device, seconds)


def matmul_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.3) -> float:
    """Flops per second of a product of two square matrices in `dtype`, the best over a few sizes."""
    best = 0.0
    for size in _MATMUL_SIZES:
        a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
        needed = _fastest({"matmul": lambda a=a, b=b: a @ b}, device, seconds if best else 0.0)  # type: ignore[misc]
        best = max(best, 2 * size**3 / needed)
        if needed * 8 > _MATMUL_SECONDS:
            break
    return best


def _fastest(functions: dict[str, Callable[[], object]], device: str, seconds: float) -> float:
    """The lowest 20 % quantile of seconds per call: a limit is what is possible when nothing else disturbs."""
    contenders = [
        Contender(name, call=lambda _, function=function: function(), state=lambda: None)  # type: ignore[misc]
        for name, function in functions.items()
    ]
    timings = interleave(contenders, Settings(seconds=seconds / len(functions), min_rounds=5, device=device))
    return min(timing.q20 for timing in timings.values())
