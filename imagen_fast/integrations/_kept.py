"""What is computed once from weights and kept beside a module: how it is held, and how a change of them is seen.

Kept things are in no module's state: a module is a weak key, so that they go with it, and are neither copied, pickled
nor saved. A copy makes its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import backends

_SAMPLES = 8

_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()


def kept(module: nn.Module) -> dict[Any, Any]:
    """What is kept beside a module, by what it is; to read and to write."""
    found = _kept.get(module)
    if found is None:
        found = _kept[module] = {}
    return found


def drop(module: nn.Module, key: Any = None) -> None:
    """Forget one thing that is kept beside a module, or all."""
    if key is None:
        _kept.pop(module, None)
    elif module in _kept:
        _kept[module].pop(key, None)


class Seen:
    """A tensor as it was: whether it still is the same one, with the same numbers.

    PyTorch counts the writes to a tensor, but not those through `.data`, a numpy alias or a fused optimizer. Most of
    these change all numbers, so a few are compared too, where that costs no wait for a device. A hidden write that
    spares these few is not seen.
    """

    __slots__ = ("device", "dtype", "numbers", "pointer", "reference", "shape", "stride", "version", "where")

    def __init__(self, tensor: Tensor) -> None:
        self.reference = weakref.ref(tensor)
        self.version, self.pointer = tensor._version, tensor.data_ptr()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.shape, self.stride = tensor.shape, tensor.stride()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        sampled = tensor.device.type == "cpu" and tensor.numel() > 0
        self.where = ((min(_SAMPLES, extent),), (max(1, extent // _SAMPLES),)) if sampled else None
        self.numbers = None if self.where is None else tensor.detach().as_strided(*self.where).clone()

    def still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one that was seen, unchanged."""
        return (
            self.reference() is tensor
            and self.version == tensor._version
            and self.pointer == tensor.data_ptr()
            and self.dtype == tensor.dtype
            and self.device == tensor.device
            and self.shape == tensor.shape
            and self.stride == tensor.stride()
            and (self.where is None or torch.equal(self.numbers, tensor.as_strided(*self.where)))  # type: ignore[arg-type]
        )


def can_be_seen(*tensors: Tensor | None) -> bool:
    """Whether `Seen` sees changes: of a tensor made in inference mode no writes are counted; one on meta is empty."""
    return not any(tensor is not None and (tensor.is_inference() or tensor.is_meta) for tensor in tensors)


def all_still(seen: Sequence[Seen], tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors, of which None is skipped, are those that were seen, unchanged."""
    given = [tensor for tensor in tensors if tensor is not None]
    return len(seen) == len(given) and all(map(Seen.still, seen, given))


def look_at(tensors: Sequence[Tensor | None]) -> tuple[Seen, ...]:
    """What `all_still` compares with."""
    return tuple(Seen(tensor) for tensor in tensors if tensor is not None)


@contextmanager
def outside_inference() -> Iterator[None]:
    """For what is kept: tensors whose writes are counted, and without gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def values_kept() -> bool:
    """Whether what is kept may be used here and now: not with gradients, nor where a compiler or a mode watches."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and not _only_devices())
        or backends.forced() == "eager"
    )


def _only_devices() -> bool:
    """Whether no other function modes are active than a default device."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
