"""Compare the fused modules of a model with their originals and with float64, one at a time, on what reaches them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from . import testing
from .integrations import Fused, give_back

Errors = tuple[float, float, float]  # ours, eager's, allowed; relative to the largest value of the truth


def measure(
    runs: Iterable[Callable[[], object]], fused: Mapping[str, nn.Module], modules: Iterable[nn.Module]
) -> tuple[dict[str, Errors], dict[str, str]]:
    """Call the runs; return the errors of every module of `fused` that they reach, and by name what falls short.

    A module is measured when it is first called, on the inputs that it is called with, and then forgotten: at no time
    is there more than one copy of one module. Modules are in evaluation mode, and training modes come back afterwards.

    Args:
        runs: calls of the model.
        fused: the modules, by name, in their fused form.
        modules: all modules of the model.
    """
    errors: dict[str, Errors] = {}
    failures: dict[str, str] = {}
    handles: dict[str, RemovableHandle] = {}

    def watch(name: str, module: nn.Module) -> None:
        def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A fused module calls children that have hooks. So ours must not be there while it is measured.
            unwatch()
            try:
                errors[name], failure = _compare(module, args, kwargs)
                if failure is not None:
                    failures[name] = failure
            finally:
                for other in fused.keys() - errors.keys():
                    watch(other, fused[other])

        handles[name] = module.register_forward_pre_hook(before_call, with_kwargs=True)

    def unwatch() -> None:
        while handles:
            handles.popitem()[1].remove()

    with _evaluating(modules), torch.no_grad():
        try:
            for name, module in fused.items():
                watch(name, module)
            for run in runs:
                run()
        finally:
            unwatch()
    return errors, failures


def _compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Errors, str | None]:
    """The largest errors of one fused module, and what `assert_as_accurate` has to say."""
    original = copy.deepcopy(module)
    for inner in original.modules():
        give_back(inner)
    compared = module.compared if isinstance(module, Fused) else lambda result: result
    ours = tree_leaves(compared(_forward(module, args, kwargs)))
    eager = tree_leaves(compared(_forward(original, args, kwargs)))
    with _no_autocast(ours):
        truth = tree_leaves(compared(_forward(original.double(), *tree_map(_to_float64, (args, kwargs)))))
    worst, failure = (0.0, 0.0, 0.0), None
    for our, their, true in zip(ours, eager, truth, strict=True):
        if not (_is_floating(our) and _is_floating(their)):  # a result may stand for a tensor that is not made
            continue
        error, allowed = testing.largest_error(our, their, true)
        worst = max(worst, (error, testing.largest_error(their, their, true)[0], allowed))
        try:
            testing.assert_as_accurate(our, their, true)
        except AssertionError as shortfall:
            failure = failure or str(shortfall).replace("\n", "; ")
    return worst, failure


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's own computation, without the hooks on it: they have run, or will, around the call in the model."""
    return type(module).forward(module, *args, **kwargs)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to_float64(value: Any) -> Any:
    if hasattr(type(value), "to_float64"):  # it stands for a tensor that is not made
        return value.to_float64()
    return value.double() if _is_floating(value) else value


def _no_autocast(results: list[Any]) -> torch.autocast:
    device = next((result.device.type for result in results if isinstance(result, Tensor)), "cpu")
    return torch.autocast(device, enabled=False)


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode: dropout would make every run another one."""
    modes = {module: module.training for module in modules}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
