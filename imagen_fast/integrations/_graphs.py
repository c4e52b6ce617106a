"""CUDA graphs of a function of tensors: one for each kind of call, recorded once and replayed on new values.

A graph repeats the launches of one call, with the addresses that they had. So inputs are copied into tensors of its
own, and results are copied out; a kind of call is told by everything else that the launches depend on: shapes,
strides, dtypes, devices, arguments that are no tensors, and the settings of PyTorch and of this package. What the
function reads besides its inputs (weights, attributes of modules) is the caller's to watch: see `_watched`.

A kind is recorded when it is met for the second time, so that what is called once never pays for a graph. What cannot
be recorded runs as it is, for a reason that is logged once and kept for the report.

What records is given (`_recorders`), so nothing here needs a device.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .. import backends
from ._kept import Seen, can_be_seen, outside_inference
from ._recorders import Recorder, Recording

logger = logging.getLogger("imagen_fast")

GRAPHS = 8  # the most of one pool
_KINDS = 64  # of calls that are remembered without a graph
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


class NotRecorded(Exception):
    """Why a call runs without a graph."""


# ---- What is computed beside a graph


class Once:
    """What a graph reads that depends on some inputs alone: it is computed when these change, not at every replay.

    Args:
        inputs: the graph's own inputs of which a change can be seen, by number.
    """

    def __init__(self, inputs: dict[int, Tensor]) -> None:
        self.roots: set[int] = set()  # the inputs that something has been made of
        self._numbers = {id(tensor): number for number, tensor in inputs.items()}
        self._known = {id(tensor): tensor for tensor in inputs.values()}
        self._made: dict[Hashable, tuple[Callable[[], Any], Any]] = {}
        self._held: list[Any] = []

    def hold(self, kept: Any) -> None:
        """Have tensors live as long as the graph, which reads them where they are, and which others may drop."""
        self._held.append(kept)

    def of(self, key: Hashable, given: Tensor, make: Callable[[], Any]) -> Any:
        """`make()`, computed in the graph unless `given` is one of the inputs, or was itself made of one."""
        if id(given) not in self._known:
            return make()
        key = (key, id(given))
        if key not in self._made:
            if id(given) in self._numbers:
                self.roots.add(self._numbers[id(given)])
            result = make()
            self._made[key] = make, result
            self._known.update((id(leaf), leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return self._made[key][1]

    def renew(self) -> None:
        """Make everything anew, where it is."""
        for make, result in list(self._made.values()):
            for kept, new in zip(tree_leaves(result), tree_leaves(make()), strict=True):
                if isinstance(kept, Tensor) and kept is not new:
                    kept.copy_(new)


class _State(threading.local):
    once: Once | None = None


_state = _State()


def once_of_graph() -> Once | None:
    """That of the graph which this thread is about to record, or makes anew; None elsewhere."""
    return _state.once


@contextmanager
def _active(once: Once) -> Iterator[None]:
    before, _state.once = _state.once, once
    try:
        with outside_inference():
            yield
    finally:
        _state.once = before


# ---- Calls


@dataclass
class _Call:
    """Arguments, taken apart: what tells a kind of call, and the tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)
    kind: Hashable = None

    def __post_init__(self) -> None:
        self.kind = self._kind((self.args, self.kwargs))

    def _kind(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout != torch.strided:
                raise NotRecorded(f"an argument is a {type(value).__name__}, not a plain tensor")
            self.tensors.append(value)
            return value.shape, value.stride(), value.dtype, value.device, can_be_seen(value)
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return "dict", *((key, self._kind(item)) for key, item in value.items())
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value), *map(self._kind, value)
        raise NotRecorded(f"an argument is a {type(value).__name__}")

    def device(self) -> torch.device:
        """Where all of its tensors are."""
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) != 1:
            raise NotRecorded("its arguments are on several devices" if devices else "it has no tensors as arguments")
        return devices.pop()

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


