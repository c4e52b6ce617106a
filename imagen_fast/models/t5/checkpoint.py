"""Hugging Face directories of T5 encoders: config.json and safetensors, whole or in shards. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...config import read_json
from ...errors import CheckpointError, OutputError
from ...files import atomic_directory
from .config import T5Config

# Ours -> Hugging Face's, applied in this order.
_RENAMES = (
    ("embedding.", "shared."),
    ("final_norm.", "encoder.final_layer_norm."),
    ("blocks.", "encoder.block."),
    (".attention_norm.", ".layer.0.layer_norm."),
    (".attention.relative_bias.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".attention.", ".layer.0.SelfAttention."),
    (".ffn_norm.", ".layer.1.layer_norm."),
    (".ffn.", ".layer.1.DenseReluDense."),
)
# Checkpoints saved with the encoder alone may hold the embedding under this name instead.
_OTHER_NAMES = {"shared.weight": "encoder.embed_tokens.weight"}

_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATING.values()}

_WRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "spiece.model")


class _Stored(NamedTuple):
    """A tensor in a file: its header is read, its data are not."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def huggingface_name(name: str) -> str:
    """The name under which Hugging Face stores the parameter `name` of a `T5Encoder`."""
    for ours, theirs in _RENAMES:
        name = name.replace(ours, theirs)
    return name


def read_config(directory: Path) -> tuple[T5Config, torch.dtype | None]:
    """The sizes in a directory's config.json, and the dtype it asks for, if it names one."""
    path = directory / "config.json"
    values = read_json(path)
    named = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    return T5Config.from_huggingface(values, str(path)), _DTYPES.get(named)


def load_state(
    directory: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    variant: str | None,
) -> dict[str, Tensor]:
    """The encoder's tensors by our names, loaded file by file after the headers of all of them were checked.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and its shards.
        shapes: what the encoder needs.
        dtype: of the result; that of the stored embedding if None. In an fp16 model the feed-forward output weights
            `wo` are kept in fp32, since their products overflow, as transformers does.
        device: where the tensors go.
        variant: "fp16" reads model.fp16.safetensors and the like.

    Raises:
        CheckpointError: a file or a tensor is missing, or a tensor has another shape or no floating-point dtype.
    """
    stored = _locate(directory, shapes, variant)
    if dtype is None:
        dtype = _FLOATING[stored["embedding.weight"].dtype]
    state: dict[str, Tensor] = {}
    in_file = sorted(stored, key=lambda name: str(stored[name].file))
    for file, names in groupby(in_file, key=lambda name: stored[name].file):
        with _open(file) as tensors:
            for name in names:
                # A copy, for the file is mapped into memory and may change on disk.
                tensor = tensors.get_tensor(stored[name].name)
                state[name] = tensor.to(device=device, dtype=parameter_dtype(name, dtype), copy=True)
    return state


def save_directory(
    directory: Path,
    config: T5Config,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    extra_files: Mapping[str, bytes],
    max_shard_bytes: int,
) -> None:
    """Write config.json, the tensors and `extra_files`; the directory appears under its name when it is whole.

    Raises:
        OutputError: it cannot be written, or `directory` holds files that are no part of such a checkpoint, which
            replacing it would lose.
    """
    _refuse_to_replace_others(directory)
    dtypes = {name: tensor.dtype if dtype is None else parameter_dtype(name, dtype) for name, tensor in state.items()}
    shards = _plan_shards(state, dtypes, max_shard_bytes)
    with atomic_directory(directory) as folder:
        values = {**config.to_huggingface(), "dtype": str(dtypes["embedding.weight"]).removeprefix("torch.")}
        _write_json(folder / "config.json", values)
        for file_name, content in extra_files.items():
            (folder / file_name).write_bytes(content)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            file_name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {
                huggingface_name(name): state[name].detach().to("cpu", dtypes[name]).contiguous() for name in names
            }
            try:
                save_file(tensors, folder / file_name, metadata={"format": "pt"})
            except SafetensorError as error:  # what a full disk raises here
                raise OutputError(f"cannot write {directory / file_name}: {error}") from error
            weight_map |= dict.fromkeys(tensors, file_name)
        if len(shards) > 1:
            size = sum(state[name].numel() * dtypes[name].itemsize for name in state)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter `name` in a model of `dtype`."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def _locate(directory: Path, shapes: Mapping[str, torch.Size], variant: str | None) -> dict[str, _Stored]:
    """Where each tensor of `shapes` is stored, by our names; raises if one is missing or does not fit."""
    files = _weight_files(directory, variant)
    wanted: dict[str, str] = {}
    for name in shapes:
        theirs = huggingface_name(name)
        other = _OTHER_NAMES.get(theirs)
        wanted[name] = other if other in files and theirs not in files else theirs
    missing = [theirs for theirs in wanted.values() if theirs not in files]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory} has no tensor {missing[0]!r}{others}, which its config.json calls for")
    expected = set(wanted.values()) | set(_OTHER_NAMES.values())
    unexpected = sorted(theirs for theirs in files if theirs.startswith("encoder.") and theirs not in expected)
    if unexpected:
        raise CheckpointError(f"{directory} holds a tensor {unexpected[0]!r} for which its config.json has no place")

    stored: dict[str, _Stored] = {}
    by_file = sorted(wanted, key=lambda name: str(files[wanted[name]]))
    for file, names in groupby(by_file, key=lambda name: files[wanted[name]]):
        with _open(file) as tensors:
            held = set(tensors.keys())
            for name in names:
                if wanted[name] not in held:
                    raise CheckpointError(f"{file} has no tensor {wanted[name]!r}, though the index says so")
                header = tensors.get_slice(wanted[name])
                stored[name] = _Stored(file, wanted[name], tuple(header.get_shape()), header.get_dtype())
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].name):
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, "
                f"but config.json calls for {tuple(shapes[name])}"
            )
        if tensor.dtype not in _FLOATING:
            known = ", ".join(_FLOATING)
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, need one of {known}")
    return stored


def _weight_files(directory: Path, variant: str | None) -> dict[str, Path]:
    """The file of every tensor that the directory says it has, by Hugging Face's names."""
    infix = f".{variant}" if variant else ""
    single = directory / f"model{infix}.safetensors"
    if single.is_file():
        with _open(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    index = directory / f"model.safetensors.index{infix}.json"
    if not index.is_file():
        pickled = next(directory.glob("pytorch_model*.bin"), None)
        if pickled is not None:
            raise CheckpointError(
                f"{directory} holds its weights only in {pickled.name}, a pickle, which is never opened here: convert "
                "it, for example by loading it with transformers and calling save_pretrained(...)"
            )
        raise CheckpointError(f"{directory} is not a checkpoint: it has neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} holds no weight_map from tensor names to file names")
    outside = next((file for file in weight_map.values() if Path(file).name != file), None)
    if outside is not None:
        raise CheckpointError(f"{index} names the file {outside!r}, which is outside its directory")
    return {name: directory / file for name, file in weight_map.items()}


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file; errors in opening or reading it become `CheckpointError`."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} misses the file {file.name}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _plan_shards(
    state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _refuse_to_replace_others(directory: Path) -> None:
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if not any(path.match(pattern) for pattern in _WRITTEN):
            raise OutputError(f"cannot write {directory}: it holds {path.name}, which is no part of a T5 checkpoint")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
