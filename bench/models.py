"""Cases of whole models, and the peers that they share.

A model is a module whose forward takes the inputs of its case, by name or in their order, all of them tensors, and
returns one tensor. It is built by a function, in float32 and evaluation mode, from a seed or a file: in every process
anew, and the same in all of them. What a peer makes of it counts as its preparation, building it does not.

A model may be a loop in Python around others, as a pipeline is. Then it names these parts: compilers and runtimes get
them one by one, and the loop stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import imagen_fast

from . import runtimes
from .parts import hand_over
from .peers import empty_caches, load_compiler
from .registry import Case, Function, Peer, dtype_name

Build = Callable[[], nn.Module]
Prepare = Callable[[nn.Module], nn.Module]

MEMORY_FORMATS: Mapping[str, Prepare] = {
    "nhwc": functools.partial(nn.Module.to, memory_format=torch.channels_last),
    "nchw": functools.partial(nn.Module.to, memory_format=torch.contiguous_format),
}
"""The variants of a model of pictures."""


def model_case(
    *,
    op: str,
    name: str,
    title: str,
    build: Build,
    inputs: Callable[[torch.Generator], dict[str, Tensor]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    renewed: tuple[str, ...],
    flops: int,
    moved: int,
    variants: Mapping[str, Prepare] | None = None,
    parts: tuple[str, ...] = (),
    accelerate: Callable[[Any], object] | None = None,
    without: Iterable[str] = (),
    samples_checked: int = 0,
    needs_gpu: str = "",
    tags: Iterable[str] = (),
) -> Case:
    """A case of a model.

    Args:
        op, name, title, shape, dtype, renewed, flops, samples_checked, needs_gpu, tags: as of `Case`. The title has the
            batch as its first factor, "2×": cases that differ in it alone are shown side by side.
        build: makes the model.
        inputs: the inputs by name; floating ones are cast to `dtype`.
        moved: the bytes of `Case`.
        variants: forms in which a user could run the model in PyTorch, by name, such as memory formats; each gets the
            model in `dtype` and returns it. The first is ours, too.
        parts: names of the submodules that compilers and runtimes get, if not the model as a whole.
        accelerate: how ours is made of the model; by default its children are accelerated.
        without: names of peers that cannot take part.
    """
    variants = variants or {"plain": lambda model: model}
    ours_in = next(iter(variants))
    once = functools.cache(build)  # in a process of its own, where `Peer.load` fills it
    accelerate = accelerate or _accelerate_children

    def accelerated(model: nn.Module) -> Function:
        accelerate(model)
        return _on_first_device(model)

    apart = Peer("ours", {ours_in: lambda case: accelerated(variants[ours_in](once().to(dtype)))}, load=once)

    def make_inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in inputs(generator).items()
        }

    @functools.lru_cache(maxsize=1)
    def ours_here() -> Function:
        return accelerated(variants[ours_in](build().to(dtype)))

    return Case(
        op=op,
        name=f"{name}-{dtype_name(dtype)}",
        title=title,
        shape=shape,
        dtype=dtype,
        layout=ours_in,
        direction="forward",
        inputs=make_inputs,
        ours=lambda **values: ours_here()(**values),
        eager=lambda **values: _plain(build().to(dtype))(**values),
        truth=lambda **values: _plain(build().to(dtype).double())(**values),
        peers=tuple(peer for peer in _peers(once, dtype, variants, parts) if peer.name not in set(without)),
        bytes=moved,
        flops=flops,
        renewed=renewed,
        apart=apart,
        samples_checked=samples_checked,
        needs_gpu=needs_gpu,
        tags=frozenset(tags),
    )


def _accelerate_children(model: nn.Module) -> None:
    for part in model.children():  # the module of the case only calls the library's
        imagen_fast.accelerate(part)


def _on_first_device(model: Any) -> Function:
    """The model, moved to where its first inputs are."""
    moved = functools.cache(lambda device: model.to(device))
    return lambda **values: moved(_device(values))(**values)


def _plain(model: Any) -> Function:
    """The same without any of our kernels: the loops of this package's own models call its ops."""
    run = _on_first_device(model)

    def plain(**values: Any) -> Any:
        with imagen_fast.use_backend("eager"):
            return run(**values)

    return plain


def _device(values: dict[str, Any]) -> torch.device:
    return next(iter(values.values())).device


# ---- Inputs


def random_sentences(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """(B, L) uint8: lower-case letters with a space after every sixth."""
    letters = torch.randint(ord("a"), ord("z") + 1, (batch, length), generator=generator, dtype=torch.uint8)
    letters[:, 6::7] = ord(" ")
    return letters


def sentences(letters: Tensor) -> list[str]:
    """The strings of (B, L) letters."""
    return [bytes(line).decode("ascii") for line in letters.tolist()]


# ---- Peers


def _peers(once: Any, dtype: torch.dtype, variants: Mapping[str, Prepare], parts: tuple[str, ...]) -> list[Peer]:
    """Eager PyTorch and its compiler in the case's dtype; of the runtimes those that have it."""

    def in_eager(label: str) -> Function:
        return _plain(variants[label](once().to(dtype)))

    def in_compile(label: str, **options: Any) -> Function:
        model = variants[label](once().to(dtype))
        if not parts:
            return _plain(torch.compile(model, dynamic=False, **options))
        for name in parts:
            model.get_submodule(name).compile(dynamic=False, **options)
        return _plain(model)

    def in_runtime(runtime: Callable[..., Callable[..., Tensor]], case: Case) -> Function:
        model = once()
        once.cache_clear()  # what the runtime does not hold is given up
        if not parts:
            run = runtime(model, case.make_inputs(0), dtype)
            return lambda **values: run(*values.values())
        values = {name: _wide(value) for name, value in case.make_inputs(0).items()}
        hand_over(model, parts, lambda: _plain(model)(**values), lambda *given: runtime(*given, dtype))
        return _plain(model.to(dtype))

    first = next(iter(variants))  # channels-last where that is a choice
    frozen = {"options": {"freezing": True}}  # weights become constants, packed once
    peers = [
        Peer("eager", {label: lambda case, label=label: in_eager(label) for label in variants}, load=once),  # type: ignore[misc]
        Peer(
            "compile",
            {
                "default": lambda case: in_compile(first),
                "freezing": lambda case: in_compile(first, **frozen),
            },
            load=lambda: (once(), load_compiler()),
            preparing=empty_caches,
        ),
    ]
    if dtype == torch.float32:
        peers.append(Peer("onnxruntime", {"fp32": functools.partial(in_runtime, runtimes.onnxruntime)}, load=once))
    if dtype in (torch.float32, torch.bfloat16):
        peers.append(Peer("openvino", {dtype_name(dtype): functools.partial(in_runtime, runtimes.openvino)}, load=once))
    return peers


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
