"""What a graph was recorded with besides its inputs: the weights and the Python state of a tree of modules.

A graph bakes in where each weight lies, which modules there are, and every attribute that was read on the way: the
scale of an adapter, a flag of a configuration, the processor of an attention block. So all of them are looked at before
each replay, at the price of some dictionary comparisons a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import partial
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ._fused import FusedMethod, own_methods
from ._kept import Seen, can_be_seen

_DEEPEST = 3  # containers and plain objects in each other
_TABLES = ("_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_STANDARD = frozenset(vars(nn.Module()))  # attributes of every module
_OPAQUE = (FunctionType, BuiltinFunctionType, ModuleType, type, Enum, FusedMethod)
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
# Of whose code it is known that it does nothing but compute
_LIBRARIES = frozenset(("torch", "imagen_fast", "diffusers", "transformers", "imagen_pytorch", "peft", "einops"))
_DECORATORS = frozenset(("functools", "contextlib", "huggingface_hub", "typing_extensions"))  # of their methods


class Watched:
    """A model as it was.

    Attributes:
        obstacle: why no call of it can be recorded, or None.
    """

    def __init__(self, root: nn.Module) -> None:
        self.obstacle = "there are hooks on all modules" if _module._has_any_global_hook() else None
        self._root = root
        self._empty: list[Any] = []  # dictionaries and lists
        self._copies: list[tuple[Any, Any]] = []  # others, and what they held
        self._orders: list[tuple[Mapping[str, Any], list[int]]] = []  # those that hold tensors, and their identities
        self._tensors: list[Tensor] = []
        self._classes: list[tuple[nn.Module, type]] = []
        self._methods: dict[type, tuple[Any, Any]] = {}  # of classes, what gets some of their methods, and these
        self._met: dict[int, Any] = {}  # objects by identity, which stays theirs as long as they are held here
        self._walk_module(root)
        self._seen = Seen(*(self._tensors if self.obstacle is None else ()))
        del self._tensors  # they are not held: a model may be moved, or get others

    def has_changed(self) -> bool:
        """Whether anything is not as it was."""
        if _module._has_any_global_hook():
            return True
        try:
            for container, before in self._copies:
                if container != before:
                    return True
        except Exception:  # arrays and the like, which are not what they were, do not compare
            return True
        for table, order in self._orders:
            if [*map(id, table.values())] != order:
                return True
        for module, cls in self._classes:
            if module.__class__ is not cls:
                return True
        try:
            for cls, (methods_of, methods) in self._methods.items():
                if methods_of(vars(cls)) != methods:
                    return True
        except KeyError:  # one is gone
            return True
        return any(self._empty) or not self._seen.are_still()

    def _walk_module(self, module: nn.Module) -> None:
        for inner in module.modules():
            if id(inner) in self._met:
                continue
            self._met[id(inner)] = inner
            attributes, cls = vars(inner), type(inner)
            self._classes.append((inner, cls))
            if issubclass(cls, torch.jit.ScriptModule):
                self.obstacle = self.obstacle or "a module in it is compiled by TorchScript"
                continue
            for each in cls.__mro__:
                self._watch_methods(each)
            self._look_at_obstacles(inner)
            self._watch(attributes)
            for key in ("_modules", *_HOOKS, *_TABLES):
                self._watch(attributes[key])
            for tensor in (*inner._parameters.values(), *inner._buffers.values()):
                self._walk(tensor, 0)
            for key, value in attributes.items():
                if key not in _STANDARD and key != "forward":
                    self._walk(value, 0)

    def _watch_methods(self, cls: type) -> None:
        """Of a class of PyTorch's `forward` alone: there are many, and each has many methods."""
        if cls in self._methods or cls in (object, nn.Module, Generic):
            return
        found = {name: value for name, value in vars(cls).items() if isinstance(value, FunctionType | property)}
        if cls.__module__.partition(".")[0] == "torch":
            found = {name: value for name, value in found.items() if name == "forward"}
        if not found:
            return
        self._methods[cls] = itemgetter(*found), itemgetter(*found)(vars(cls))
        for name, value in found.items():
            if isinstance(value, FunctionType) and not _is_known_function(value):
                self.obstacle = self.obstacle or f"{cls.__name__}.{name} is a function of no library that is known"

    def _look_at_obstacles(self, module: nn.Module) -> None:
        kind = type(module).__name__
        if self.obstacle is not None:
            return
        if not _is_known(type(module)):
            self.obstacle = f"{kind} is a class of no library that is known"
        elif module is self._root:
            return  # what is on the whole model runs around the graph
        elif module._compiled_call_impl is not None:
            self.obstacle = f"a {kind} in it is compiled"  # what it runs is no operator
        elif module._forward_hooks or module._forward_pre_hooks:
            self.obstacle = f"a {kind} in it has hooks"
        elif "forward" in vars(module) and not _has_known_forward(module):
            self.obstacle = f"the forward of a {kind} in it is replaced"

    def _walk(self, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if type(value) not in _PLAIN_TENSORS:
                self.obstacle = self.obstacle or f"it has a {type(value).__name__}, which is no plain tensor"
            elif not can_be_seen(value):
                self.obstacle = self.obstacle or "it has tensors made in inference mode or on the meta device"
            else:
                self._tensors.append(value)
            return
        if isinstance(value, MethodType):
            self._walk(value.__func__, depth)
            self._walk(value.__self__, depth)
            return
        if isinstance(value, FunctionType) and not _is_known_function(value):
            self.obstacle = self.obstacle or f"{value.__qualname__} is a function of no library that is known"
        if depth > _DEEPEST or id(value) in self._met or isinstance(value, _OPAQUE):
            return
        if isinstance(value, nn.Module):
            self._walk_module(value)
        elif isinstance(value, dict | list | set | tuple):
            self._met[id(value)] = value
            self._watch(value)
            for item in value.values() if isinstance(value, dict) else value:
                self._walk(item, depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.Generator):
            if isinstance(value, partial):
                self._walk([value.func, value.args, value.keywords], depth)
            elif callable(value) and not _is_known(type(value)):
                self.obstacle = self.obstacle or f"{type(value).__name__} is a class of no library that is known"
            self._met[id(value)] = value
            self._watch(vars(value))
            for item in vars(value).values():
                self._walk(item, depth + 1)

    def _watch(self, container: Any) -> None:
        if isinstance(container, tuple):
            return
        if not container:
            self._empty.append(container)
        elif isinstance(container, dict) and any(isinstance(item, Tensor) for item in container.values()):
            self._orders.append((container, [*map(id, container.values())]))
        else:
            self._copies.append((container, container.copy()))


def _is_known(cls: type) -> bool:
    """Whether a class, or the one that it was derived from by a parametrization, is of a known library."""
    return cls.__module__.partition(".")[0] in _LIBRARIES


def _is_known_function(function: FunctionType) -> bool:
    """Whether a function is of a known library, whatever it says of itself: `functools.wraps` gives another's name."""
    library = str(function.__globals__.get("__name__")).partition(".")[0]
    return library in _LIBRARIES or library in _DECORATORS


def _has_known_forward(module: nn.Module) -> bool:
    """Of one that holds a forward itself: whether it is its class's, or does nothing that a graph could not hold."""
    forward = vars(module)["forward"]
    return own_methods(module).get("forward") == "forward" or (isinstance(forward, FusedMethod) and forward.recordable)
