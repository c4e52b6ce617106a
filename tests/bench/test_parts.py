"""Modules of a model that a runtime serves."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from imagen_fast.bench.parts import hand_over
from imagen_fast.bench.peers import PeerError


class Output(NamedTuple):
    sample: Tensor


class Inner(nn.Module):
    """Returns what it is told to, as models of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None = None, form: str = "tensor", **more: Any) -> Any:
        y = self.linear(x) * time + (0 if text is None else text) + more.get("offset", 0)
        return {"tensor": y, "tuple": (y,), "output": Output(y)}[form]


class Outer(nn.Module):
    """A loop around it."""

    def __init__(self, form: str = "tensor", **arguments: Any) -> None:
        super().__init__()
        self.inner = Inner()
        self.unused = nn.Linear(2, 2)
        self.arguments: dict[str, Any] = {"form": form, **arguments}

    def forward(self, x: Tensor) -> Tensor:
        for step in range(3):
            result = self.inner(x, torch.tensor(float(step)), **self.arguments)
            x = result if isinstance(result, Tensor) else result[0]
        return x


def counted(calls: list[list[tuple[int, ...]]]) -> Any:
    """A conversion to the module itself with weights of its own, that notes the shapes of its calls."""

    def convert(part: nn.Module, example: dict[str, Tensor]) -> Any:
        traced = torch.jit.trace(part, tuple(example.values()))
        frozen = torch.jit.freeze(traced.eval())

        def run(*tensors: Tensor) -> Tensor:
            calls.append([tuple(tensor.shape) for tensor in tensors])
            return frozen(*tensors)

        return run

    return convert


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["tensor", "tuple", "output"])
@pytest.mark.parametrize("more", [{}, {"text": torch.ones(4)}, {"offset": torch.ones(1)}], ids=["", "text", "offset"])
def test_a_served_module_computes_the_same(form: str, more: dict[str, Tensor]) -> None:
    model = Outer(form, **more).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
        calls: list[list[tuple[int, ...]]] = []
        hand_over(model, ["inner"], lambda: model(torch.randn(2, 4)), counted(calls))
        torch.testing.assert_close(model(x), expected)
    assert calls == [[(2, 4), (), *(tuple(tensor.shape) for tensor in more.values())]] * 3
    assert all(not parameter.numel() for parameter in model.inner.parameters())
    assert all(parameter.numel() for parameter in model.unused.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_another_kind_of_call_is_refused() -> None:
    model = Outer().eval()
    hand_over(model, ["inner"], lambda: model(torch.randn(2, 4)), counted([]))
    model.arguments["text"] = torch.ones(4)
    with pytest.raises(PeerError, match="inner was exported for other arguments"):
        model(torch.randn(2, 4))


def test_a_part_that_is_not_called_is_named() -> None:
    model = Outer()
    with pytest.raises(PeerError, match="unused is never called"):
        hand_over(model, ["inner", "unused"], lambda: model(torch.randn(2, 4)), counted([]))
