"""Calls on the CPU as lists of operators: what a list holds, and what none can hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import imagen_fast
from imagen_fast.integrations._calls import NotRecorded
from imagen_fast.integrations._once import Once
from imagen_fast.integrations._operators import Program, Record, recording


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def record(function: Callable[..., Any], *given: Tensor) -> Program:
    seen = Record([*given], Once({}))
    with torch.no_grad(), recording(seen):
        result = function(*given)
    return seen.program(result)


WEIGHT = normal(5, 5, seed=9)

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).relu() @ WEIGHT,
    "views": lambda x: x.t()[1:].unsqueeze(0).expand(2, -1, -1),
    "several results": lambda x: [part.sum(1) for part in x.chunk(2)],
    "structure": lambda x: {"y": x.max(dim=1), "same": x, "n": 3, "none": None},
    "written in place": lambda x: torch.zeros(4, 5).add_(x).mul_(2),
    "list of tensors": lambda x: torch.cat([x, WEIGHT[:4], x], dim=1),
    "constants": lambda x: x + (WEIGHT[:4] * 2).exp() + torch.arange(5),
    "keyword": lambda x: torch.full_like(x, 2.0, dtype=torch.float64) * x.to(torch.float64),
    "infinity": lambda x: x.masked_fill(x > 0, float("-inf")),
    "own operator": lambda x: imagen_fast.ops.rms_norm(x, WEIGHT[0]),
    "constant result": lambda x: (WEIGHT, WEIGHT * 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_is_the_function(name: str) -> None:
    function = FUNCTIONS[name]
    program = record(function, normal(4, 5))
    for seed in range(3):
        x = normal(4, 5, seed=seed)
        torch.testing.assert_close(program([x]), function(x), rtol=0, atol=0)


def test_what_does_not_depend_on_inputs_is_computed_once() -> None:
    program = record(lambda x: x + (WEIGHT * 2).exp().sum(), normal(4, 5))
    assert program.operators == 1


def test_what_nobody_reads_is_left_out() -> None:
    def function(x: Tensor) -> Tensor:
        x.exp().sum()
        return x * 2

    assert record(function, normal(4, 5)).operators == 1


def test_tensors_are_let_go_as_soon_as_in_the_function() -> None:
    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[weakref.ref[Tensor]] = []
            self.most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.most = max(self.most, 1 + sum(made() is not None for made in self.made))
            self.made.append(weakref.ref(out))
            return out

    def function(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + 1
        return x

    program, x = record(function, normal(4)), normal(4)
    with Alive() as mode:
        program([x])
    assert len(mode.made) == 20
    assert mode.most == 2


BUFFER = torch.zeros(4, 5)

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "equal": lambda x: x * torch.equal(x, WEIGHT[:4]),
    "mask": lambda x: x[x > 0].sum(),
    "nonzero": lambda x: x.nonzero().sum(),
    "write": lambda x: BUFFER.copy_(x),
    "write through a view": lambda x: BUFFER[1:].copy_(x[1:]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_hold(name: str) -> None:
    with pytest.raises(NotRecorded, match="numbers" if "write" not in name else "writes"):
        record(REFUSED[name], normal(4, 5))
    assert not BUFFER.any()
