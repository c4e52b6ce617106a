"""Which backend serves a call, and why.

An op has up to four backends: `eager` (plain PyTorch, always there), `cpu` (C++), `triton` and `cuda` (CUDA C++). Each
one declares as data what it needs of a call: a device, and a table of `Requirement`s, each of which says why a call
does not meet it. `auto` takes the first backend in the device's order of preference that has everything it needs.

GPU kernels can be run on tensors of the CPU, for tests: Triton's by its interpreter (`TRITON_INTERPRET=1`), CUDA's by
the host emulator of `csrc/common/simt`. That is slow, so `auto` never does it; `use_backend` does.

Nothing falls back in silence: `auto` that lands on `eager` on a device that has a kernel says so, once per op and
reason, on the logger "imagen_fast"; in strict mode it raises. A forced backend that cannot serve a call raises too.

The choice is plain Python over thread-local state, so `torch.compile` makes it while tracing, guards that state, and
traces anew when it has changed.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from . import _cuda, _native, _triton
from ._autograd import run_operator as run_operator  # what an op's module needs stands here
from ._tracing import traced_as_constant, transforms_active
from .errors import UserError

logger = logging.getLogger("imagen_fast")

NAMES = ("eager", "cpu", "triton", "cuda")

# The backends with kernels for a device, fastest first; `eager` serves what they do not, and every other device.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class BackendError(UserError, RuntimeError):
    """No such backend, or a backend that was asked for cannot serve the call; the message says why."""


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, known))}"


def _triton_unavailable() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "eager": lambda: None,
    "cpu": _native.unavailable_reason,
    "triton": _triton_unavailable,
    "cuda": _cuda.unavailable_reason,
}

# Backends whose kernels run on tensors of the CPU in this process: for tests, and never by "auto".
_EMULATED = {"triton": _triton.INTERPRETED, "cuda": _cuda.emulated()}


_reasons: dict[str, str | None] = {}


@traced_as_constant
def _unavailable(name: str) -> str | None:
    if name not in _reasons:
        _reasons[name] = _UNAVAILABLE[name]()
    return _reasons[name]


def unavailable_reason(name: str) -> str | None:
    """Why the backend `name` cannot be used on this machine at all, or None if it can (see also `explain`)."""
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; {nearest(name, NAMES)}")
    return _unavailable(name)


class _Selection(NamedTuple):
    backend: str
    strict: bool
    outer: _Selection | None


def _from_environment() -> _Selection:
    strict = os.environ.get("IMAGEN_FAST_STRICT", "").strip().lower() not in ("", "0", "false", "no", "off")
    return _Selection(os.environ.get("IMAGEN_FAST_BACKEND", "").strip() or "auto", strict, None)


_DEFAULT = _from_environment()


class _State(threading.local):
    def __init__(self) -> None:  # in each thread; Dynamo guards attributes of the instance, not of the class
        self.selection = _DEFAULT


_state = _State()


class use_backend(ContextDecorator):
    """Choose the backend of every op called in this block, by this thread; nests, and decorates functions too.

    The default comes from the environment: `IMAGEN_FAST_BACKEND`, read once (`auto` without it), and
    `IMAGEN_FAST_STRICT=1`. A backward pass runs on the backend of its forward pass.

    Args:
        name: "auto", "eager", "cpu", "triton" or "cuda". A backend that cannot serve a call makes that call raise
            `BackendError`, with the reason; "auto" takes the fastest one that can.
        strict: whether "auto" raises, instead of logging, when it would land on `eager` on a device that has a kernel.
            None leaves it as it is.

    Raises:
        BackendError: there is no backend of that name.

    Example:
        >>> with imagen_fast.use_backend("eager"):
        ...     image = model(noise)
        >>> with imagen_fast.use_backend("auto", strict=True):  # an error instead of a slow surprise
        ...     image = model(noise)
    """

    def __init__(self, name: str, *, strict: bool | None = None) -> None:
        if name != "auto" and name not in NAMES:
            raise BackendError(f"unknown backend {name!r}; {nearest(str(name), ('auto', *NAMES))}")
        self.name = name
        self.strict = strict

    def __enter__(self) -> None:
        outer = _state.selection
        _state.selection = _Selection(self.name, outer.strict if self.strict is None else self.strict, outer)

    def __exit__(self, *exception: object) -> None:
        outer = _state.selection.outer
        assert outer is not None
        _state.selection = outer


# None where the call has what is needed, else the reason for an error message. Reasons name kinds (a dtype, a layout),
# not sizes, so that a log with one line per reason stays short.
Requirement = Callable[[Any], str | None]


def forced() -> str:
    """The backend that is forced here and now, or "auto"."""
    return _state.selection.backend


def is_strict() -> bool:
    """Whether landing on eager in silence is an error here and now."""
    return _state.selection.strict


_DTYPE_NAMES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}


def dtypes(argument: str, *supported: torch.dtype) -> Requirement:
    """The tensor `argument` of the call has one of the dtypes `supported`."""
    reasons = {
        dtype: f"{argument} is {name}; it needs {' or '.join(_DTYPE_NAMES[dtype] for dtype in supported)}"
        for dtype, name in _DTYPE_NAMES.items()
        if dtype not in supported
    }
    return lambda call: reasons.get(getattr(call, argument).dtype)


def no_gradient(*arguments: str) -> Requirement:
    """No gradient is asked for: for backends without a backward pass."""

    def unmet(call: Any) -> str | None:
        if torch.is_grad_enabled():
            for argument in arguments:
                tensor = getattr(call, argument)
                if tensor is not None and tensor.requires_grad:
                    return f"{argument} requires a gradient, and this backend has no backward pass"
        return None

    return unmet


Call = TypeVar("Call", bound=tuple)


@dataclass(frozen=True)
class Backend(Generic[Call]):
    """One implementation of an op: how it runs a checked call, and what it needs of it besides its device."""

    name: str
    run: Callable[[Call], Any]
    requires: tuple[Requirement, ...] = ()


_OPS: dict[str, Op[Any]] = {}


class Op(Generic[Call]):
    """An op's backends and the choice between them. The module of each op makes one.

    Args:
        name: the name of the public function.
        check: takes the arguments of the public function, raises `TypeError` or `ValueError` for wrong ones, and
            returns the call as a named tuple. Its first field is the tensor whose device decides.
        backends: in any order; `eager` must be among them.
        notes: what `explain` should add about a call, such as a copy that it needs.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., Call],
        backends: Sequence[Backend[Call]],
        notes: Callable[[Call], Sequence[str]] = lambda call: (),
    ) -> None:
        self.name = name
        self.check = check
        self.backends = {backend.name: backend for backend in backends}
        self.notes = notes
        self._faster_than_eager = {
            device: tuple(self.backends[name] for name in order if name in self.backends)
            for device, order in PREFERENCE.items()
        }
        _OPS[name] = self

    def run(self, call: Call) -> Any:
        """Run a checked call on the backend that is selected for it."""
        return self.choose(call).run(call)

    def choose(self, call: Call) -> Backend[Call]:
        """The backend for a checked call; raises `BackendError` where a forced one, or strict mode, says no."""
        backend, reason = self._decide(call)
        if backend is None:
            _refuse(reason)
        elif reason:
            _log_once(f"{self.name} falls back to eager PyTorch ({reason})")
        return backend  # type: ignore[return-value]

    def _decide(self, call: Call) -> tuple[Backend[Call] | None, str]:
        """The backend and, if that is a fallback, why; or None and the error."""
        name, strict, _ = _state.selection
        if name != "auto":
            reason = self.unmet(name, call)
            if reason is not None:
                return None, f"{self.name} cannot run on backend {name!r}: {reason}"
            return self.backends[name], ""
        passed_over = ""
        for backend in self._faster_than_eager.get(call[0].device.type, ()):
            reason = self.unmet(backend.name, call)
            if reason is None:
                return backend, ""
            passed_over += f"{'; ' if passed_over else ''}{backend.name}: {reason}"
        if strict and passed_over:
            return None, f"{self.name} falls back to eager PyTorch, which strict mode forbids ({passed_over})"
        return self.backends["eager"], passed_over

    def unmet(self, name: str, call: Call) -> str | None:
        """Why the backend `name` cannot serve a checked call, or None if it can."""
        if name == "eager":
            return None
        backend = self.backends.get(name)
        if backend is None:
            if name not in NAMES:  # from the environment; use_backend checks
                return f"IMAGEN_FAST_BACKEND names no backend; known: auto, {', '.join(NAMES)}"
            return f"it is not implemented there (it is on: {', '.join(self.backends)})"
        device = call[0].device.type
        if name not in PREFERENCE.get(device, ()) and not (device == "cpu" and _EMULATED.get(name)):
            return f"the tensors are on {device}"
        reason = _unavailable(name)
        if reason is None and name == "cuda" and device == "cuda":
            reason = _cuda.device_reason(call[0].device.index)
        if reason is not None:
            return reason
        if transforms_active():
            return "kernels do not see torch.func transforms and forward-mode differentiation, which are active"
        for requirement in backend.requires:
            reason = requirement(call)
            if reason is not None:
                return reason
        return None

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """See the function `explain`."""
        call = self.check(*args, **kwargs)
        preferred = (*PREFERENCE.get(call[0].device.type, ()), "eager")
        reasons = {name: self.unmet(name, call) for name in (*preferred, *(n for n in NAMES if n not in preferred))}
        backend, reason = self._decide(call)
        chosen, error = (None, reason) if backend is None else (backend.name, None)
        return Explanation(self.name, chosen, _state.selection.backend, reasons, tuple(self.notes(call)), error)


