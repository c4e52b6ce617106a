"""On the CPU, what graphs are on devices: calls of a function of tensors that are repeated without its Python.

A kind of call (see `_graphs.Call`) is recorded when it is met for the second time, as a list of operators
(`_operators`). At the third time it is called and repeated, and from then on repeated if both gave the same numbers.
So a function that looks at numbers where no operator tells is found out, as long as these numbers matter. Random
numbers are drawn anew by every repetition, as by the call.

What the function reads besides its inputs is the caller's to watch: see `_watched`.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ._graphs import PLAIN, Around, Call, settings
from ._kept import outside_inference, same_numbers
from ._once import Once, active, once_of_graph
from ._operators import NotRecorded, Program, recording

logger = logging.getLogger("imagen_fast")

_KINDS = 64  # of calls that are remembered without a record


class _Replay:
    """What repeats a kind of call.

    Attributes:
        lock: held while it runs.
        is_checked: whether it has been compared with the call.
    """

    def __init__(self, inputs: list[Tensor], once: Once, program: Program) -> None:
        self._once, self._program = once, program
        # The inputs that something was made of keep the values that it was made of.
        self._roots = {number: inputs[number] for number in once.roots}
        self.lock = threading.Lock()
        self.is_checked = False

    def run(self, call: Call, around: Around) -> Any:
        """The result of a call, in tensors of its own."""
        with outside_inference():
            given = [*map(_dense, call.tensors)]
            changed = False
            for number, mine in self._roots.items():
                if not same_numbers(mine, given[number]):
                    mine.copy_(given[number])
                    changed = True
                given[number] = mine
            if changed:
                with around(), active(self._once):
                    self._once.renew()
        with torch.inference_mode():  # operators cost less
            result = self._program(given)
        return _copied(result)


class ReplayPool:
    """The records of one function, the least recently used of which go first.

    Args:
        name: what the function is, for messages.
        limit: the most records.

    Attributes:
        pads: as of `GraphPool`; a record is made soon, and padding would have to be computed.
        lock: held while records are looked up or replaced.
        reasons: why calls ran as they are.
        recorded, replayed: how often that was done.
    """

    pads = False

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.reasons: list[str] = []
        self.recorded = self.replayed = 0
        self._unused = 0  # recorded since one has been used again
        self.lock = threading.RLock()
        self.clear()

    def __len__(self) -> int:
        return len(self._replays)

    def clear(self) -> None:
        """Drop all records, and what is known of kinds of calls."""
        with self.lock:
            self._replays: OrderedDict[Hashable, _Replay] = OrderedDict()
            self._met: OrderedDict[Hashable, bool] = OrderedDict()  # whether a record may be made at the next call

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all tensors among the arguments are on the CPU, and the call is no part of one that is recorded."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return bool(tensors) and once_of_graph() is None and all(t.device.type == "cpu" for t in tensors)

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
            around: entered where a part of the function is computed again beside its record, see `Once`.
        """
        try:
            call = Call(args, kwargs)
            call.device()
        except NotRecorded as reason:
            self.note(str(reason))
            return function(*args, **kwargs)
        kind = (call.kind, settings())
        with self.lock:
            replay = self._replays.get(kind)
            if replay is not None:
                self._replays.move_to_end(kind)
            is_due = replay is None and self._is_due(kind)
            replays = self._replays
        if is_due:
            return self._record(kind, function, call, replays)
        if replay is None or not replay.lock.acquire(blocking=False):  # another thread is using it
            return function(*args, **kwargs)
        try:
            if not replay.is_checked:
                return self._check(kind, replay, function, call, around)
            self.replayed += 1
            self._unused = 0
            return replay.run(call, around)
        finally:
            replay.lock.release()

    def note(self, reason: str, level: int = logging.INFO) -> None:
        """Log once that a call ran as it is, and keep the reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.log(level, "%s runs without a record of its operators: %s", self.name, reason)

    def _is_due(self, kind: Hashable) -> bool:
        due = self._met.get(kind)
        if due is None:
            self._met[kind] = True
            if len(self._met) > _KINDS:
                self._met.popitem(last=False)
        elif due:
            self._met[kind] = False  # not by another thread as well
        return due is True and self._unused < 2 * self.limit

    def _record(
        self, kind: Hashable, function: Callable[..., Any], call: Call, replays: OrderedDict[Hashable, _Replay]
    ) -> Any:
        """The result of the call, which is recorded if it can be."""
        random = torch.get_rng_state()
        try:
            result, replay = self._recorded(function, call)
        except Exception as error:  # whatever it is, the call itself may work, or raises it again
            torch.set_rng_state(random)
            reason = str(error) if isinstance(error, NotRecorded) else f"{type(error).__name__}: {error}"
            self.note(reason, logging.INFO if isinstance(error, NotRecorded) else logging.WARNING)
            return function(*call.args, **call.kwargs)
        with self.lock:
            replays[kind] = replay  # nobody's any more, if they have been cleared meanwhile
            if len(replays) > self.limit:
                replays.popitem(last=False)
            self._met[kind] = True  # if it has to go
        self.recorded += 1
        self._unused += 1
        if self._unused == 2 * self.limit:
            self.note(f"{self._unused} calls were recorded, and none was repeated", logging.WARNING)
        return _copied(result)

    def _recorded(self, function: Callable[..., Any], call: Call) -> tuple[Any, _Replay]:
        with outside_inference():
            inputs = [_dense(tensor).clone() for tensor in call.tensors]
        args, kwargs = call.on(inputs)
        once = Once(dict(enumerate(inputs)))
        with active(once), recording(inputs, once) as record:
            result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise NotRecorded(f"its result holds a {type(leaf).__name__}")
        return result, _Replay(inputs, once, record.program(result))

    def _check(self, kind: Hashable, replay: _Replay, function: Callable[..., Any], call: Call, around: Around) -> Any:
        random = torch.get_rng_state()
        result = function(*call.args, **call.kwargs)
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        try:
            found = replay.run(call, around)
            replay.is_checked = _is_same(found, result) and torch.equal(torch.get_rng_state(), after)
        except Exception as error:
            self.note(f"{type(error).__name__}: {error}", logging.WARNING)
        else:
            if not replay.is_checked:
                self.note("when repeated, its operators gave other numbers than the call", logging.WARNING)
        finally:
            torch.set_rng_state(after)
        if not replay.is_checked:
            with self.lock:
                self._replays.pop(kind, None)
                self._met[kind] = False
        return result


def _copied(result: Any) -> Any:
    """With tensors that nobody else has, made in the mode of the caller."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, result)


def _dense(tensor: Tensor) -> Tensor:
    """A tensor, or a copy of one that is expanded or has gaps, which could not be told from the strides of its copy."""
    return tensor if torch.empty_like(tensor).stride() == tensor.stride() else tensor.contiguous()


def _is_same(first: Any, second: Any) -> bool:
    """Whether two results have the same structure and numbers."""
    (leaves, spec), (others, other_spec) = tree_flatten(first), tree_flatten(second)
    return spec == other_spec and all(
        same_numbers(one, other) and one.stride() == other.stride() if isinstance(one, Tensor) else one == other
        for one, other in zip(leaves, others, strict=True)
    )
