"""What all residual blocks of a U-Net make of one embedding of time, in one product.

Every block projects the same embedding by a layer of its own. Which layers do is found by watching: those that were
given one tensor in a call are taken together in the next, when the first of them comes. Without gradients alone, and of
layers that are plain (`why_called`); any other is called. A result is given only for the very tensor that it was made
of, with the numbers and the weight that it was made with: writes to a tensor are counted, except to one of inference
mode, so on the CPU its numbers are compared, and on a device, where that would wait, such a tensor is not taken.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.group_norm_act import ACTIVATIONS
from ._fused import is_plain, why_called
from ._kept import can_be_seen, drop, kept, values_kept
from ._once import once_of_graph
from ._packed import is_packed_by_onednn, joined, linears

_MOST_BYTES = 64 << 20  # of joined weights on a device, where they stand beside the layers' own

# By the first layer of a call, those that read the same tensor
_groups: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()


class _Made(NamedTuple):
    stamp: tuple[Any, ...]
    result: Tensor


class _Pass(threading.local):
    """Of this thread: what has been made of the tensor that came last, and for which layers it came."""

    x: weakref.ref[Tensor] | None = None
    version: int | None = None
    numbers: Tensor | None = None
    activation: str | None = None

    def __init__(self) -> None:
        self.layers: list[weakref.ref[nn.Module]] = []
        self.made: dict[int, _Made] = {}

    def is_of(self, x: Tensor, activation: str | None) -> bool:
        return (
            self.x is not None
            and self.x() is x
            and self.version == _version(x)
            and self.activation == activation
            and (self.numbers is None or torch.equal(self.numbers, x))
        )

    def begin(self, layer: nn.Module, x: Tensor, activation: str | None) -> None:
        first = self.layers[0]() if len(self.layers) > 1 else None
        if first is not None:
            _groups[first] = self.layers
        self.x, self.version, self.activation = weakref.ref(x), _version(x), activation
        by_numbers = x.device.type == "cpu" and once_of_graph() is None  # a record sees every write
        self.numbers = x.detach().clone() if by_numbers else None
        self.layers, self.made = [], {}
        layers = [other for reference in _groups.get(layer, ()) if (other := reference()) is not None]
        layers = list(dict.fromkeys(other for other in layers if _can_join(other, layer, x)))
        if len(layers) > 1:
            results = _together(layers, ACTIVATIONS[activation](x))
            self.made = {id(other): _Made(_stamp(other), y) for other, y in zip(layers, results, strict=True)}


_pass = _Pass()


def projected(layer: Any, x: Tensor, activation: str | None) -> Tensor:
    """`layer(activation(x))`.

    Args:
        layer: a child that is an `nn.Linear` as long as nobody replaces it.
        x: (B, E), the tensor that other layers are given, too.
        activation: as of `ops.group_norm_act`.
    """
    if torch.compiler.is_compiling() or not values_kept() or not is_plain(x) or not _can_join(layer, layer, x):
        return layer(ACTIVATIONS[activation](x))
    if x.is_inference() and x.device.type != "cpu":
        return layer(ACTIVATIONS[activation](x))
    if not _pass.is_of(x, activation):
        _pass.begin(layer, x, activation)
    _pass.layers.append(weakref.ref(layer))
    made = _pass.made.pop(id(layer), None)
    return made.result if made is not None and made.stamp == _stamp(layer) else layer(ACTIVATIONS[activation](x))


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # of which PyTorch counts no writes


def _stamp(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((id(p), p._version, p.data_ptr()) for p in layer._parameters.values() if p is not None)


def _can_join(layer: Any, first: Any, x: Tensor) -> bool:
    weight = layer._parameters.get("weight") if why_called(layer, nn.Linear) is None else None
    return (
        weight is not None
        and can_be_seen(weight, layer._parameters.get("bias"))
        and weight.device == x.device
        and weight.dtype == x.dtype
        and (layer.in_features, layer.bias is None) == (first.in_features, first.bias is None)
    )


def _together(layers: list[Any], y: Tensor) -> tuple[Tensor, ...]:
    key = tuple(map(id, layers))
    before = kept(layers[0]).get("joined")
    if before is not None and before[0] != key:  # others than last time
        drop(layers[0], before[0])
    if is_packed_by_onednn(y.device):
        results = linears(layers[0], layers, y)
        if key in kept(layers[0]):
            kept(layers[0])["joined"] = (key,)
            for layer in layers:
                drop(layer, "packed")  # a copy that stands in the one for all, too
        return results
    if sum(layer._parameters["weight"].nbytes for layer in layers) > _MOST_BYTES:
        return tuple(layer(y) for layer in layers)
    found = joined(layers[0], key, layers)
    kept(layers[0])["joined"] = (key,)
    return F.linear(y, found.weight, found.bias).split([layer.out_features for layer in layers], dim=-1)
