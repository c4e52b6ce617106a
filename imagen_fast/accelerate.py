"""Run a model on the fused ops, and back: `accelerate`, `restore` and the `Report` of what was done.

The blocks of a model change class, instance by instance, to a subclass that computes the same with fused ops. Nothing
else changes: not the object's own class, no class of any library, no parameter, no buffer, no hook. What the models
of each host library consist of is told by `imagen_fast.integrations`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._report import Accuracy, Copied, Left, Report, Swapped, count_modules, short
from ._survey import Candidate, Survey, path, survey
from ._verify import measure
from .errors import UserError
from .integrations import (
    Integration,
    Limits,
    Options,
    convert,
    converted_bytes,
    forget,
    give_back,
    graphed,
    has_form,
    integration_of,
    note_invalidation,
    reasons_of,
    summary,
    supported,
    take_form,
    unconvert,
)

__all__ = [
    "AccelerationError",
    "Accuracy",
    "Copied",
    "Left",
    "Report",
    "Swapped",
    "accelerate",
    "invalidate",
    "restore",
]


class AccelerationError(UserError, RuntimeError):
    """`strict` found a module that cannot be swapped, or `verify` one that is less accurate than the original."""


# ---- accelerate and restore


def accelerate(
    obj: Any,
    *,
    inference: bool = True,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    cache_text: bool = True,
    pack_limit: int | None = None,
    verify: Any = None,
    strict: bool = False,
    graphs: str = "auto",
    graph_limit: int = Limits().graphs,
    graph_steps: int = Limits().steps,
) -> Report:
    """Run `obj` on fused ops, in place, without changing what it computes; `restore` undoes it.

    Blocks change class to a fused subclass, one instance at a time. Parameters, `state_dict`, hooks, gradients,
    `torch.compile`, `deepcopy` and pickling work as before, and copies are accelerated too; but a shallow copy
    (`copy.copy`) of a model or a scheduler goes on calling the original's methods. A block works from the parameters of
    a child only while that child is plain: one with hooks, a parametrization, another class or weights of a tensor
    subclass, whenever it gets them, is called as the original calls it. Calling this again swaps what has been added,
    takes the options of this call, and reports all.

    What is kept beside the model (packed and converted weights, what was computed from a text) is used without
    gradients alone, and made anew when a weight or the text has changed. Writes that PyTorch does not count (through
    `.data` or a numpy alias, by fused optimizers) are seen if they change nearly all numbers of a weight, as merging
    an adapter does; for others there is `invalidate`.

    Args:
        obj: a model or system that an integration serves, such as `imagen_fast.models.Imagen` or its U-Nets.
        inference: pack the weights of linear layers and convolutions for oneDNN on the CPU; on other devices have
            queries, keys and values of the same pixels or tokens be one product, from a copy of their weights below
            each other; keep what `cache_text` says. The copies are counted in the report. False keeps nothing.
        dtype: compute in this dtype, from converted copies of the weights, in calls of a model without gradients:
            inputs are cast, and outputs cast back. None leaves each model in its own dtype. Calls of one model from
            several threads wait for each other; its weights must not be read (`state_dict`) or trained in one thread
            while another calls it without gradients.
        memory_format: `torch.channels_last` brings the pictures that enter a model into that format.
        cache_text: compute what depends on the text alone once for each text, where an integration can.
        pack_limit: the most bytes that packed weights may take; layers beyond it are left as they are.
        verify: None does not. True calls the object with small random inputs and compares every swapped module that
            these reach with its original, in evaluation mode, and both with float64. Other inputs to use are given as
            a tuple of positional or a dict of keyword arguments for one call of a model, or as prompts for a cascade.
            The float64 copy is of one module at a time.
        strict: raise, and change nothing, where a module cannot be swapped or cannot use its ops everywhere, or where
            there is nothing to swap.
        graphs: "auto" records calls of U-Nets and text encoders, with `inference`, and repeats them without their
            Python: one record for each kind of call (shapes, options), made at the second call of the kind. On the CPU
            it is a list of operators, which is compared with the model at the third call. On CUDA devices it is a CUDA
            graph (not of imagen-pytorch's U-Nets, nor of calls that draw random numbers); texts are padded to a
            multiple of 32 or 64 tokens, and the sampling loops of this package's own cascade record whole steps: both
            halves of the guidance and the solver's step are one graph, which is replayed for every step of the loop
            without the host (not yet measured on a GPU). Not with gradients, under autocast, nor while a module in the
            model has hooks or is of a class of no library that is known; the reason is logged, and stands in the next
            report. "off" records nothing.
        graph_limit: the most records of one model; CUDA graphs share their memory.
        graph_steps: the most steps of a sampling loop that one graph holds; as many as the loop has make it one graph.
            Such graphs take longer to record and hold every launch of every step. While a progress bar or a callback
            watches each step, graphs hold one.

    Returns:
        What was swapped, what was not and why, what is kept beside the model, and what `verify` measured.

    Raises:
        TypeError: no integration serves `obj`, or an option is not what it takes.
        ValueError: `verify` is asked for, and `obj` has weights on the meta device; or an option has no such value.
        AccelerationError: as `strict` says; or a module is less accurate than `imagen_fast.testing` allows, in which
            case all of `obj` has been restored.

    Example:
        >>> model = imagen_fast.models.Imagen.from_pretrained("emoji")
        >>> print(imagen_fast.accelerate(model, verify=True))
        >>> model.sample(["a cute cat"])
        >>> imagen_fast.restore(model)
    """
    integration = _integration(obj)
    _check_options(dtype, memory_format, pack_limit, graphs, graph_limit, graph_steps)
    limits = Limits(graph_limit, graph_steps)
    found = survey(obj, integration, Options(inference, inference and cache_text), dtype, pack_limit)
    verified = verify is not None and verify is not False
    if strict:
        _check_strict(obj, found)
    if verified and any(parameter.is_meta for module in _modules(obj) for parameter in module.parameters(False)):
        raise ValueError("verify needs the weights of obj, and some are on the meta device")
    for module in found.withdrawn:
        give_back(module)
    swapped, changed = [], []
    for name, module, fused, notes in found.candidates:
        if not has_form(module, fused):
            give_back(module)
            take_form(module, fused)
            changed.append(module)
        swapped.append(Swapped(name, path(fused.original), path(fused), fused.ops, tuple(notes)))
    left, copies = found.left, list(found.packed)
    unrecorded: dict[str, list[str]] = {}  # why parts run without graphs
    for name, part in integration.parts(obj).items():
        part_integration = integration_of(part)
        if part_integration is None:
            continue
        part_integration.attach(part)
        if isinstance(part, nn.Module) and part_integration.converts(part):
            prepare = part_integration.graphed(part) if inference and graphs == "auto" else None
            make = graphed(part, prepare, limits)
            reasons = [] if make is None else reasons_of(part)
            why_not = convert(part, dtype, memory_format, make)
            if make is not None:
                unrecorded[name] = [*reasons, *([] if why_not is None else [why_not])]
            if dtype is not None or memory_format is not None:
                left += [] if why_not is None else [Left(name, path(type(part)), why_not)]
                copies += [] if why_not else _converted(name, part, dtype)
    if verified and found.candidates:
        try:
            swapped = _with_accuracy(obj, integration, found.candidates, swapped, None if verify is True else verify)
        except BaseException:
            for module in changed:
                give_back(module)
            if len(changed) == len(found.candidates):  # none had its fused form before
                _detach(obj)
            raise
    left += found.over_limit
    left += _parts_without_swaps(obj, integration, [*swapped, *left])
    told = summary(graphs, inference, limits, unrecorded)
    return Report(path(type(obj)), tuple(swapped), tuple(left), tuple(copies), told)


_GRAPHS = ("auto", "off")


def _check_options(
    dtype: Any, memory_format: Any, pack_limit: Any, graphs: Any, graph_limit: Any, graph_steps: Any
) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    if memory_format not in (None, torch.channels_last):
        raise ValueError(f"memory_format must be torch.channels_last or None, got {memory_format!r}")
    if pack_limit is not None and (not isinstance(pack_limit, int) or isinstance(pack_limit, bool) or pack_limit < 0):
        raise TypeError(f"pack_limit must be a number of bytes or None, got {pack_limit!r}")
    if graphs not in _GRAPHS:
        raise ValueError(f"graphs must be one of {', '.join(map(repr, _GRAPHS))}, got {graphs!r}")
    for name, value in (("graph_limit", graph_limit), ("graph_steps", graph_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {value!r}")


def _converted(prefix: str, model: nn.Module, dtype: torch.dtype | None) -> list[Copied]:
    return [
        Copied(f"{prefix}.{name}" if prefix else name, "converted", size)
        for name, size in converted_bytes(model, dtype).items()
    ]


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

    Kept are packed and converted weights, what was computed from a text, and the table of coefficients of an
    accelerated diffusers scheduler. They follow new tensors, `load_state_dict`, `set_timesteps` and all writes in place
    that PyTorch counts. Writes through `.data` or a numpy alias, by fused optimizers, and any to a scheduler's tensors
    made in inference mode, need this.

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
    if isinstance(obj, nn.Module):  # a model that it is a part of keeps something of it, too
        note_invalidation()


def _detach(obj: Any) -> None:
    """Undo what integrations have switched besides classes, in `obj` and in all that it holds."""
    for module in _modules(obj):
        unconvert(module)
        integration = integration_of(module)
        if integration is not None:
            integration.detach(module)


def _modules(obj: Any) -> list[nn.Module]:
    """All modules in a model or in the parts of a system."""
    return [piece for piece in _pieces(obj) if isinstance(piece, nn.Module)]


def _pieces(obj: Any) -> list[Any]:
    """All modules in a model or in the parts of a system, and the parts that are no modules.

    A module may hold systems, which may keep parts where `modules` does not find them.
    """
    whole = [*obj.modules()] if isinstance(obj, nn.Module) else []
    systems = [(module, integration_of(module)) for module in whole] or [(obj, _integration(obj))]
    parts = [part for system, integration in systems if integration for part in integration.parts(system).values()]
    inner = (piece for part in parts for piece in (part.modules() if isinstance(part, nn.Module) else (part,)))
    return list({id(piece): piece for piece in (*whole, *inner)}.values())


def _integration(obj: Any) -> Integration:
    integration = integration_of(obj)
    if integration is None:
        inner = next((m for m in obj.modules() if integration_of(m)), None) if isinstance(obj, nn.Module) else None
        hint = f" It holds a {type(inner).__name__}, which can be passed instead." if inner is not None else ""
        raise TypeError(
            f"obj must be of a class that an integration serves, got {path(type(obj))}.{hint} "
            f"Served are, with their subclasses: {supported()}"
        )
    return integration


def _parts_without_swaps(obj: Any, integration: Integration, listed: list[Swapped | Left]) -> list[Left]:
    """The parts of a system, or the object itself, of which no module is in the report yet."""
    left = []
    for name, part in integration.parts(obj).items():
        if not any(entry.name == name or entry.name.startswith(f"{name}." if name else "") for entry in listed):
            reason = "none of its modules has a fused form" if integration_of(part) else "no integration serves it"
            left.append(Left(name, path(type(part)), reason))
    return left


def _check_strict(obj: Any, found: Survey) -> None:
    problems = [f"{entry.name} ({short(entry.class_name)}): {entry.reason}" for entry in found.left]
    problems += [f"{name}: {note}" for name, _, _, notes in found.candidates for note in notes]
    if not found.left and all(candidate.fused.packs for candidate in found.candidates):
        problems = ["none of its modules has a fused form"]
    if problems:
        listed = "\n  ".join(problems)
        raise AccelerationError(f"{type(obj).__name__} cannot be accelerated entirely (strict=True):\n  {listed}")


# ---- verify


def _with_accuracy(
    obj: Any, integration: Integration, candidates: list[Candidate], swapped: list[Swapped], inputs: Any
) -> list[Swapped]:
    """`swapped` with what was measured; restores `obj` and raises if a module falls short."""
    modules = {c.name: c.module for c in candidates if isinstance(c.module, nn.Module)}
    accuracies, failures = measure(integration.runs(obj, inputs), modules, _modules(obj))
    if failures:
        restore(obj)
        listed = "\n  ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise AccelerationError(
            f"{len(failures)} of {count_modules(len(candidates))} of {type(obj).__name__} are less accurate on the "
            f"fused ops; all are restored:\n  {listed}"
        )
    return [
        replace(entry, accuracy=Accuracy(*accuracies[entry.name]))
        if entry.name in accuracies
        else replace(entry, notes=(*entry.notes, "verify did not reach it"))
        for entry in swapped
    ]
