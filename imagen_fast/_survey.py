"""What `accelerate` can do to an object, before it does any of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._report import Copied, Left
from .integrations import (
    Form,
    Fused,
    FusedMethod,
    Integration,
    Options,
    PackedLinear,
    has_form,
    integration_of,
    joined_bytes,
    own_methods,
    packed_bytes,
)


class Candidate(NamedTuple):
    """A module that has a fused form, now or in a moment."""

    name: str
    module: Any
    fused: Form
    notes: list[str]


class Survey(NamedTuple):
    """What can be done to an object.

    Attributes:
        candidates: modules that have a fused form.
        withdrawn: modules that have one that the options of this call do not allow.
        left: modules that miss theirs narrowly.
        over_limit: layers that are not packed because of the limit.
        packed: the weights of those that are.
    """

    candidates: list[Candidate]
    withdrawn: list[nn.Module]
    left: list[Left]
    over_limit: list[Left]
    packed: list[Copied]


def survey(
    obj: Any, integration: Integration, options: Options, dtype: torch.dtype | None, pack_limit: int | None
) -> Survey:
    """What can be done to an object. Changes nothing."""
    result = Survey([], [], [], [], [])
    packing = _Packing(dtype, pack_limit, result)
    seen: set[nn.Module] = set()
    for part_name, part in integration.parts(obj).items():
        part_integration = integration_of(part)
        if part_integration is None:
            continue
        is_module = isinstance(part, nn.Module)
        pieces = part.named_modules(memo=seen, prefix=part_name) if is_module else ((part_name, part),)
        for name, module in pieces:
            form = part_integration.form_of(name, module, options)
            if form is None or (form.packs and not packing.takes(name, module, form)):
                if part_integration.has_fused(module):
                    result.withdrawn.append(module)
                continue
            reason = None if part_integration.has_fused(module) else _why_left(module, form)
            if reason is None:
                result.candidates.append(Candidate(name, module, form, form.obstacles(module)))
            else:
                result.left.append(Left(name, path(type(module)), reason))
            if reason is None and issubclass(form, Fused) and options.inference:
                packing.join(name, form, form.joined(module))
    return result


class _Packing:
    """Which layers are packed, as long as there is room. An owner comes before its layers."""

    def __init__(self, dtype: torch.dtype | None, limit: int | None, result: Survey) -> None:
        self.dtype, self.result = dtype, result
        self.room = float("inf") if limit is None else limit
        self.joined: set[nn.Module] = set()

    def join(self, name: str, owner: Form, layers: Sequence[nn.Module]) -> None:
        """All of an owner's layers that share a copy on a device, or none of them."""
        sizes = [joined_bytes(layer, self.dtype) for layer in layers]
        if any(size is None or _why_not_packed(layer) for size, layer in zip(sizes, layers, strict=True)):
            return
        if sum(filter(None, sizes)) <= self.room:
            self.joined.update(layers)
        else:
            self.result.over_limit.append(Left(name, path(owner.original), "pack_limit is reached"))

    def takes(self, name: str, layer: Any, form: Form) -> bool:
        """Whether a layer takes a form that packs, whose memory is counted then."""
        size = joined_bytes(layer, self.dtype) if layer in self.joined else packed_bytes(layer, self.dtype)
        if size is None and form.caches_text:
            size = 0  # for what it makes of a text
        if size is None or (not has_form(layer, form) and _why_left(layer, form) is not None):
            return False
        if size > self.room:
            self.result.over_limit.append(Left(name, path(form.original), "pack_limit is reached"))
            return False
        self.room -= size
        if size:
            self.result.packed.append(Copied(name, "packed", size))
        return True


def _why_not_packed(layer: Any) -> str | None:
    return None if has_form(layer, PackedLinear) else _why_left(layer, PackedLinear)


def _why_left(module: Any, form: Form) -> str | None:
    if issubclass(form, FusedMethod):
        own = getattr(type(module), form.method) is not getattr(form.original, form.method)
        if type(module) is not form.original and (own or not form.subclasses):
            return f"it is a subclass of {form.original.__name__}, which may compute something else"
        if form.method in vars(module):
            return f"its {form.method} is replaced on the instance"
        return form.why_left(module)
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if type(module) is not form.original:
        return f"it is a subclass of {form.original.__name__}, which may compute something else"
    if "forward" in vars(module) and "forward" not in own_methods(module).values():
        return "its forward is replaced on the instance"
    return None


def path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
