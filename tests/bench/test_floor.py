from __future__ import annotations

import pytest
import torch

from imagen_fast.bench import floor
from imagen_fast.bench.floor import CopyRate, Limits, MatmulRate


def limits() -> Limits:
    return Limits((CopyRate(1000, 1e6),), (MatmulRate("fp32", 1e9), MatmulRate("fp16", 1e6), MatmulRate("fp64", 1e8)))


@pytest.mark.parametrize(
    ("flops", "dtype", "seconds"),
    [
        pytest.param(10, torch.float32, 1e-3, id="bound by memory"),
        pytest.param(10**7, torch.float32, 1e-2, id="bound by arithmetic"),
        pytest.param(10**7, torch.float16, 1e-2, id="16-bit arithmetic slower than fp32 counts as fp32"),
        pytest.param(10**7, torch.float64, 1e-1, id="fp64 does not"),
    ],
)
def test_floor(flops: int, dtype: torch.dtype, seconds: float) -> None:
    assert limits().floor(1000, flops, dtype) == pytest.approx(seconds)


def test_each_rate_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(floor, "copy_bandwidth", lambda moved, device: asked.append(moved) or 1e9)
    monkeypatch.setattr(floor, "matmul_rate", lambda dtype, device: asked.append(dtype) or 1e9)
    found = Limits()
    for _ in range(3):
        found.floor(4096, 10, torch.bfloat16)
    assert sorted(map(str, asked)) == ["4096", "torch.bfloat16", "torch.float32"]
    assert found.copy == (CopyRate(4096, 1e9),)


def test_cold_bytes_come_from_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "last_level_cache", lambda device: 1 << 20)
    found = Limits((CopyRate(1000, 1e6), CopyRate(4 << 20, 1e5)), limits().matmul)
    assert found.floor(1000, 1, torch.float32, cold=True) == pytest.approx(1e-2)


def test_measured_rates_are_plausible() -> None:
    assert 1e8 < floor.copy_bandwidth(1 << 20, seconds=0.01) < 1e13
    assert 1e8 < floor.matmul_rate(torch.float32, seconds=0.01) < 1e14
