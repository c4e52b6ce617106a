"""Run a model on the fused ops, and back: `accelerate`, `restore` and the `Report` of what was done.

The blocks of a model change class, instance by instance, to a subclass that computes the same with fused ops. Nothing
else changes: not the object's own class, no class of any library, no parameter, no buffer, no hook. What the models
of each host library consist of is told by `imagen_fast.integrations`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from ._verify import measure
from .errors import UserError
from .integrations import (
    Form,
    FusedMethod,
    Integration,
    forget,
    give_back,
    has_form,
    integration_of,
    own_methods,
    supported,
    take_form,
)

__all__ = ["AccelerationError", "Accuracy", "Left", "Report", "Swapped", "accelerate", "invalidate", "restore"]


class AccelerationError(UserError, RuntimeError):
    """`strict` found a module that cannot be swapped, or `verify` one that is less accurate than the original."""


# ---- Report


@dataclass(frozen=True)
class Accuracy:
    """What `verify` measured: largest errors against float64, relative to the largest value of the result.

    Attributes:
        ours: of the fused module.
        eager: of the original in the same dtype.
        allowed: what `imagen_fast.testing.assert_as_accurate` allows, given eager's.
    """

    ours: float
    eager: float
    allowed: float


@dataclass(frozen=True)
class Swapped:
    """A module that has its fused form.

    Attributes:
        name: as in `named_modules`.
        class_name: the class that it had, with its module.
        fused_name: the class that it has, with its module.
        ops: the ops that this class calls.
        notes: where it calls a child instead, and why. This is so as long as the reason lasts, and no longer.
        accuracy: what `verify` measured; None if it was not asked for, or did not reach the module.
    """

    name: str
    class_name: str
    fused_name: str
    ops: tuple[str, ...]
    notes: tuple[str, ...] = ()
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class Left:
    """A module that could have been expected to be swapped, or a whole part of a system, and why it was left."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; `print` shows it as tables.

    Attributes:
        class_name: of the object, with its module.
        swapped: every module that has its fused form now, from earlier calls too.
        left: every module that was left as it is.
    """

    class_name: str
    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries, lists, strings and numbers, for JSON."""
        return _as_plain(asdict(self))

    def __str__(self) -> str:
        from tabulate import tabulate

        title = (
            f"{_short(self.class_name)}: {_count(len(self.swapped))} on fused ops, {len(self.left)} left as they were"
        )
        tables = [title if self.swapped else f"{title}: there is nothing to swap"]
        if self.swapped:
            tables.append(tabulate(self._swapped_rows(), headers="keys", disable_numparse=True))
        if self.left:
            rows = [
                {"left": name, "class": _short(class_name), "why": reason, "times": times}
                for (name, class_name, reason), times in _counted(
                    (_pattern(left.name), left.class_name, left.reason) for left in self.left
                )
            ]
            tables.append(tabulate(rows, headers="keys", disable_numparse=True))
        return "\n\n".join(tables)

    def _swapped_rows(self) -> list[dict[str, Any]]:
        """One row for all modules whose names differ in numbers alone."""
        rows: list[dict[str, Any]] = []
        for key, times in _counted(map(_row_key, self.swapped)):
            name, class_name, fused_name, ops, notes = key
            row = {"swapped": name, "class": _short(class_name), "runs as": _short(fused_name), "ops": ", ".join(ops)}
            row["times"] = times
            measured = [s.accuracy for s in self.swapped if s.accuracy is not None and _row_key(s) == key]
            if measured:
                worst = max(measured, key=lambda accuracy: accuracy.ours)
                row["largest error"] = f"{worst.ours:.1e}, eager {worst.eager:.1e}"
            if notes:
                row["note"] = "; ".join(notes)
            rows.append(row)
        return rows


def _row_key(swapped: Swapped) -> tuple[Any, ...]:
    return _pattern(swapped.name), swapped.class_name, swapped.fused_name, swapped.ops, swapped.notes


