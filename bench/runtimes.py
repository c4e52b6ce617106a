"""Models in ONNX Runtime and OpenVINO, on as many threads as PyTorch has.

Both take a module that is called with tensors in order and returns one tensor, with float32 weights, and give a
function of such tensors.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .peers import PeerError

Positional = Callable[..., Tensor]


def onnxruntime(model: nn.Module, arguments: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Positional:
    """A session of the exported model, in float32.

    Args:
        model: as the module's docstring says.
        arguments: of an example call, in order, by the names that the graph gets.
        dtype: of the result.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime as runtime

    with tempfile.TemporaryDirectory(prefix="imagen-fast-bench-") as folder:
        path = Path(folder) / "model.onnx"
        given = {"input_names": list(arguments), "external_data": True}
        example = tuple(_wide(value) for value in arguments.values())
        try:
            torch.onnx.export(model, example, str(path), dynamo=True, verbose=False, **given)
        except torch.onnx.OnnxExporterError:  # transformers' masks are more than it can follow; the older one traces
            torch.onnx.export(model, example, str(path), dynamo=False, **given)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        values = zip(names, given, strict=True)
        [output] = session.run(None, {name: _wide(value).numpy() for name, value in values})
        return torch.from_numpy(output).to(dtype)

    return run


def openvino(model: nn.Module, arguments: Mapping[str, Tensor], dtype: torch.dtype) -> Positional:
    """The converted model, told to infer in `dtype`; arguments as of `onnxruntime`."""
    _need("openvino")
    import openvino as ov

    example = tuple(_wide(value) for value in arguments.values())
    converted = ov.convert_model(model, example_input=example)
    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    for port, name, value in zip(converted.inputs, arguments, example, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(list(value.shape)))
    converted.validate_nodes_and_infer_types()
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()
    names = list(arguments)

    def run(*given: Tensor) -> Tensor:
        values = zip(names, given, strict=True)
        arrays = {name: _wide(value).numpy() for name, value in values}
        results = request.infer(arrays, share_inputs=True, share_outputs=False)
        return torch.from_numpy(results[0]).to(dtype)

    return run


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PeerError(f"{', '.join(missing)} is not installed (pip install -r requirements-peers.txt)")


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
