"""What a call does on the CPU as a list of operators, which is run again without the Python around them.

A model's Python takes milliseconds a call: as long as the arithmetic, where pictures are small. A dispatch mode sees
all operators of one call; those that depend on the call's inputs become a function of these inputs, with one line for
each operator. Whatever depends on nothing but tensors that were there before (weights, packed copies of them) keeps the
value that it had. What a list of operators cannot hold is refused: a look at numbers that depend on the inputs, and a
write to a tensor that was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ._calls import NotRecorded
from ._kept import recording_mode
from ._once import Once

_MOST_FOLDED = 2**26  # bytes of what is computed from constants, as a record holds it


@dataclass(frozen=True)
class _Value:
    """A tensor that is another one in every call, by number."""

    number: int


@dataclass
class _Call:
    """Of an operator; tensors among its arguments are the values that they had, or `_Value`s."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int | None]
    is_single: bool  # it gives a tensor, not several


class Record(TorchDispatchMode):
    """Sees the operators of a call.

    Args:
        inputs: the tensors that the call is given.
        once: what was made of them beside the call; it is read anew by every repetition.

    Attributes:
        is_random: whether the call has drawn random numbers.
    """

    def __init__(self, inputs: list[Tensor], once: Once) -> None:
        super().__init__()
        self.count = 0
        self.is_random = False
        self._folded: set[int] = set()  # where lies what is computed from constants alone
        self._numbers = WeakTensorKeyDictionary()  # nothing is kept alive for longer than the call does
        self._once = once
        self._made: dict[int, Tensor] = {}  # by `once`
        self._versions: dict[int, int] = {}  # of these and the inputs, before the call
        self._calls: list[_Call] = []
        self._inputs = inputs
        for tensor in inputs:
            self._versions[self._new_number(tensor)] = tensor._version

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        depends = self._depends((args, kwargs))
        written = _written(func, args, kwargs)
        if any(not self._depends(tensor) for tensor in written):
            raise NotRecorded(f"it writes to a tensor that was there before ({func})")
        if depends and _has_shapes_of_numbers(func, args):
            raise NotRecorded(f"shapes in it depend on numbers ({func})")
        given, named = tree_map(self._replaced, (args, kwargs))
        out = func(*args, **kwargs)
        results = [out] if isinstance(out, Tensor) else [*out] if isinstance(out, list | tuple) else []
        tensors = [result for result in results if isinstance(result, Tensor)]
        if not tensors and not written:
            if depends:
                raise NotRecorded(f"it looks at numbers ({func})")
            return out
        self.is_random = self.is_random or _is_random(func)
        if not depends and _has_tensors((args, kwargs)) and not _is_random(func):
            self._folded.update({*map(_place, tensors)}.difference(map(_place, _tensors_in((args, kwargs)))))
            return out  # it will be the same next time
        numbers = [self._number_of(result) if isinstance(result, Tensor) else None for result in results]
        self._calls.append(_Call(func, given, named, numbers, isinstance(out, Tensor)))
        return out

    def program(self, result: Any) -> Program:
        """What repeats the call that has given this result."""
        for number, tensor in (*enumerate(self._inputs), *self._made.items()):
            if tensor._version != self._versions[number]:
                raise NotRecorded("it writes to its arguments, or to what is made of them once")
        leaves, spec = tree_flatten(result)
        program = Program(len(self._inputs), self._made, self._calls, [*map(self._replaced, leaves)], spec)
        folded = {place: t for t in program.constants if (place := _place(t)) and place in self._folded}
        size = sum(tensor.untyped_storage().nbytes() for tensor in folded.values())
        if size > _MOST_FOLDED:
            raise NotRecorded(f"{size / 2**20:.0f} MiB that depend on weights alone would be kept with it")
        return program

    def _depends(self, value: Any) -> bool:
        """Whether a tensor, or any in a structure, is another one in every call."""
        if isinstance(value, Tensor):
            return value in self._numbers or self._once.knows(value)
        if isinstance(value, dict):
            return any(map(self._depends, value.values()))
        return isinstance(value, list | tuple) and any(map(self._depends, value))

    def _replaced(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        number = self._numbers.get(value)
        if number is None and self._once.knows(value):
            number = self._new_number(value)
            self._made[number], self._versions[number] = value, value._version
        return value if number is None else _Value(number)

    def _number_of(self, tensor: Tensor) -> int:
        number: int | None = self._numbers.get(tensor)
        return self._new_number(tensor) if number is None else number

    def _new_number(self, tensor: Tensor) -> int:
        self._numbers[tensor] = self.count
        self.count += 1
        return self.count - 1


class Program:
    """A call as a function of its inputs.

    Attributes:
        operators: how many it calls.
        is_random: whether any of them draws random numbers.
        constants: the tensors that it reads besides its inputs and what is made of them.
    """

    def __init__(self, inputs: int, made: dict[int, Tensor], calls: list[_Call], leaves: list[Any], spec: Any) -> None:
        calls = _without_unused(calls, leaves)
        self.operators = len(calls)
        self.is_random = any(_is_random(call.operator) for call in calls)
        self.constants = [*_tensors_in([(call.args, call.kwargs) for call in calls]), *_tensors_in(leaves)]
        self._spec = spec
        self._function = _function(inputs, made, calls, leaves)

    def __call__(self, inputs: list[Tensor]) -> Any:
        """The result that the recorded call would give for these inputs, in tensors of its own unless it is one of the
        inputs, or was there before."""
        return tree_unflatten(self._function(*inputs), self._spec)


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Inside, a record sees the operators of a call."""
    with recording_mode(), record:
        yield


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operator's arguments that it writes to."""
    if not operator._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for i, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else [value]
            written += [item for item in values if isinstance(item, Tensor)]
    return written


def _has_shapes_of_numbers(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of an operator's result depends on the numbers that it is given."""
    if operator is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in operator.tags


def _is_random(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operator.tags


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _has_tensors(value: Any) -> bool:
    return next(_tensors_in(value), None) is not None


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 of those that have none of their own to look at."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_mkldnn else 0


def _numbers_in(value: Any) -> Iterator[int]:
    if isinstance(value, _Value):
        yield value.number
    elif isinstance(value, dict):
        yield from _numbers_in([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers_in(item)


def _without_unused(calls: list[_Call], leaves: list[Any]) -> list[_Call]:
    """Without those whose results nobody reads, unless they write somewhere or move the random generator."""
    used = {*_numbers_in(leaves)}
    kept = []
    for call in reversed(calls):
        acts = call.operator._schema.is_mutable or _is_random(call.operator)
        if acts or not used.isdisjoint(call.results):
            kept.append(call)
            used.update(_numbers_in((call.args, call.kwargs)))
    return kept[::-1]


def _function(inputs: int, made: dict[int, Tensor], calls: list[_Call], leaves: list[Any]) -> Callable[..., list[Any]]:
    """Python of one line for each call. A tensor is let go after the line that reads it last, as in the model."""
    constants: dict[str, Any] = {f"v{number}": tensor for number, tensor in made.items()}

    def name_of(value: Any) -> str:
        if isinstance(value, _Value):
            return f"v{value.number}"
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def written(value: Any) -> str:  # lists of tensors are not in each other
        if isinstance(value, list | tuple) and any(isinstance(item, _Value) for item in value):
            return f"[{', '.join(map(name_of, value))}]"
        return name_of(value)

    last = {number: i for i, call in enumerate(calls) for number in _numbers_in((call.args, call.kwargs))}
    for i, call in enumerate(calls):  # results that nobody reads
        last.update((number, i) for number in call.results if number is not None and number not in last)
    held = {*_numbers_in(leaves), *made, *range(inputs)}
    lines = []
    for i, call in enumerate(calls):
        given = [*map(written, call.args), *(f"{name}={written(value)}" for name, value in call.kwargs.items())]
        names = [f"v{number}" if number is not None else "_" for number in call.results]
        left = "".join(f"{name}, " for name in names) if names and not call.is_single else "".join(names)
        lines.append(f"{f'{left}= ' if left else ''}{written(call.operator._op)}({', '.join(given)})")
        ending = {number for number in (*_numbers_in((call.args, call.kwargs)), *call.results) if number is not None}
        lines += [f"del v{number}" for number in sorted(ending - held) if last[number] == i]
    source = [
        f"def function({', '.join(f'v{number}' for number in range(inputs))}):",
        *(f"    {line}" for line in lines),
        f"    return [{', '.join(map(written, leaves))}]",
    ]
    exec(compile("\n".join(source), "<operators of a call>", "exec"), constants)
    function: Callable[..., list[Any]] = constants.pop("function")  # else it would hold itself
    return function