def _pattern(name: str) -> str:
    """The name with a star for every number in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _counted(items: Iterator[Any]) -> list[tuple[Any, int]]:
    counts: dict[Any, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return list(counts.items())


def _count(modules: int) -> str:
    return f"{modules} module{'' if modules == 1 else 's'}"


def _short(class_name: str) -> str:
    return class_name.rpartition(".")[2]


def _as_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---- accelerate and restore


def accelerate(obj: Any, *, verify: Any = None, strict: bool = False) -> Report:
    """Run `obj` on fused ops, in place, without changing what it computes; `restore` undoes it.

    Blocks change class to a fused subclass, one instance at a time. Parameters, `state_dict`, hooks, gradients,
    `torch.compile`, `deepcopy` and pickling work as before, and copies are accelerated too. A block works from the
    parameters of a child only while that child is plain: one with hooks, a parametrization, another class or weights
    of a tensor subclass, whenever it gets them, is called as the original calls it. Calling this again swaps what has
    been added, and reports all.

    Args:
        obj: a model or system that an integration serves, such as `imagen_fast.models.Imagen` or its U-Nets.
        verify: None does not. True calls the object with small random inputs and compares every swapped module that
            these reach with its original, in evaluation mode, and both with float64. Other inputs to use are given as
            a tuple of positional or a dict of keyword arguments for one call of a model, or as prompts for a cascade.
            The float64 copy is of one module at a time.
        strict: raise, and change nothing, where a module cannot be swapped or cannot use its ops everywhere, or where
            there is nothing to swap.

    Returns:
        What was swapped, what was not and why, and what `verify` measured.

    Raises:
        TypeError: no integration serves `obj`, or `verify` is not what it takes.
        ValueError: `verify` is asked for, and `obj` has weights on the meta device.
        AccelerationError: as `strict` says; or a module is less accurate than `imagen_fast.testing` allows, in which
            case all of `obj` has been restored.

    Example:
        >>> model = imagen_fast.models.Imagen.from_pretrained("emoji")
        >>> print(imagen_fast.accelerate(model, verify=True))
        >>> model.sample(["a cute cat"])
        >>> imagen_fast.restore(model)
    """
    integration = _integration(obj)
    candidates, left = _survey(obj, integration)
    verified = verify is not None and verify is not False
    if strict:
        _check_strict(obj, candidates, left)
    if verified and any(parameter.is_meta for module in _modules(obj) for parameter in module.parameters(False)):
        raise ValueError("verify needs the weights of obj, and some are on the meta device")
    swapped, changed = [], []
    for name, module, fused, notes in candidates:
        if not has_form(module, fused):
            take_form(module, fused)
            changed.append(module)
        swapped.append(Swapped(name, _path(fused.original), _path(fused), fused.ops, tuple(notes)))
    for part in integration.parts(obj).values():
        part_integration = integration_of(part)
        if part_integration is not None:
            part_integration.attach(part)
    if verified and candidates:
        try:
            swapped = _with_accuracy(obj, integration, candidates, swapped, None if verify is True else verify)
        except BaseException:
            for module in changed:
                give_back(module)
            if len(changed) == len(candidates):  # none had its fused form before
                _detach(obj)
            raise
    left += _parts_without_swaps(obj, integration, [*swapped, *left])
    return Report(_path(type(obj)), tuple(swapped), tuple(left))


def restore(obj: Any) -> None:
    """Undo `accelerate`: every module in `obj` gets back the class that it had, and computes bit for bit what it did.

    Does nothing to what is not accelerated. Works on copies and on what was unpickled, too.

    Args:
        obj: what `accelerate` takes, or any module that holds it.

    Raises:
        TypeError: no integration serves `obj`, and it is not a module.
    """
    for piece in _pieces(obj):
        give_back(piece)
    _detach(obj)


def invalidate(obj: Any) -> None:
    """Drop what is kept of `obj`, to be computed anew: for changes that PyTorch does not let be seen.

    Kept is the table of coefficients of an accelerated diffusers scheduler. It follows `set_timesteps` and writes in
    place; writes through `.data` or a numpy alias, and any to tensors made in inference mode, need this.

    Args:
        obj: what `accelerate` takes, or any module that holds it; nothing happens to what is not accelerated.

    Raises:
        TypeError: no integration serves `obj`, and it is not a module.

    Example:
        >>> pipe.scheduler.sigmas.numpy()[0] = 12.0
        >>> imagen_fast.invalidate(pipe)
    """
    for piece in _pieces(obj):
        forget(piece)


def _detach(obj: Any) -> None:
    """Undo what integrations have switched besides classes, in `obj` and in all that it holds."""
    for module in _modules(obj):
        integration = integration_of(module)
        if integration is not None:
            integration.detach(module)


def _modules(obj: Any) -> list[nn.Module]:
    """All modules in a model or in the parts of a system."""
    return [piece for piece in _pieces(obj) if isinstance(piece, nn.Module)]


def _pieces(obj: Any) -> list[Any]:
    """All modules in a model or in the parts of a system, and the parts that are no modules."""
    parts = [obj] if isinstance(obj, nn.Module) else _integration(obj).parts(obj).values()
    return [piece for part in parts for piece in (part.modules() if isinstance(part, nn.Module) else (part,))]


class _Candidate(NamedTuple):
    """A module that has a fused form, now or in a moment."""

    name: str
    module: Any
    fused: Form
    notes: list[str]


def _integration(obj: Any) -> Integration:
    integration = integration_of(obj)
    if integration is None:
        inner = next((m for m in obj.modules() if integration_of(m)), None) if isinstance(obj, nn.Module) else None
        hint = f" It holds a {type(inner).__name__}, which can be passed instead." if inner is not None else ""
        raise TypeError(
            f"obj must be of a class that an integration serves, got {_path(type(obj))}.{hint} "
            f"Served are, with their subclasses: {supported()}"
        )
    return integration


def _survey(obj: Any, integration: Integration) -> tuple[list[_Candidate], list[Left]]:
    """The modules that have a fused form, and those that miss it narrowly. Changes nothing."""
    candidates: list[_Candidate] = []
    left: list[Left] = []
    seen: set[nn.Module] = set()
    for part_name, part in integration.parts(obj).items():
        part_integration = integration_of(part)
        if part_integration is None:
            continue
        is_module = isinstance(part, nn.Module)
        pieces = part.named_modules(memo=seen, prefix=part_name) if is_module else ((part_name, part),)
        for name, module in pieces:
            form = part_integration.form_of(module)
            if form is None:
                continue
            reason = None if has_form(module, form) else _why_left(module, form)
            if reason is None:
                candidates.append(_Candidate(name, module, form, form.obstacles(module)))
            else:
                left.append(Left(name, _path(type(module)), reason))
    return candidates, left


def _why_left(module: Any, form: Form) -> str | None:
    if issubclass(form, FusedMethod):
        if type(module) is not form.original:
            return f"it is a subclass of {form.original.__name__}, which may compute something else"
        if form.method in vars(module):
            return f"its {form.method} is replaced on the instance"
        return form.why_left(module)
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if type(module) is not form.original:
        return f"it is a subclass of {form.original.__name__}, which may compute something else"
    if "forward" in vars(module) and "forward" not in own_methods(module).values():
        return "its forward is replaced on the instance"
    return None


def _parts_without_swaps(obj: Any, integration: Integration, listed: list[Swapped | Left]) -> list[Left]:
    """The parts of a system, or the object itself, of which no module is in the report yet."""
    left = []
    for name, part in integration.parts(obj).items():
        if not any(entry.name == name or entry.name.startswith(f"{name}." if name else "") for entry in listed):
            reason = "none of its modules has a fused form" if integration_of(part) else "no integration serves it"
            left.append(Left(name, _path(type(part)), reason))
    return left


def _check_strict(obj: Any, candidates: list[_Candidate], left: list[Left]) -> None:
    problems = [f"{entry.name} ({_short(entry.class_name)}): {entry.reason}" for entry in left]
    problems += [f"{name}: {note}" for name, _, _, notes in candidates for note in notes]
    if not candidates and not left:
        problems = ["none of its modules has a fused form"]
    if problems:
        listed = "\n  ".join(problems)
        raise AccelerationError(f"{type(obj).__name__} cannot be accelerated entirely (strict=True):\n  {listed}")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---- verify


def _with_accuracy(
    obj: Any, integration: Integration, candidates: list[_Candidate], swapped: list[Swapped], inputs: Any
) -> list[Swapped]:
    """`swapped` with what was measured; restores `obj` and raises if a module falls short."""
    modules = {c.name: c.module for c in candidates if isinstance(c.module, nn.Module)}
    accuracies, failures = measure(integration.runs(obj, inputs), modules, _modules(obj))
    if failures:
        restore(obj)
        listed = "\n  ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise AccelerationError(
            f"{len(failures)} of {_count(len(candidates))} of {type(obj).__name__} are less accurate on the fused ops; "
            f"all are restored:\n  {listed}"
        )
    return [
        replace(entry, accuracy=Accuracy(*accuracies[entry.name]))
        if entry.name in accuracies
        else replace(entry, notes=(*entry.notes, "verify did not reach it"))
        for entry in swapped
    ]
