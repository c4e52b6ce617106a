"""What is computed once from weights and kept beside a module: how it is held, and how a change of them is seen.

Kept things are in no module's state: a module is a weak key, so that they go with it, and are neither copied, pickled
nor saved. A copy makes its own.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import _native, backends

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
    """Tensors as they were: whether they still are the same ones, with the same numbers. None stands for no tensor.

    PyTorch counts the writes to a tensor, but not those through `.data`, a numpy alias or a fused optimizer. Most of
    these change all numbers, so a few are compared too, where that costs no wait for a device. A hidden write that
    spares these few is not seen.
    """

    __slots__ = ("fingerprints", "references", "versions")

    def __init__(self, *tensors: Tensor | None) -> None:
        given = [tensor for tensor in tensors if tensor is not None]
        self.references = [*map(weakref.ref, given)]
        self.versions = [tensor._version for tensor in given]
        self.fingerprints = _fingerprints(given)

    def still(self, *tensors: Tensor | None) -> bool:
        """Whether these are the ones that were seen, in their order, unchanged."""
        given = [tensor for tensor in tensors if tensor is not None]
        alive = [reference() for reference in self.references]
        return len(given) == len(alive) and all(map(operator.is_, given, alive)) and self._is_of(given)

    def are_still(self) -> bool:
        """Whether all that were seen are still there, unchanged."""
        alive = [reference() for reference in self.references]
        return all(tensor is not None for tensor in alive) and self._is_of(alive)  # type: ignore[arg-type]

    def _is_of(self, tensors: list[Tensor]) -> bool:
        return self.versions == [tensor._version for tensor in tensors] and torch.equal(
            self.fingerprints, _fingerprints(tensors)
        )


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_numbers(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of the CPU are alike, bit by bit: faster than floats of 16 bits, and NaN equals itself."""
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and first.device == second.device
        and torch.equal(_bits(first), _bits(second))
    )


def _bits(x: Tensor) -> Tensor:
    return x.view(_INTEGERS[x.itemsize]) if x.is_floating_point() else x


_SAMPLES = 8  # numbers of a tensor


def _fingerprints(tensors: list[Tensor]) -> Tensor:
    """As `_native.fingerprints`, with or without the library."""
    if _native.load():
        return _native.fingerprints(tensors)
    return torch.tensor([_fingerprint(tensor) for tensor in tensors], dtype=torch.int64)


def _fingerprint(tensor: Tensor) -> list[int]:
    layout = hash((tensor.dtype, tensor.device, tensor.shape, tensor.stride()))
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    numbers: list[int] = []
    if tensor.device.type == "cpu" and tensor.numel() > 0:
        samples = tensor.detach().as_strided((min(_SAMPLES, extent),), (max(1, extent // _SAMPLES),))
        numbers = [hash(number) for number in _bits(samples.contiguous()).tolist()]
    return [tensor.data_ptr(), layout, *numbers, *[0] * (_SAMPLES - len(numbers))]


def can_be_seen(*tensors: Tensor | None) -> bool:
    """Whether `Seen` sees changes: of a tensor made in inference mode no writes are counted; one on meta is empty."""
    return not any(tensor is not None and (tensor.is_inference() or tensor.is_meta) for tensor in tensors)


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
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > _modes.recording
        or (torch._C._len_torch_function_stack() > 0 and not _only_devices())
        or backends.forced() == "eager"
    )


class _Invalidations:
    count = 0


def invalidations() -> int:
    """How often a module was declared to have changed out of sight: what is kept of the model that it may be a part of
    is of before."""
    return _Invalidations.count


def note_invalidation() -> None:
    """See `invalidations`."""
    _Invalidations.count += 1


class _Modes(threading.local):
    recording = 0  # dispatch modes of this package: they look on, and what is kept may be used


_modes = _Modes()


@contextmanager
def recording_mode() -> Iterator[None]:
    """For the time in which a dispatch mode of this package is active that changes nothing."""
    _modes.recording += 1
    try:
        yield
    finally:
        _modes.recording -= 1


def _only_devices() -> bool:
    """Whether no other function modes are active than a default device."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