def _settings() -> Hashable:
    """Of PyTorch and this package: what the choice of kernels depends on besides the call."""
    return (
        backends.forced(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@dataclass
class _Graph:
    inputs: list[Tensor]
    once: Once
    recording: Recording
    seen: dict[int, Seen] = field(default_factory=dict)  # of the inputs that `once` has made something of


# ---- The pool


class GraphPool:
    """The graphs of one function, the least recently used of which go first.

    Calls from several threads and streams take turns: graphs share their memory.

    Args:
        name: what the function is, for messages.
        recorder: what records.
        limit: the most graphs.
    """

    def __init__(self, name: str, recorder: Recorder, limit: int = GRAPHS) -> None:
        self.name, self.recorder, self.limit = name, recorder, limit
        self.reasons: list[str] = []
        self.recorded = self.replayed = 0
        self._unused = 0  # graphs recorded since one has been used again
        self._lock = threading.RLock()
        self.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs, and what is known of kinds of calls."""
        with self._lock:
            self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
            self._met: OrderedDict[Hashable, bool] = OrderedDict()  # whether a graph may be made at the next call

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a tensor among the arguments is on a device that the recorder is for."""
        if _state.once is not None or self.recorder.is_busy():
            return False
        return any(
            isinstance(value, Tensor) and value.device.type == self.recorder.device_type
            for value in (*args, *kwargs.values())
        )

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Any:
        """`function(*args, **kwargs)`, without gradients.

        Args:
            function, args, kwargs: the call.
            around: entered where a part of the function is computed again beside its graph, see `Once`.
        """
        try:
            call = _Call(args, kwargs)
            device = call.device()
        except NotRecorded as reason:
            self.note(str(reason))
            return function(*args, **kwargs)
        kind = (call.kind, _settings())
        with self._lock:
            graph = self._graphs.get(kind)
            if graph is not None:
                self._unused = 0
                self._graphs.move_to_end(kind)
            elif self._is_due(kind):
                graph = self._new(kind, function, call, device)
            if graph is not None:
                return self._replay(graph, call, device, around)
        return function(*args, **kwargs)

    def note(self, reason: str, level: int = logging.INFO) -> None:
        """Log once that a call ran without a graph, and keep the reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.log(level, "%s runs without a CUDA graph: %s", self.name, reason)

    def _is_due(self, kind: Hashable) -> bool:
        due = self._met.get(kind)
        if due is None:
            self._met[kind] = True
            if len(self._met) > _KINDS:
                self._met.popitem(last=False)
        return due is True and self._unused < 2 * self.limit

    def _new(self, kind: Hashable, function: Callable[..., Any], call: _Call, device: torch.device) -> _Graph | None:
        while len(self._graphs) >= self.limit:
            self._graphs.popitem(last=False)
        try:
            with self.recorder.in_order(device):
                graph = self._record(function, call, device)
        except Exception as error:  # whatever it is, the call itself may work, or raises it again
            self._met[kind] = False
            reason = str(error) if isinstance(error, NotRecorded) else f"{type(error).__name__}: {error}"
            self.note(reason, logging.INFO if isinstance(error, NotRecorded) else logging.WARNING)
            return None
        self._graphs[kind] = graph
        self.recorded += 1
        self._unused += 1
        if self._unused == 2 * self.limit:
            self.note(f"{self._unused} graphs were recorded, and none was used again", logging.WARNING)
        return graph

    def _record(self, function: Callable[..., Any], call: _Call, device: torch.device) -> _Graph:
        with outside_inference():
            inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in call.tensors]
        args, kwargs = call.on(inputs)
        visible = {
            i: mine for i, (mine, given) in enumerate(zip(inputs, call.tensors, strict=True)) if can_be_seen(given)
        }
        once = Once(visible)

        def run() -> Any:
            return function(*args, **kwargs)

        versions = [tensor._version for tensor in inputs]
        random = self.recorder.random_state(device)
        with _active(once):
            result = self.recorder.warm_up(run, device)
            if not torch.equal(self.recorder.random_state(device), random):
                self.recorder.set_random_state(random, device)
                raise NotRecorded("it draws random numbers")
            if [tensor._version for tensor in inputs] != versions:
                raise NotRecorded("it writes to its arguments")
            for leaf in tree_leaves(result):
                if not isinstance(leaf, (Tensor, *_PLAIN)):
                    raise NotRecorded(f"its result holds a {type(leaf).__name__}")
            del result
            beside = next((g.recording for g in self._graphs.values() if g.inputs[0].device == device), None)
            recording = self.recorder.record(run, device, beside)
        seen = {number: Seen(call.tensors[number]) for number in once.roots}
        return _Graph(inputs, once, recording, seen)

    def _replay(
        self, graph: _Graph, call: _Call, device: torch.device, around: Callable[[], AbstractContextManager[Any]]
    ) -> Any:
        with self.recorder.in_order(device):
            changed = {}
            with outside_inference():
                for number, (mine, given) in enumerate(zip(graph.inputs, call.tensors, strict=True)):
                    seen = graph.seen.get(number)
                    if seen is None or not seen.still(given):
                        mine.copy_(given)
                        if seen is not None:
                            changed[number] = Seen(given)
            if changed:
                with around(), _active(graph.once):
                    graph.once.renew()
                graph.seen.update(changed)
            graph.recording.replay()
            self.replayed += 1
            return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, graph.recording.result)
