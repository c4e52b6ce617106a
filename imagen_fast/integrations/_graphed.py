"""The `forward` of a model that repeats recorded calls, on an instance that keeps its class: CUDA graphs on CUDA
devices (`_graphs`), lists of operators on the CPU (`_replays`).

They are used without gradients, where nothing watches the call (autocast, a compiler, a mode), and as long as no module
in the model has hooks, another forward, or a class of the user's. Everything that a record bakes in is looked at before
each repetition (`_watched`); after a change of any of it records are made anew.

A sampling loop of this package has the model repeat whole steps (`GraphedForward.repeat`): guidance's two halves, the
solver's step and its noise are one graph then. It holds one step, which finds its row of the solver's table by a number
on the device that it counts up itself, and is replayed for every step of the loop. So it serves any number of replays,
is recorded after the first step of the first loop, and takes the memory of one step; between replays nothing is copied
and nothing waits. Larger graphs, up to one for the whole loop (`graph_steps`), save the launches of all graphs but one,
some microseconds a step, and cost recording and holding every launch of every step: so they are for those who ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..buckets import bucket
from ._converted import ConvertedForward
from ._graphs import GraphPool
from ._kept import invalidations, values_kept
from ._recorders import recorder_here
from ._replays import ReplayPool
from ._watched import Watched

if TYPE_CHECKING:
    from ..diffusion.sampling import State, Step


class Prepared(NamedTuple):
    """A call as it is recorded, and what is made of its result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any] = lambda result: result


# Brings the arguments of a call of a model into the form in which it is recorded, padded if that is wanted; a string
# says why it cannot be.
Prepare = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], bool], "Prepared | str"]


class Limits(NamedTuple):
    """Of the graphs of one model, and of its records on the CPU.

    Attributes:
        graphs: how many it keeps, the least recently used of which go first.
        steps: how many steps of a sampling loop one graph may hold.
    """

    graphs: int = 8
    steps: int = 1


DEFAULT = Limits()
_MOST_CHANGES = 16  # in a row


class GraphedForward(ConvertedForward):
    """Graphs of a model, which may compute in another dtype, too.

    Args:
        owner, dtype, memory_format: as of `ConvertedForward`.
        prepare: of a call's arguments, see `Prepare`: a function at the top of a module, since copies keep it.
        limits: see `Limits`.
    """

    def __init__(
        self,
        owner: nn.Module,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format | None,
        prepare: Prepare,
        limits: Limits = DEFAULT,
    ) -> None:
        self.prepare, self.limits = prepare, limits
        recorder = recorder_here()
        name = type(owner).__name__
        self.pool = None if recorder is None else GraphPool(name, recorder, limits.graphs)
        self.replays = ReplayPool(name, limits.graphs)
        super().__init__(owner, dtype, memory_format)

    def forget(self) -> None:
        super().forget()
        self._watched: Watched | None = None
        self._changes = 0  # since a record was used
        self._recorded_at = invalidations()
        self.replays.clear()
        if self.pool is not None:
            self.pool.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "prepare": self.prepare, "limits": self.limits}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        if not values_kept():
            return super().__call__(*args, **kwargs)
        if self.pool is not None and self.pool.serves(args, kwargs):
            return self._run(self.pool, *args, **kwargs)
        if self.replays.serves(args, kwargs):
            return self._run(self.replays, *args, **kwargs)
        return self._plain(*args, **kwargs)

    def _run(self, pool: GraphPool | ReplayPool, *args: Any, **kwargs: Any) -> Any:
        reason = self._obstacle(pool)
        if reason is None:
            prepared = self.prepare(self.owner, args, kwargs, pool.pads)
            if isinstance(prepared, Prepared):
                result = pool.run(self._plain, prepared.args, prepared.kwargs, self._with_weights)
                return prepared.finish(result)
            reason = prepared
        pool.note(reason)
        return self._plain(*args, **kwargs)

    @property
    def repeats(self) -> bool:
        """Whether `repeat` may serve the model where it is."""
        weight = next(self.owner.parameters(), None)
        return self.pool is not None and weight is not None and weight.device.type == self.pool.recorder.device_type

    def repeat(
        self, step: Step, state: State, inputs: dict[str, Any], times: int, after: Callable[[], object] | None
    ) -> State | None:
        """See `diffusion.sampling.Repeat`. Somebody who is called after every step may do anything to the model, so it
        is looked at after each; without, it is looked at before the first alone."""
        pool = self.pool
        if torch.compiler.is_compiling() or pool is None or not pool.serves(state, {}) or not values_kept():
            return None
        reason = self._obstacle(pool)
        if reason is None and (self.owner._forward_hooks or self.owner._forward_pre_hooks):
            reason = "steps of a loop are not recorded whole, as it has hooks"
        if reason is not None:
            pool.note(reason)
            return None
        together = 1 if after is not None else _divisor(times, self.limits.steps)
        go_on = None if after is None else partial(self._goes_on, after)
        done = 0
        while done < times:
            if self._obstacle(pool) is not None:  # since the last step
                state, more = step(state, inputs), 1
                if after is not None:
                    after()
            else:
                state, more = pool.repeat(
                    step,
                    step.kind,
                    state,
                    inputs,
                    times - done,
                    together=together,
                    around=self._with_weights,
                    after=go_on,
                )
            done += more
        return state

    def _goes_on(self, after: Callable[[], object]) -> bool:
        """Whether the model is as it was, after the one who watches has been called."""
        after()
        with self._lock:
            watched = self._watched
            return watched is not None and not watched.has_changed()

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.dtype is None and self.memory_format is None:
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _obstacle(self, pool: GraphPool | ReplayPool) -> str | None:
        """Why the model as it is cannot be recorded; drops the graphs of what it was."""
        with pool.lock, self._lock:  # while another thread's call has the converted weights in place
            if self._changes > _MOST_CHANGES:
                return "what it computes with changes from call to call"
            watched = self._watched  # a call with gradients, in another thread, may forget it
            if watched is None or watched.has_changed() or self._recorded_at != invalidations():
                self._clear(pool)
                self._recorded_at = invalidations()
                self._watched = watched = Watched(self.owner)
                self._changes += 1
            elif len(pool):
                self._changes = 0
            return watched.obstacle

    def _clear(self, pool: GraphPool | ReplayPool) -> None:
        """Drop the records of this pool and, unless a thread is at it, of the one for the other kind of device."""
        pool.clear()
        for other in (self.pool, self.replays):
            if other is not None and other is not pool and other.lock.acquire(blocking=False):
                other.clear()
                other.lock.release()

    @contextmanager
    def _with_weights(self) -> Iterator[None]:
        with self._lock, self._converted():
            yield


