"""Cases of whole models, and the peers that they share.

A model is a module whose forward takes the inputs of its case by name, all of them tensors, and returns one tensor. It
is built by a function, in float32 and evaluation mode, from a seed or a file: in every process anew, and the same in
all of them. What a peer makes of it counts as its preparation, building it does not.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import imagen_fast

from .peers import PeerError, empty_caches, load_compiler
from .registry import Case, Function, Peer, dtype_name

Build = Callable[[], nn.Module]
Prepare = Callable[[nn.Module], nn.Module]

LAYOUTS: Mapping[str, torch.memory_format] = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


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
    tags: Iterable[str] = (),
) -> Case:
    """A case of a model.

    Args:
        op, name, title, shape, dtype, renewed, flops, tags: as of `Case`.
        build: makes the model.
        inputs: the inputs by name; floating ones are cast to `dtype`.
        moved: the bytes of `Case`.
        variants: forms in which a user could run the model in PyTorch, by name, such as memory formats; each gets the
            model in `dtype` and returns it. The first is ours, too.
    """
    variants = variants or {"plain": lambda model: model}
    ours_in = next(iter(variants))
    once = functools.cache(build)  # in a process of its own, where `Peer.load` fills it
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
        eager=lambda **values: on_device(build().to(dtype), values)(**values),
        truth=lambda **values: on_device(build().to(dtype).double(), values)(**values),
        peers=tuple(_peers(once, dtype, variants)),
        bytes=moved,
        flops=flops,
        renewed=renewed,
        apart=apart,
        tags=frozenset(tags),
    )


def accelerated(model: nn.Module) -> Function:
    """Ours."""
    for part in model.children():  # the module of the case only calls the library's
        imagen_fast.accelerate(part)
    return _on_first_device(model)


def _on_first_device(model: nn.Module) -> Function:
    """The model, moved to where its first inputs are."""
    moved = functools.cache(lambda device: model.to(device))
    return lambda **values: moved(_device(values))(**values)


def on_device(model: nn.Module, values: dict[str, Any]) -> nn.Module:
    return model.to(_device(values))


def _device(values: dict[str, Any]) -> torch.device:
    return next(iter(values.values())).device


# ---- Peers


def _peers(once: Build, dtype: torch.dtype, variants: Mapping[str, Prepare]) -> list[Peer]:
    """Eager PyTorch and its compiler in the case's dtype; of the runtimes those that have it."""

    def in_eager(label: str) -> Function:
        return _on_first_device(variants[label](once().to(dtype)))

    def in_compile(label: str, **options: Any) -> Function:
        model = variants[label](once().to(dtype))
        return _on_first_device(torch.compile(model, dynamic=False, **options))  # type: ignore[arg-type]

    last = list(variants)[-1]  # channels-last where that is a choice
    frozen = {"options": {"freezing": True}}  # weights become constants, packed once
    peers = [
        Peer("eager", {label: lambda case, label=label: in_eager(label) for label in variants}, load=once),  # type: ignore[misc]
        Peer(
            "compile",
            {
                "default": lambda case: in_compile(last),
                "freezing": lambda case: in_compile(last, **frozen),
            },
            load=lambda: (once(), load_compiler()),
            preparing=empty_caches,
        ),
    ]
    if dtype == torch.float32:
        peers.append(Peer("onnxruntime", {"fp32": lambda case: onnxruntime(once(), case)}, load=once))
    if dtype in (torch.float32, torch.bfloat16):
        peers.append(Peer("openvino", {dtype_name(dtype): lambda case: openvino(once(), case)}, load=once))
    return peers


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PeerError(f"{', '.join(missing)} is not installed (pip install -r requirements-peers.txt)")


def onnxruntime(model: nn.Module, case: Case) -> Function:
    """A session of the exported model, on as many threads as PyTorch has."""
    _need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime as runtime

    values = case.make_inputs(0)
    with tempfile.TemporaryDirectory(prefix="imagen-fast-bench-") as folder:
        path = Path(folder) / "model.onnx"
        given = {"args": (), "f": str(path), "kwargs": values, "input_names": list(values), "external_data": True}
        try:
            torch.onnx.export(model, dynamo=True, verbose=False, **given)
        except torch.onnx.OnnxExporterError:  # transformers' masks are more than it can follow; the older one traces
            torch.onnx.export(model, dynamo=False, **given)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(**given: Tensor) -> Tensor:
        [output] = session.run(None, {name: value.numpy() for name, value in given.items()})
        return torch.from_numpy(output)

    return run


def openvino(model: nn.Module, case: Case) -> Function:
    """The converted model, from float32 weights, told to infer in the case's dtype."""
    _need("openvino")
    import openvino as ov

    values = {name: _wide(value) for name, value in case.make_inputs(0).items()}
    converted = ov.convert_model(model, example_input=values)
    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[case.dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    for port, (name, value) in zip(converted.inputs, values.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(list(value.shape)))
    converted.validate_nodes_and_infer_types()
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()

    def run(**given: Tensor) -> Tensor:
        arrays = {name: _wide(value).numpy() for name, value in given.items()}
        results = request.infer(arrays, share_inputs=True, share_outputs=False)
        return torch.from_numpy(results[0]).to(case.dtype)

    return run


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
