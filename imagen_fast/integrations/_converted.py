"""A whole model in another dtype or memory format, whose weights and interface stay as they are.

During a call without gradients every floating parameter and buffer is replaced by a converted copy, so that whatever is
in the model (hooks, adapters, modules that no integration knows) computes as in a model that was converted by its
owner. Tensors are cast where they enter the model and where they leave it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ._fused import Fused, FusedMethod, hold, let_go, own_methods
from ._kept import Seen, can_be_seen, invalidations, outside_inference, values_kept
from ._once import once_of_graph


class ConvertedForward(FusedMethod):
    """The `forward` of a model that computes in another dtype, on an instance that keeps its class.

    With gradients, while compiling, and with weights that cannot be copied (on meta, of a tensor subclass), the model
    runs as it is. Calls from several threads wait for each other. What else another thread does with the weights
    (`state_dict`, `parameters`, a backward pass that computes a checkpointed block again) does not wait, and can meet
    the converted ones.
    """

    original = nn.Module
    method = "forward"
    ops = ()

    def __init__(self, owner: nn.Module, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> None:
        super().__init__(owner)
        self.dtype, self.memory_format = dtype, memory_format
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        self._copies: dict[int, tuple[Seen, Tensor]] = {}
        self._current: tuple[Seen, list[Tensor]] | None = None  # all weights as they were, and their copies
        self._invalidations = invalidations()

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "dtype": self.dtype, "memory_format": self.memory_format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def __func__(self) -> Any:
        """As of the bound method in whose place this is; signatures are read from it."""
        return type(self.owner).forward

    @property
    def __code__(self) -> Any:
        """Of the same method; `torch.export` reads it."""
        return type(self.owner).forward.__code__

    @property
    def __wrapped__(self) -> Any:
        return type(self.owner).forward.__get__(self.owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.owner).forward
        if not values_kept():
            if torch.compiler.is_compiling():
                return forward(self.owner, *args, **kwargs)
            if torch.is_grad_enabled():
                self.forget()  # an optimizer may follow, whose writes can be hidden
            with self._lock if self.dtype is not None else nullcontext():  # another thread's call converts the weights
                return forward(self.owner, *args, **kwargs)
        with self._lock, self._converted() as own:
            if own is None:
                return forward(self.owner, *args, **kwargs)
            layouts: set[bool] = set()

            def enter(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
                    return value  # times are no pictures or texts
                dtype = self.dtype if value.dtype == own and self.dtype is not None else value.dtype
                if value.dim() != 4 or self.memory_format is None:
                    once = once_of_graph() if value.dim() == 3 else None  # a text
                    return value.to(dtype) if once is None else once.of("cast", [value], lambda: value.to(dtype))
                layouts.add(value.is_contiguous())
                return value.to(dtype, memory_format=self.memory_format)

            def leave(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                if value.dtype == self.dtype:
                    value = value.to(own)
                return value.contiguous() if value.dim() == 4 and layouts == {True} else value

            sizes = [values["time_ids"] for values in _with_sizes(args, kwargs)]
            args, kwargs = tree_map(enter, (args, kwargs))
            for values, given in zip(_with_sizes(args, kwargs), sizes, strict=True):
                values["time_ids"] = given
            return tree_map(leave, forward(self.owner, *args, **kwargs))

    @contextmanager
    def _converted(self) -> Iterator[torch.dtype | None]:
        """Inside, the model has its converted weights; gives the dtype that it has outside, None if it keeps it."""
        found = _floating(self.owner)
        if found is None or not found:
            yield None
            return
        copies = self._copies_of([tensor for _, _, tensor in found])
        try:
            for (table, name, _), copy in zip(found, copies, strict=True):
                table[name] = copy
            yield found[0][2].dtype
        finally:
            for (table, name, tensor), copy in zip(found, copies, strict=True):
                if table.get(name) is copy:
                    table[name] = tensor

    def _copies_of(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._invalidations != invalidations():
            self._copies, self._current, self._invalidations = {}, None, invalidations()
        current = self._current  # a call with gradients, in another thread, may forget it
        if current is None or not current[0].still(*tensors):
            copies = [self._copy(tensor) for tensor in tensors]
            alive = {*map(id, tensors)}
            self._copies = {key: kept for key, kept in self._copies.items() if key in alive}
            self._current = current = Seen(*tensors), copies
        return current[1]

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.dtype is None or tensor.dtype == self.dtype:
            return tensor
        found = self._copies.get(id(tensor))
        if found is not None and found[0].still(tensor):
            return found[1]
        with outside_inference():
            copy = tensor.detach().to(self.dtype)
            if self.memory_format is not None and copy.dim() == 4:
                copy = copy.contiguous(memory_format=self.memory_format)
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=False)
        self._copies[id(tensor)] = Seen(tensor), copy
        return copy


def _with_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments that hold sizes of pictures (diffusers' `added_cond_kwargs`), which are embedded like times."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "time_ids" in value]


def _floating(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]] | None:
    """Where a model's floating tensors stand; None if there is one that cannot be converted."""
    found = []
    for module in model.modules():
        keeps = module.keeps_dtype if isinstance(module, Fused) else ()
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_floating_point() or name in keeps:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or not can_be_seen(tensor):
                    return None
                found.append((table, name, tensor))
    return found


# ---- Putting it there


def convert(
    model: nn.Module,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    make: Callable[..., ConvertedForward] | None = None,
) -> str | None:
    """Have a model compute in another dtype or memory format, from now on; without any argument that ends.

    Args:
        model: whose forward it concerns.
        dtype, memory_format: see `ConvertedForward`.
        make: makes another kind of it.

    Returns:
        Why it could not be done, or None.
    """
    key = next((key for key, value in vars(model).items() if isinstance(value, ConvertedForward)), None)
    if dtype is None and memory_format is None and make is None:
        if key is not None:
            unconvert(model)
        return None
    if key is None:
        held = [key for key, method in own_methods(model).items() if method == "forward"]
        if not held and "forward" in vars(model):
            return "its forward is replaced on the instance, so that it stays in its own dtype and memory format"
        key = held[0] if held else "forward"
    hold(model, key, (make or ConvertedForward)(model, dtype, memory_format))
    return None


def unconvert(model: nn.Module) -> None:
    """Undo `convert`, also where a wrapper has taken the method's name and keeps the method under another one."""
    for key, value in list(vars(model).items()):
        if isinstance(value, ConvertedForward):
            let_go(model, key, value)


def converted_bytes(model: nn.Module, dtype: torch.dtype | None) -> dict[str, int]:
    """What converted copies of a model's weights take, by name of the weight."""
    kept = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, Fused)
        for name in module.keeps_dtype
    }
    return {
        name: tensor.numel() * dtype.itemsize
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype and name not in kept
    }