def _divisor(times: int, most: int) -> int:
    """The largest divisor of a number of steps that is not above `most`."""
    return next(count for count in range(min(times, most), 0, -1) if times % count == 0)


# ---- Putting it there


def graphed(part: nn.Module, prepare: Prepare | None, limits: Limits) -> Callable[..., GraphedForward] | None:
    """What makes the `GraphedForward` of a part; None where no calls of it are recorded."""
    if prepare is None:
        return None
    return partial(GraphedForward, prepare=prepare, limits=limits)


def reasons_of(part: nn.Module) -> list[str]:
    """Why calls of a part ran without a graph so far, or cannot have one."""
    forward = next((value for value in vars(part).values() if isinstance(value, GraphedForward)), None)
    pools = [] if forward is None else [pool for pool in (forward.pool, forward.replays) if pool is not None]
    reasons = [reason for pool in pools for reason in pool.reasons]
    obstacle = Watched(part).obstacle
    return list(dict.fromkeys([*reasons, *([] if obstacle is None else [obstacle])]))


def summary(asked: str, inference: bool, limits: Limits, reasons: dict[str, list[str]]) -> str:
    """For the report.

    Args:
        asked: "auto" or "off".
        inference: whether graphs are allowed.
        limits: of each part.
        reasons: of every part that gets graphs, by name, why it ran without one so far.
    """
    if asked == "off":
        return "off"
    if not inference:
        return "none; they are for inference"
    if not reasons:
        return "none; they are of U-Nets and text encoders"
    facts = [f"of {name or 'the model'}" + (f" ({'; '.join(why)})" if why else "") for name, why in reasons.items()]
    kinds = f"each kind recorded at its second call, {limits.graphs} at most"
    return f"{', '.join(facts)}: {kinds}; a CUDA graph on a CUDA device, a list of operators on the CPU"


# ---- Arguments


def prepared_step(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pads: bool = True) -> Prepared | str:
    """A call of a U-Net: its time step, the second argument, goes to the device as a tensor, of which a graph is not
    the graph of one number alone."""
    sample = args[0] if args else kwargs.get("sample", kwargs.get("x"))
    if not isinstance(sample, Tensor):
        return "its first argument is no tensor"
    if len(args) > 1:
        return Prepared((sample, _on_device(args[1], sample.device), *args[2:]), kwargs)
    return Prepared(args, {k: _on_device(v, sample.device) if k == "timestep" else v for k, v in kwargs.items()})


def _on_device(timestep: Any, device: torch.device) -> Any:
    """Without waiting for the device, as a copy of a number to it would."""
    if isinstance(timestep, Tensor):
        on_cpu = timestep.dim() == 0 and timestep.device.type == "cpu" != device.type
        return torch.full((), timestep.item(), dtype=timestep.dtype, device=device) if on_cpu else timestep
    if isinstance(timestep, int | float) and not isinstance(timestep, bool):
        dtype = torch.int64 if isinstance(timestep, int) else torch.float64  # what U-Nets make of numbers themselves
        return torch.full((), timestep, dtype=dtype, device=device)
    return timestep


LONGEST = 512  # tokens; texts beyond it are encoded as they are
_EMPTY = "a text has no token to attend to"


def prepared_text(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pads: bool = True) -> Prepared | str:
    """A call of a text encoder with tokens and their mask: both are padded to the next bucket, so that one graph serves
    all texts of about a length, and the result is cut. Padding is masked, so it changes nothing but rounding."""
    given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
    if not pads:
        mask = given.get("attention_mask")
        empty = isinstance(mask, Tensor) and not bool(mask.bool().any(-1).all())
        return _EMPTY if empty else Prepared(args, kwargs)  # see `_padding`
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if len(args) > 2 or not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        return "it is not called with tokens and their mask alone"
    if any(value not in (None, False) for key, value in given.items() if key != "return_dict"):
        return f"it is called with {', '.join(given)} too"
    config: Any = owner.config
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return "it gives more than its last states"
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return "its mask is not of its tokens' shape"
    length = ids.shape[1]
    if length > LONGEST:
        return f"a text is longer than {LONGEST} tokens"
    padding = bucket(length) - length
    if padding and mask is not None and not bool(mask.bool().any(1).all()):
        return _EMPTY  # it attends to all of them, so the number of tokens counts
    mask = ids.new_ones(ids.shape) if mask is None else mask
    if padding:
        ids, mask = (nn.functional.pad(tensor, (0, padding)) for tensor in (ids, mask))

    def cut(value: Any) -> Any:
        return value[:, :length] if isinstance(value, Tensor) and padding else value

    return Prepared((), {"input_ids": ids, "attention_mask": mask, **given}, lambda result: tree_map(cut, result))
