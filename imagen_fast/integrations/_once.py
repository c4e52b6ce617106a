"""What is computed beside a graph, and read by it: it depends on some inputs alone, and is computed when these change,
not at every replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ._kept import outside_inference


class Once:
    """What a graph reads that depends on some inputs alone.

    Args:
        inputs: the graph's own inputs of which a change can be seen, by number.
    """

    def __init__(self, inputs: dict[int, Tensor]) -> None:
        self.roots: set[int] = set()  # the inputs that something has been made of
        self._numbers = {id(tensor): number for number, tensor in inputs.items()}
        self._known = {id(tensor): tensor for tensor in inputs.values()}
        self._made: dict[Hashable, tuple[Callable[[], Any], Any]] = {}
        self._still: list[Callable[[], bool]] = []
        self._held: list[Any] = []

    def hold(self, kept: Any) -> None:
        """Have tensors live as long as the graph, which reads them where they are, and which others may drop."""
        self._held.append(kept)

    def of(
        self, key: Hashable, given: Sequence[Tensor], make: Callable[[], Any], still: Callable[[], bool] | None = None
    ) -> Any:
        """`make()`, computed in the graph unless all that is given are inputs, or were themselves made of some.

        `still` tells whether what else the result depends on is as it is now.
        """
        if not all(map(self.knows, given)):
            return make()
        key = (key, *map(id, given))
        if key not in self._made:
            self.roots.update(self._numbers[id(tensor)] for tensor in given if id(tensor) in self._numbers)
            with _disable_current_modes():  # what records the call sees nothing of it
                result = make()
            self._made[key] = make, result
            if still is not None:
                self._still.append(still)
            self._known.update((id(leaf), leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return self._made[key][1]

    def knows(self, tensor: Tensor) -> bool:
        """Whether this is one of the inputs, or was made of one."""
        return id(tensor) in self._known

    def can_be_renewed(self) -> bool:
        """Outside of the call: whether everything would be made as within it, where a model may set what it computes
        with for the call's duration (the scale of adapters)."""
        return all(still() for still in self._still)

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
def active(once: Once) -> Iterator[None]:
    before, _state.once = _state.once, once
    try:
        with outside_inference():
            yield
    finally:
        _state.once = before
