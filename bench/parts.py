"""Modules of a larger model, given to a runtime while the loop around them stays in Python.

That is how a pipeline is used with ONNX Runtime or OpenVINO: its U-Net and its text encoder are exported, and what
calls them goes on as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .peers import PeerError

Convert = Callable[[nn.Module, dict[str, Tensor]], Callable[..., Tensor]]
"""Gets a module that takes tensors in order, and an example of them by name; gives what runs in its place."""


@dataclass
class _Call:
    """How a module is called, and with what; `in_tuple`: its result is the first item of a tuple or of an output."""

    signature: inspect.Signature
    tensors: dict[str, Tensor]
    others: dict[str, Any]
    in_tuple: bool = False


class _Part(nn.Module):
    """A module as a function of the tensors among its arguments, to one tensor."""

    def __init__(self, module: nn.Module, call: _Call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.call.tensors, tensors, strict=True))
        result = self.module(**named, **self.call.others)
        return result[0] if self.call.in_tuple else result


class _Served:
    """Stands for the `forward` of a module."""

    def __init__(self, name: str, run: Callable[..., Tensor], call: _Call) -> None:
        self.name, self.run, self.call = name, run, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, others = _sorted(self.call.signature, args, kwargs)
        if list(tensors) != list(self.call.tensors) or others != self.call.others:
            raise PeerError(f"{self.name} was exported for other arguments than it is called with")
        result = self.run(*tensors.values())
        return (result,) if self.call.in_tuple else result


def hand_over(model: nn.Module, names: Iterable[str], example: Callable[[], object], convert: Convert) -> None:
    """Let what `convert` makes of them serve the named submodules of `model`.

    Their weights are then given up: the runtime has its own.

    Args:
        model: is changed in place.
        names: of submodules, each of which `example` calls, always with the same arguments but for their values.
        example: runs the model once, so that it is seen how it calls them.
        convert: see `Convert`.

    Raises:
        PeerError: one of them is not called.
    """
    modules = {name: model.get_submodule(name) for name in names}
    for name, call in _first_calls(modules, example).items():
        module = modules[name]
        with torch.no_grad():
            run = convert(_Part(module, call), call.tensors)
        call.tensors = dict.fromkeys(call.tensors, torch.empty(0))  # the names alone are needed
        module.forward = _Served(name, run, call)  # type: ignore[assignment]
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


def _first_calls(modules: dict[str, nn.Module], example: Callable[[], object]) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}

    def listen(name: str, module: nn.Module) -> Any:
        signature = inspect.signature(module.forward)

        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if name not in calls:
                tensors, others = _sorted(signature, args, kwargs)
                kept = {key: value.clone() for key, value in tensors.items()}
                calls[name] = _Call(signature, kept, others, not isinstance(result, Tensor))

        return module.register_forward_hook(hook, with_kwargs=True)

    hooks = [listen(name, module) for name, module in modules.items()]
    try:
        with torch.no_grad():
            example()
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in modules if name not in calls]:
        raise PeerError(f"{', '.join(missing)} is never called")
    return {name: calls[name] for name in modules}


def _sorted(signature: inspect.Signature, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments of a call by name: tensors, and others."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in bound.items() if name not in tensors}
