"""The projections of one embedding by many layers, in one product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_fast.integrations import _time
from imagen_fast.integrations._kept import kept
from imagen_fast.integrations._packed import PackedLinear
from imagen_fast.integrations._time import projected

WIDTHS = (6, 10, 4)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets how many layers were taken together, whenever some were."""
    sizes: list[int] = []
    compute = _time._together
    monkeypatch.setattr(_time, "_together", lambda layers, y: sizes.append(len(layers)) or compute(layers, y))
    return sizes


def build(cls: type[nn.Linear] = PackedLinear) -> list[Any]:
    torch.manual_seed(0)
    return [cls(8, width) for width in WIDTHS]


def run(layers: list[Any], seed: int) -> None:
    """One call of a model, and what it should give."""
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    for layer in layers:
        expected = nn.Linear.forward(layer, F.silu(x)) if isinstance(layer, PackedLinear) else layer(F.silu(x))
        torch.testing.assert_close(projected(layer, x, "silu"), expected, rtol=1e-6, atol=1e-6)


def test_from_the_second_call_on_layers_are_taken_together(together: list[int]) -> None:
    layers = build()
    for seed in range(4):
        run(layers, seed)
    assert together == [3, 3, 3]
    assert not any("packed" in kept(layer) for layer in layers)  # the joined copy alone is held
    run(layers[:1], 4)
    run(layers, 5)
    assert together[3:] == [3, 3]


@pytest.mark.parametrize("when", ["between", "amid"])
@pytest.mark.parametrize("how", ["in place", "replaced", "hook", "input"])
def test_changes_are_seen(how: str, when: str) -> None:
    layers = build()
    for seed in range(3):
        run(layers, seed)
    x = torch.randn(2, 8)
    if when == "amid":
        projected(layers[0], x, "silu")
    if how == "in place":
        layers[1].weight.mul_(3)
    elif how == "replaced":
        layers[1].bias = nn.Parameter(torch.ones(10))
    elif how == "hook":
        layers[1].register_forward_hook(lambda module, args, output: output + 1)
    else:
        x.add_(1)
    expected = nn.Linear.forward(layers[1], F.silu(x)) + (how == "hook")
    if when == "between":
        projected(layers[0], x, "silu")
    torch.testing.assert_close(projected(layers[1], x, "silu"), expected, rtol=1e-6, atol=1e-6)


def test_other_layers_stay_apart(together: list[int]) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    layers = [*build(), Scaled(8, 5)]
    for seed in range(3):
        run(layers, seed)
    assert together == [3, 3]


def test_with_gradients_layers_are_called(together: list[int]) -> None:
    layers = build()
    run(layers, 0)
    with torch.enable_grad():
        x = torch.randn(2, 8, requires_grad=True)
        sum(projected(layer, x, "silu").sum() for layer in layers).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert together == []


def test_joined_weights_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no layer is packed: by a tensor that says that it is there."""
    layers = build(nn.Linear)
    y = torch.randn(2, 8)

    class Elsewhere(Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            return torch.device("cuda")

    given = y.as_subclass(Elsewhere)
    for factor in (1.0, 2.0):
        layers[1].weight.mul_(factor)
        for found, layer in zip(_time._together(layers, given), layers, strict=True):
            torch.testing.assert_close(found.as_subclass(Tensor), layer(y), rtol=1e-6, atol=1e-6)
    assert len([key for key in kept(layers[0]) if key != "joined"]) == 1
    others = layers[:2]
    _time._together(others, given)
    assert len([key for key in kept(layers[0]) if key != "joined"]) == 1  # of the former group nothing stays
    monkeypatch.setattr(_time, "_MOST_BYTES", 1)
    kept(layers[0]).clear()
    assert all(torch.equal(a, b(given)) for a, b in zip(_time._together(others, given), others, strict=True))
    assert not kept(layers[0])


@pytest.mark.parametrize("hidden", ["inference mode", "data"])
def test_writes_that_pytorch_does_not_count(hidden: str, together: list[int]) -> None:
    layers = build()
    for seed in range(2):
        run(layers, seed)
    with torch.inference_mode() if hidden == "inference mode" else nullcontext():
        x = torch.randn(2, 8)
        projected(layers[0], x, "silu")
        assert together == [3, 3]
        x.data.copy_(torch.randn(2, 8))
        torch.testing.assert_close(projected(layers[1], x, "silu"), layers[1](F.silu(x)), rtol=1e-6, atol=1e-6)
