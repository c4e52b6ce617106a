"""What records of calls have in common, whatever they are: how calls are told apart, and how many are kept.

A kind of call is told by everything that a record depends on besides the numbers in its tensors: shapes, strides,
dtypes, devices, arguments that are no tensors, and the settings of PyTorch and of this package. It is recorded when it
is met for the second time, so that what is called once never pays for a record. What cannot be recorded runs as it is,
for a reason that is logged once and kept for the report.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .. import backends
from ._kept import can_be_seen

logger = logging.getLogger("imagen_fast")

_KINDS = 64  # of calls that are remembered without a record
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)

Around = Callable[[], AbstractContextManager[Any]]


class NotRecorded(Exception):
    """Why a call runs without a record."""


class Constant:
    """Base of arguments without a state, of which all of one class are alike."""


@dataclass
class Call:
    """Arguments, taken apart: what tells a kind of call, and the tensors.

    Attributes:
        device: where all tensors are.

    Raises:
        NotRecorded: a call with such arguments cannot be recorded.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)
    kind: Hashable = None

    def __post_init__(self) -> None:
        self.kind = self._kind((self.args, self.kwargs))
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) != 1:
            raise NotRecorded("its arguments are on several devices" if devices else "it has no tensors as arguments")
        self.device = devices.pop()

    def _kind(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout != torch.strided:
                raise NotRecorded(f"an argument is a {type(value).__name__}, not a plain tensor")
            self.tensors.append(value)
            return value.shape, value.stride(), value.dtype, value.device, can_be_seen(value)
        if isinstance(value, PLAIN):
            return type(value), value
        if isinstance(value, Constant):
            return type(value).__qualname__
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return "dict", *((key, self._kind(item)) for key, item in value.items())
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value), *map(self._kind, value)
        raise NotRecorded(f"an argument is a {type(value).__name__}")

    def on(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with other tensors."""
        remaining = iter(tensors)

        def rebuilt(value: Any) -> Any:
            if isinstance(value, Tensor):
                return next(remaining)
            if isinstance(value, dict):
                return {key: rebuilt(item) for key, item in value.items()}
            return type(value)(map(rebuilt, value)) if isinstance(value, list | tuple) else value

        return rebuilt(self.args), rebuilt(self.kwargs)


# What PyTorch has a precision of float32 for. Its older functions raise where one of these was set.
_PRECISIONS = (
    ("generic", "all"),
    *((backend, operator) for backend in ("cuda", "mkldnn") for operator in ("all", "matmul", "conv", "rnn")),
)


def settings() -> Hashable:
    """Of PyTorch and this package: what the choice of kernels depends on besides the call."""
    return (
        backends.forced(),
        backends.is_strict(),
        torch._C._get_mkldnn_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        *(torch._C._get_fp32_precision_getter(*where) for where in _PRECISIONS),
        torch.get_default_dtype(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


Record = TypeVar("Record")


class Pool(Generic[Record]):
    """The records of one function, the least recently used of which go first.

    Args:
        name: what the function is, for messages.
        limit: the most records.

    Attributes:
        record_name: what a record is, for messages.
        pads: whether calls should be padded, so that a record serves more of them.
        lock: held while records are looked up or replaced.
        reasons: why calls ran as they are.
        recorded, replayed: how often that was done.
    """

    record_name: ClassVar[str]
    pads: ClassVar[bool]

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.reasons: list[str] = []
        self.recorded = self.replayed = 0
        self._unused = 0  # recorded since one has been used again
        self.lock = threading.RLock()
        self.clear()

    def __len__(self) -> int:
        return len(self._records)

    def clear(self) -> None:
        """Drop all records, and what is known of kinds of calls."""
        with self.lock:
            self._records: OrderedDict[Hashable, Record] = OrderedDict()
            self._met: OrderedDict[Hashable, bool] = OrderedDict()  # whether a record may be made at the next call

    def note(self, reason: str, level: int = logging.INFO) -> None:
        """Log once that a call ran without a record, and keep the reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.log(level, "%s runs without %s: %s", self.name, self.record_name, reason)

    def _taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """A call, or None if it is none that can be recorded."""
        try:
            return Call(args, kwargs)
        except NotRecorded as reason:
            self.note(str(reason))
            return None

    def _found(self, kind: Hashable) -> Record | None:
        record = self._records.get(kind)
        if record is not None:
            self._records.move_to_end(kind)
        return record

    def _is_due(self, kind: Hashable) -> bool:
        """Whether a call of the kind is to be recorded now; then it is due to nobody else, until it is kept."""
        if kind not in self._met:
            self._met[kind] = True
            if len(self._met) > _KINDS:
                self._met.popitem(last=False)
            return False
        due = self._may_record(kind)
        if due:
            self._met[kind] = False
        return due

    def _may_record(self, kind: Hashable) -> bool:
        return self._met.get(kind, False) and self._unused < 2 * self.limit

    def _make_room(self) -> None:
        while len(self._records) >= self.limit:
            self._records.popitem(last=False)

    def _keep(self, kind: Hashable, record: Record, records: OrderedDict[Hashable, Record]) -> None:
        """Keep a record among those that were there when it was begun: they may have been dropped meanwhile."""
        records[kind] = record
        self._met[kind] = True  # if it has to go
        self.recorded += 1
        self._unused += 1
        if self._unused == 2 * self.limit:
            self.note(f"{self._unused} kinds of calls were recorded, and none was used again", logging.WARNING)

    def _note_failure(self, error: Exception) -> None:
        known = isinstance(error, NotRecorded)
        self.note(
            str(error) if known else f"{type(error).__name__}: {error}", logging.INFO if known else logging.WARNING
        )
