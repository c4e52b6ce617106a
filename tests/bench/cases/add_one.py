"""Cases of a made-up op, x + 1, whose peers behave in every way that the runner must cope with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from imagen_fast.backends import BackendError, _state
from imagen_fast.bench.registry import Case, Peer, random_normal


def on_cpu_backend(x: torch.Tensor) -> torch.Tensor:
    if _state.selection.backend != "cpu":
        raise BackendError("add_one has one kernel, for the CPU")
    return x + 1


def nowhere(x: torch.Tensor) -> torch.Tensor:
    raise BackendError("there is no kernel at all")


def failing(x: torch.Tensor) -> torch.Tensor:
    if _state.selection.backend != "cpu":
        raise BackendError("there is one kernel, for the CPU")
    raise RuntimeError("a kernel's launch: invalid argument")


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def add_too_much(x: torch.Tensor) -> torch.Tensor:
    return x + 1.5


def broken(case: Case) -> Any:
    raise RuntimeError("no such peer\nand a second line")


def dying(case: Case) -> Any:
    os._exit(3)


PEERS = (
    Peer("eager", {"eager": lambda case: add_one}),
    Peer("two", {"first": lambda case: add_one, "second": lambda case: add_one}),
    Peer("wrong", {"wrong": lambda case: add_too_much}),
    Peer("other shape", {"other": lambda case: lambda x: x[:1]}),
    Peer("broken", {"broken": broken}),
    Peer("apart", {"apart": lambda case: add_one}, isolated=True),
    Peer("apart broken", {"broken": broken}, isolated=True),
    Peer("apart dying", {"dying": dying}, isolated=True),
)


def cases() -> Iterator[Case]:
    for name, ours, direction in (
        ("right-forward", on_cpu_backend, "forward"),
        ("right-backward", on_cpu_backend, "backward"),
        ("wrong-forward", lambda x: on_cpu_backend(x) * 1.01, "forward"),
        ("nowhere-forward", nowhere, "forward"),
        ("failing-forward", failing, "forward"),
    ):
        yield Case(
            op="add_one",
            name=name,
            title=f"{name}, 8×4",
            shape=(8, 4),
            dtype=torch.float32,
            layout="nchw",
            direction=direction,  # type: ignore[arg-type]
            inputs=lambda generator, device: {"x": random_normal(generator, (8, 4), torch.float32).to(device)},
            ours=ours,
            eager=add_one,
            truth=add_one,
            peers=PEERS,
            bytes=2 * 8 * 4 * 4,
            flops=8 * 4,
            differentiable=("x",),
            tags=frozenset({"headline"} if name == "right-forward" else ()),
        )
