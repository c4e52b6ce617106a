"""What depends on the text alone, computed once for each text: the projections, keys and values of a prompt.

A diffusion model is called many times with one text. What a module makes of it is kept beside the module (see `_kept`)
and given again as long as the text has the same numbers and everything that it went through is unchanged: every
parameter and buffer, and the scales and the active and merged adapters of LoRA layers. Nothing is kept with
gradients, while compiling, or where a module on the way has hooks, has dropout in training, or is of a class that
is not known to compute from its parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils._pytree import tree_leaves, tree_map

from ..models.layers import TextConditioning
from ._fused import own_methods
from ._kept import Seen, can_be_seen, kept, outside_inference, same_numbers, values_kept
from ._once import once_of_graph
from ._packed import PackedLinear

_TEXTS = 2  # kept at a time: guidance may call a model by turns with two
_PURE = {
    *(nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.SiLU, nn.Dropout, nn.Identity),
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential),
}
_NUMBERS = (bool, int, float, str, type(None))
_EMBEDDINGS = ("diffusers.models.embeddings", TextConditioning.__module__)


class _Made(NamedTuple):
    given: tuple[Seen | Tensor, ...]
    state: Any
    seen: Seen
    result: Any
    versions: list[int]


def of_text(
    owner: nn.Module,
    key: str,
    through: Sequence[nn.Module | None],
    given: tuple[Tensor, ...],
    make: Callable[[], Any],
) -> Any:
    """`make()`, or what it gave for the same text before.

    Args:
        owner: the module beside which the result is kept.
        key: tells this result from others of the same owner.
        through: the modules that `make` calls or reads.
        given: all that the result depends on, besides these modules: the text, and perhaps its mask.
        make: gives a tensor or a structure of tensors, which nobody writes to.
    """
    if torch.compiler.is_compiling() or not values_kept() or any(type(x) is not Tensor or x.is_meta for x in given):
        return make()
    description = _describe(owner, through)
    if description is None or not all(x.device.type == "cpu" or can_be_seen(x) for x in given):
        return make()
    once = once_of_graph()
    if once is None:
        return _kept_or_made(owner, key, description, given, make)
    if all(x.device.type == "cpu" and once.knows(x) for x in given):
        compute = make

        def make() -> Any:  # the record writes to what it reads, so not to what is kept
            return tree_map(Tensor.clone, _kept_or_made(owner, key, description, given, compute))

    def still() -> bool:
        found = _describe(owner, through)
        return found is not None and found[0] == description[0]

    return once.of((id(owner), key), given, make, still)  # dropped when a module has changed


def _kept_or_made(
    owner: nn.Module,
    key: str,
    description: tuple[Any, list[Tensor]],
    given: tuple[Tensor, ...],
    make: Callable[[], Any],
) -> Any:
    state, tensors = description
    entries: list[_Made] = kept(owner).setdefault(key, [])
    for i, made in enumerate(entries):
        if (
            made.state == state
            and all(map(_is_same, made.given, given))
            and made.seen.still(*tensors)
            and [tensor._version for tensor in tree_leaves(made.result)] == made.versions
        ):
            entries.insert(0, entries.pop(i))
            return made.result
    with outside_inference():
        # By value where that is cheap: text may be written to behind PyTorch's back, too. Elsewhere it would wait
        # for the device.
        copies = tuple(x.clone() if x.device.type == "cpu" else Seen(x) for x in given)
        result = make()
        versions = [tensor._version for tensor in tree_leaves(result)]
        entries.insert(0, _Made(copies, state, Seen(*tensors), result, versions))
    del entries[_TEXTS:]
    return result


def _is_same(kept_text: Seen | Tensor, text: Tensor) -> bool:
    return kept_text.still(text) if isinstance(kept_text, Seen) else same_numbers(kept_text, text)


def _describe(owner: nn.Module, modules: Iterable[nn.Module | None]) -> tuple[Any, list[Tensor]] | None:
    """All that the results of an owner's modules depend on, besides their inputs; None if that cannot be told."""
    if _module._has_any_global_hook():
        return None
    states: list[Any] = [_attributes(owner)]
    tensors: list[Tensor] = []
    for outer in modules:
        for module in () if outer is None else outer.modules():
            state = _state(module)
            if state is None:
                return None
            states.append((id(module), state))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or not can_be_seen(tensor):
                        return None
                    tensors.append(tensor)
    return states, tensors


def _state(module: Any) -> tuple[Any, ...] | None:
    """What a module computes with, besides its parameters; None if it is not known."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if "forward" in vars(module) and "forward" not in own_methods(module):
        return None
    if any(isinstance(value, Tensor) for value in vars(module).values()):  # in the place of a parameter
        return None
    cls = type(module)
    original = cls.__dict__.get("original", cls)
    if original is nn.Dropout:
        return None if module.training and module.p > 0 else ()
    if cls.__module__.startswith("peft.tuners.lora."):
        return _adapter_state(module)
    known = original in _PURE or original.__module__ in ("torch.nn.modules.container", *_EMBEDDINGS)
    return (original, _attributes(module)) if known else None


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Those that are numbers, flags and names: how many heads or groups it has, and the like."""
    return [(name, value) for name, value in vars(module).items() if isinstance(value, _NUMBERS)]


def _adapter_state(layer: Any) -> tuple[Any, ...] | None:
    """Of a LoRA layer: which adapters it adds, and how much of each."""
    names = ("active_adapters", "merged_adapters", "disable_adapters", "scaling", "use_dora", "fan_in_fan_out")
    try:
        return tuple(repr(getattr(layer, name)) for name in names)
    except AttributeError:
        return None


class TextLinear(PackedLinear):
    """The projection of the text at the entrance of a U-Net, by the name of its attribute."""

    original = nn.Linear
    names = ("encoder_hid_proj",)
    caches_text = True

    def forward(self, input: Tensor) -> Tensor:
        if "forward" in vars(self) and "forward" not in own_methods(self):
            return super().forward(input)
        return of_text(self, "text", (self,), (input,), lambda: super(TextLinear, self).forward(input))
