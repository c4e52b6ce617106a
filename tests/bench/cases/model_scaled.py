"""A made-up model, x times a number, whose contenders behave in every way that the runner must cope with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from imagen_fast.bench.registry import Case, Peer, random_normal

SEEN: list[float] = []


def scaled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 3 + y


def remembering(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    SEEN.append(x[0, 0].item() - y[0, 0].item())
    return scaled(x, y)


def off(by: float) -> Callable[[Case], Any]:
    return lambda case: lambda x, y: scaled(x, y) * (1 + by)


def greedy(case: Case) -> Any:
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    return lambda x, y: scaled(x, y) + 0 * kept[0]


def dying_later(case: Case) -> Any:
    calls = iter(range(6))
    return lambda x, y: scaled(x, y) if next(calls, None) is not None else os._exit(3)


PEERS = (
    Peer("eager", {"eager": lambda case: scaled}),
    Peer("two", {"greedy": greedy, "broken": lambda case: 1 / 0}),
    Peer("wrong", {"wrong": off(0.1)}),
    Peer("dying", {"dying": dying_later}),
)


def cases() -> Iterator[Case]:
    for name, build in (("right", lambda case: remembering), ("wrong", off(1e-4))):
        yield Case(
            op="model_scaled",
            name=name,
            title=name,
            shape=(8, 4),
            dtype=torch.float32,
            layout="plain",
            direction="forward",
            inputs=lambda generator, device: {
                key: random_normal(generator, (8, 4), torch.float32).to(device) for key in "xy"
            },
            ours=remembering,
            eager=scaled,
            truth=scaled,
            peers=PEERS,
            bytes=2 * 8 * 4 * 4,
            flops=8 * 4,
            renewed=("x",),
            apart=Peer("ours", {"plain": build}),
        )
