"""Correctness, before anything is timed: ours against float64, by the rule of `imagen_fast.testing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import testing
from .registry import Case, Function
from .timing import output_gradients, tensors


class Truth(NamedTuple):
    """What results of a case are held to, by the name of the output ("output", "grad x", ...)."""

    truth: dict[str, Tensor]
    eager: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """For another process."""
        torch.save(self._asdict(), path)

    @classmethod
    def load(cls, path: Path) -> Truth:
        """What `save` wrote."""
        return cls(**torch.load(path, weights_only=True))


class Accuracy(NamedTuple):
    """The output or gradient of ours that came nearest to its limit; errors as `error` and `model_error` have them."""

    worst: str
    error: float
    allowed: float


def results(
    case: Case,
    function: Function,
    inputs: Sequence[dict[str, Any]],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    upstream: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs of `function` on all `inputs`, one after another, and the gradients where the case has a backward,
    by name.

    `upstream` are the gradients of the outputs; without them they are random, and the same for every function.
    """
    found = [_results(case, function, values, context, upstream) for values in inputs]
    return found[0] if len(found) == 1 else {name: torch.cat([each[name] for each in found]) for name in found[0]}


def _results(
    case: Case,
    function: Function,
    values: dict[str, Any],
    context: Callable[[], AbstractContextManager[Any]],
    upstream: list[Tensor] | None,
) -> dict[str, Tensor]:
    with context(), torch.set_grad_enabled(case.direction != "forward"):
        outputs = tensors(function(**values))
        named = {f"output {i}" if i else "output": output.detach() for i, output in enumerate(outputs)}
        if case.direction != "forward":
            inputs = [values[name] for name in case.differentiable]
            gradients = torch.autograd.grad(outputs, inputs, upstream or output_gradients(outputs))
            named |= {f"grad {name}": gradient for name, gradient in zip(case.differentiable, gradients, strict=True)}
    return named


def truth(case: Case, inputs: Sequence[dict[str, Any]]) -> Truth:
    """The case's truth in float64 on the inputs as they are, and eager PyTorch's result in their dtype."""
    exact = [{name: _exact(value) for name, value in values.items()} for values in inputs]
    # Rounded to the dtype of the case first, as every implementation gets them.
    upstream = None
    if case.direction != "forward":
        upstream = [gradient.double() for gradient in output_gradients(case.eager(**inputs[0]))]
    return Truth(results(case, case.truth, exact, upstream=upstream), results(case, case.eager, inputs))


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def accuracy(case: Case, ours: dict[str, Tensor], against: Truth) -> Accuracy:
    """Hold every output and gradient to the rule: of one op, of a whole model, or of a model that samples.

    Raises:
        AssertionError: one of them is less accurate than eager PyTorch allows.
    """
    rule, errors = testing.assert_as_accurate, testing.largest_error
    if case.samples_checked:
        rule, errors = testing.assert_sampling_as_accurate, testing.sampling_error
    elif case.apart:
        rule, errors = testing.assert_model_as_accurate, testing.model_error
    worst = Accuracy("", 0.0, 0.0)
    for name, value in ours.items():
        eager, exact = against.eager[name], against.truth[name]
        rule(value, eager, exact, name=name)
        error, allowed = errors(value, eager, exact)
        if not worst.worst or error * worst.allowed > worst.error * allowed:
            worst = Accuracy(name, error, allowed)
    return worst


def error(case: Case, value: Tensor, exact: Tensor) -> float:
    """The largest error relative to the truth's largest magnitude; of a model both in the 2-norm, and of one that
    samples the geometric mean over the samples."""
    if case.apart:
        errors = testing.sampling_error if case.samples_checked else testing.model_error
        return errors(value.detach(), value.detach(), exact)[0]
    size = exact.abs().max().item() if exact.numel() else 0.0
    return (value.detach().double() - exact).abs().max().item() / size if size else 0.0
