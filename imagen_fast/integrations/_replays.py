"""On the CPU, what graphs are on devices: calls of a function of tensors that are repeated without its Python.

A kind of call (see `_calls`) is recorded when it is met for the second time, as a list of operators
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

from ._calls import PLAIN, Around, Call, NotRecorded, Pool, settings
from ._kept import outside_inference, same_numbers
from ._once import Once, active, once_of_graph
from ._operators import Program, Record, recording


class _Replay:
    """What repeats a kind of call.

    Attributes:
        lock: held while it runs.
        is_checked: whether it has been compared with the call.
        is_random: whether it draws random numbers.
    """

    def __init__(self, inputs: list[Tensor], once: Once, program: Program) -> None:
        self._once, self._program = once, program
        # The inputs that something was made of keep the values that it was made of.
        self._roots = {number: inputs[number] for number in once.roots}
        self._is_stale = False  # what was made of inputs is of others than those
        self.lock = threading.Lock()
        self.is_checked = False
        self.is_random = program.is_random

    def run(self, call: Call, around: Around) -> Any:
        """The result of a call, in tensors of its own."""
        with outside_inference():
            given = [*map(_dense, call.tensors)]
            for number, mine in self._roots.items():
                if not same_numbers(mine, given[number]):
                    self._is_stale = True  # until all is made anew, whatever interrupts it
                    mine.copy_(given[number])
                given[number] = mine
            if self._is_stale:
                with around(), active(self._once):
                    self._once.renew()
                self._is_stale = False
        with torch.inference_mode():  # operators cost less
            result = self._program(given)
        return _copied(result)


class ReplayPool(Pool[_Replay]):
    """The records of one function on the CPU.

    Nothing is padded: a record is made soon, and padding would have to be computed.
    """

    record_name = "a record of its operators"
    pads = False

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
        call = self._taken_apart(args, kwargs)
        if call is None:
            return function(*args, **kwargs)
        kind = (call.kind, settings())
        with self.lock:
            replay, replays = self._found(kind), self._records
            is_due = replay is None and self._is_due(kind)
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

    def _record(
        self, kind: Hashable, function: Callable[..., Any], call: Call, replays: OrderedDict[Hashable, _Replay]
    ) -> Any:
        """The result of the call, which is recorded if it can be."""
        random = torch.get_rng_state()
        with outside_inference():
            inputs = [_dense(tensor).clone() for tensor in call.tensors]
        record = Record(inputs, once := Once(dict(enumerate(inputs))))
        try:
            result, replay = self._recorded(function, call, record, inputs, once)
        except Exception as error:  # whatever it is, the call itself may work, or raises it again
            if record.is_random:  # else the numbers that others have drawn meanwhile are theirs
                torch.set_rng_state(random)
            self._note_failure(error)
            return function(*call.args, **call.kwargs)
        with self.lock:
            self._make_room()
            self._keep(kind, replay, replays)
        return _copied(result)

    def _recorded(
        self, function: Callable[..., Any], call: Call, record: Record, inputs: list[Tensor], once: Once
    ) -> tuple[Any, _Replay]:
        args, kwargs = call.on(inputs)
        with active(once), recording(record):
            result = function(*args, **kwargs)
        if not once.can_be_renewed():
            raise NotRecorded("what is made of its text is made with settings of this call alone")
        for leaf in tree_leaves(result):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise NotRecorded(f"its result holds a {type(leaf).__name__}")
        return result, _Replay(inputs, once, record.program(result))

    def _check(self, kind: Hashable, replay: _Replay, function: Callable[..., Any], call: Call, around: Around) -> Any:
        random = torch.get_rng_state() if replay.is_random else None
        result = function(*call.args, **call.kwargs)
        after = None
        if random is not None:
            after = torch.get_rng_state()
            torch.set_rng_state(random)
        try:
            found = replay.run(call, around)
            drawn = after is None or torch.equal(torch.get_rng_state(), after)
            replay.is_checked = _is_same(found, result) and drawn
        except Exception as error:
            self._note_failure(error)
        else:
            if not replay.is_checked:
                self.note("when repeated, its operators gave other numbers than the call", logging.WARNING)
        finally:
            if after is not None:
                torch.set_rng_state(after)
        if not replay.is_checked:
            with self.lock:
                self._records.pop(kind, None)
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