@traced_as_constant
def _refuse(error: str) -> None:
    raise BackendError(error)


_logged: set[str] = set()


@traced_as_constant
def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` shows it as a table.

    Attributes:
        op: the name of the op.
        backend: the backend that would run the call, or None if the call would raise.
        selection: what was asked for: "auto" or the name of a backend.
        reasons: every backend, fastest first, with the reason why it cannot serve the call, or None if it can.
        notes: what else happens in the call, such as a copy of a tensor.
        error: what the call would raise as a `BackendError`, or None.
    """

    op: str
    backend: str | None
    selection: str
    reasons: dict[str, str | None]
    notes: tuple[str, ...]
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary, for JSON."""
        return asdict(self) | {"notes": list(self.notes)}

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [f"{self.op}: {self.error or f'runs on {self.backend} ({self.selection})'}"]
        for name, reason in self.reasons.items():
            verdict = reason or ("chosen" if name == self.backend else "could serve this call")
            lines.append(f"  {name:<{width}}  {verdict}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run this call of an op, and why not the others. Nothing is run.

    Args:
        op: the op or its name, such as "group_norm_act".
        args, kwargs: the op's arguments, exactly as for the op itself.

    Raises:
        ValueError: there is no op of that name.
        TypeError, ValueError: whatever the op raises for wrong arguments.

    Example:
        >>> print(imagen_fast.explain("group_norm_act", x[:, :, ::2], 32))
        group_norm_act: runs on cpu (auto)
          cpu     chosen
          eager   could serve this call
          triton  the tensors are on cpu
          cuda    the tensors are on cpu
          note: x will be copied: its strides are neither dense NCHW nor dense NHWC
    """
    importlib.import_module(f"{__package__}.ops")  # where ops register themselves
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        raise UserError(f"unknown op {name!r}; {nearest(name, sorted(_OPS))}")
    return _OPS[name].explain(*args, **kwargs)
