"""CUDA graphs of a function of tensors: one for each kind of call, recorded once and replayed on new values.

A graph repeats the launches of one call, with the addresses that they had. So inputs are copied into tensors of its
own, and results are copied out; everything else that the launches depend on tells the kind of a call (`_calls`). What
the function reads besides its inputs (weights, attributes of modules) is the caller's to watch: see `_watched`.

A function whose results are its own next arguments can be repeated (`GraphPool.repeat`): the graph then ends with
writing its results where it reads its arguments, so that it is replayed again and again with nothing in between.

What records is given (`_recorders`), so nothing here needs a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ._calls import PLAIN, Around, Call, NotRecorded, Pool, settings
from ._kept import Seen, can_be_seen, outside_inference
from ._once import Once, active, once_of_graph
from ._recorders import Recorder, Recording


@dataclass
class _Graph:
    inputs: list[Tensor]
    once: Once
    recording: Recording
    seen: dict[int, Seen] = field(default_factory=dict)  # of the inputs that `once` has made something of
    running: bool = False  # what it was replayed on is still needed, though the caller's code may run


# ---- The pool


class _Apart(threading.local):
    """Of this thread: whether calls inside of what is recorded next are to have no graphs of their own."""

    calls = False

    @contextmanager
    def during(self, coming: bool) -> Iterator[None]:
        before, self.calls = self.calls, self.calls or coming
        try:
            yield
        finally:
            self.calls = before


class GraphPool(Pool[_Graph]):
    """The graphs of one function, the least recently used of which go first.

    Calls from several threads and streams take turns: graphs share their memory.

    Args:
        name: what the function is, for messages.
        recorder: what records.
        limit: the most graphs.

    The lock is held while a graph is recorded, filled, replayed and read.
    """

    record_name = "a CUDA graph"
    pads = True

    def __init__(self, name: str, recorder: Recorder, limit: int) -> None:
        super().__init__(name, limit)
        self.recorder = recorder
        self._apart = _Apart()

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a tensor among the arguments is on a device that the recorder is for."""
        if once_of_graph() is not None or self._apart.calls or self.recorder.is_busy():
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
        around: Around = nullcontext,
    ) -> Any:
        """`function(*args, **kwargs)`, without gradients.

        Args:
            function, args, kwargs: the call.
            around: entered where a part of the function is computed again beside its graph, see `Once`.
        """
        call = self._taken_apart(args, kwargs)
        if call is None:
            return function(*args, **kwargs)
        device, kind = call.device, (call.kind, settings())
        with self.lock:
            graph = self._graph(kind, partial(self._record, function, call, device), device)
            if graph is not None:
                return self._replay(graph, call, device, around)
        return function(*args, **kwargs)

    def repeat(
        self,
        function: Callable[[Any, Any], Any],
        kind: Hashable,
        state: Any,
        inputs: dict[str, Any],
        times: int,
        *,
        together: int = 1,
        around: Around = nullcontext,
        after: Callable[[], bool] | None = None,
    ) -> tuple[Any, int]:
        """`state = function(state, inputs)`, again and again, without gradients.

        State and inputs go into the graph once and the state comes out once, whatever the number of replays; nothing
        else runs between them but `after`. Other threads wait meanwhile.

        Args:
            function: reads nothing that may change but the state and the inputs; graphs hold it.
            kind: of the function: those of one kind compute the same.
            state: a named tuple of tensors.
            inputs: what is the same in every call.
            times: how often, a multiple of `together`.
            together: the calls that one graph holds.
            around: as of `run`.
            after: called after every graph; false ends it, for what has changed.

        Returns:
            The state, and after how many calls: fewer than `times` where `after` ended it.
        """
        done = 0
        while done < times:
            coming = False  # whether the next call of the kind is recorded
            call = self._taken_apart((tuple(state), inputs), {})
            if call is not None:
                device, key = call.device, ("repeated", kind, together, call.kind, settings())
                with self.lock:
                    record = partial(self._record_loop, function, type(state), call, device, together)
                    graph = self._graph(key, record, device)
                    if graph is not None and not graph.running:
                        left = (times - done) // together
                        results, replays = self._replay_loop(graph, call, device, around, left, after)
                        return type(state)(*results), done + replays * together
                    coming = graph is None and self._may_record(key)
            for _ in range(together):
                with self._apart.during(coming):
                    state = function(state, inputs)
                done += 1
                if after is not None and not after():
                    return state, done
        return state, done

    def _graph(self, kind: Hashable, record: Callable[[], _Graph], device: torch.device) -> _Graph | None:
        """That of a kind, recorded if it is due; None if it is not, or cannot be."""
        graph = self._found(kind)
        if graph is not None:
            self._unused = 0
            return graph
        if not self._is_due(kind):
            return None
        self._make_room()
        try:
            with self.recorder.in_order(device):
                graph = record()
        except Exception as error:  # whatever it is, the call itself may work, or raises it again
            self._note_failure(error)
            return None
        self._keep(kind, graph, self._records)
        return graph

    def _record(self, function: Callable[..., Any], call: Call, device: torch.device) -> _Graph:
        inputs = _copies(call)
        args, kwargs = call.on(inputs)

        def run() -> Any:
            return function(*args, **kwargs)

        return self._recorded(run, run, inputs, 0, call, device)

    def _record_loop(
        self, function: Callable[[Any, Any], Any], kind: type, call: Call, device: torch.device, together: int
    ) -> _Graph:
        inputs = _copies(call)
        (values, others), _ = call.on(inputs)
        state = kind(*values)

        def run() -> Any:
            return function(state, others)

        def feed_back() -> None:
            results = state
            for _ in range(together):
                results = function(results, others)
            for mine, new in zip(state, results, strict=True):
                if new is not mine:
                    mine.copy_(new)

        graph = self._recorded(run, feed_back, inputs, len(state), call, device)
        graph.once.hold(function)
        return graph

    def _recorded(
        self,
        run: Callable[[], Any],
        recorded: Callable[[], Any],
        inputs: list[Tensor],
        state: int,
        call: Call,
        device: torch.device,
    ) -> _Graph:
        """
        Args:
            run: what is called first, to see whether it can be recorded.
            recorded: what is recorded then.
            inputs: what both read.
            state: how many of them, the first, are other ones at every replay.
            call, device: what is being called.
        """
        visible = {
            i: mine
            for i, (mine, given) in enumerate(zip(inputs, call.tensors, strict=True))
            if i >= state and can_be_seen(given)
        }
        once = Once(visible)
        versions = [tensor._version for tensor in inputs]
        random = self.recorder.random_state(device)
        with active(once):
            result = self.recorder.warm_up(run, device)
        if not once.can_be_renewed():
            once = Once({})  # all is computed in the graph
            with active(once):
                result = self.recorder.warm_up(run, device)
        with active(once):
            if not torch.equal(self.recorder.random_state(device), random):
                self.recorder.set_random_state(random, device)
                raise NotRecorded("it draws random numbers")
            if [tensor._version for tensor in inputs] != versions:
                raise NotRecorded("it writes to its arguments")
            for leaf in tree_leaves(result):
                if not isinstance(leaf, (Tensor, *PLAIN)):
                    raise NotRecorded(f"its result holds a {type(leaf).__name__}")
            del result
            beside = next((g.recording for g in self._records.values() if g.inputs[0].device == device), None)
            recording = self.recorder.record(recorded, device, beside)
        seen = {number: Seen(call.tensors[number]) for number in once.roots}
        return _Graph(inputs, once, recording, seen)

    def _replay(self, graph: _Graph, call: Call, device: torch.device, around: Around) -> Any:
        with self.recorder.in_order(device):
            self._fill(graph, call, around)
            graph.recording.replay()
            self.replayed += 1
            return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, graph.recording.result)

    def _replay_loop(
        self,
        graph: _Graph,
        call: Call,
        device: torch.device,
        around: Around,
        times: int,
        after: Callable[[], bool] | None,
    ) -> tuple[list[Tensor], int]:
        """The state after up to `times` replays, and how many there were."""
        state = graph.inputs[: len(call.args[0])]
        done = 0
        graph.running = True
        try:
            with self.recorder.in_order(device):
                self._fill(graph, call, around)
                while done < times:
                    graph.recording.replay()
                    done += 1
                    self.replayed += 1
                    if after is not None and not after():
                        break
                return [tensor.clone() for tensor in state], done
        finally:
            graph.running = False
            if done > 1:
                self._unused = 0

    def _fill(self, graph: _Graph, call: Call, around: Around) -> None:
        """Give a graph the values of a call, and make anew what depends on those that have changed."""
        changed = {}
        with outside_inference():
            for number, (mine, given) in enumerate(zip(graph.inputs, call.tensors, strict=True)):
                seen = graph.seen.get(number)
                if seen is None or not seen.still(given):
                    mine.copy_(given)
                    if seen is not None:
                        changed[number] = Seen(given)
        if changed:
            with around(), active(graph.once):
                graph.once.renew()
            graph.seen.update(changed)


def _copies(call: Call) -> list[Tensor]:
    with outside_inference():
        return [torch.empty_like(tensor).copy_(tensor) for tensor in call.tensors]
