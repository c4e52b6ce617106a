"""Weights in directories of safetensors, whole or in shards: headers are checked before data are read.

A directory holds `STEM.safetensors`, or `STEM.safetensors.index.json` and the shards it names (the layout of Hugging
Face). Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import read_json
from ..errors import CheckpointError, OutputError

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Values = Mapping[str, Any]  # of a config.json


class Stored(NamedTuple):
    """A tensor in a file: its header is read, its data are not."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_files(directory: Path, stem: str = "model", variant: str | None = None) -> dict[str, Path]:
    """The file of every tensor that the directory says it has, by the tensor's name.

    Args:
        directory: of the checkpoint.
        stem: of the file's name.
        variant: "fp16" reads model.fp16.safetensors and the like.

    Raises:
        CheckpointError: neither the file nor an index is there, or one of them is damaged.
    """
    infix = f".{variant}" if variant else ""
    single = directory / f"{stem}{infix}.safetensors"
    if single.is_file():
        with opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    index = directory / f"{stem}.safetensors.index{infix}.json"
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


def locate(files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], directory: Path) -> dict[str, Stored]:
    """Where each tensor of `shapes` is stored.

    Args:
        files: from `stored_files`.
        shapes: what the model needs, by stored name.
        directory: for errors.

    Raises:
        CheckpointError: a tensor or file is missing, has another shape, or is not floating-point.
    """
    missing = [name for name in shapes if name not in files]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory} has no tensor {missing[0]!r}{others}, which its config.json calls for")
    stored: dict[str, Stored] = {}
    for file, names in groupby(sorted(shapes, key=lambda name: str(files[name])), key=lambda name: files[name]):
        with opened(file) as tensors:
            held = set(tensors.keys())
            for name in sorted(names):
                if name not in held:
                    raise CheckpointError(f"{file} has no tensor {name!r}, though the index says so")
                stored[name] = _checked_header(file, name, tensors.get_slice(name), tuple(shapes[name]))
    return stored


def refuse_unexpected(names: Iterable[str], expected: Container[str], directory: Path) -> None:
    """Raise `CheckpointError` for the first tensor for which the model has no place."""
    unexpected = sorted(name for name in names if name not in expected)
    if unexpected:
        raise CheckpointError(f"{directory} holds a tensor {unexpected[0]!r} for which its config.json has no place")


def patterns_of(stem: str) -> tuple[str, ...]:
    """Patterns of the files that `write` makes for `stem`, and no other model's or variant's."""
    return f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{stem}.safetensors.index.json"


def refuse_to_replace_others(
    directory: Path, what: str, written: Callable[[Values], Sequence[str]], kept: Sequence[str] = ()
) -> None:
    """Raise `OutputError` if `directory` holds a file that is no part of `what`: replacing it would lose that.

    Other models have files of the same names, so it is the config.json there that says whose they are.

    Args:
        directory: may be missing.
        what: what is about to be written.
        written: from a config.json to patterns of the files that belong with it; to none if it is something else's.
        kept: names of files that replacing the directory does not lose.
    """
    held = [path for path in sorted(directory.iterdir()) if path.name not in kept] if directory.is_dir() else []
    if not held:
        return
    try:
        patterns = written(read_json(directory / "config.json"))
    except CheckpointError:  # there is none, or none that says anything
        patterns = ()
    for path in held:
        if not any(path.match(pattern) for pattern in patterns):
            raise OutputError(f"cannot write {directory}: it holds {path.name}, which is no part of {what}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `TypeError` unless it is None or a dtype that weights are stored in and computed with."""
    if dtype is not None and dtype not in FLOATING.values():
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATING.values())
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}; of these weights have one of {names}")


def read(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, each file opened once. They are views of a file mapped into memory: copy what is kept."""
    for file, names in groupby(sorted(stored, key=lambda name: str(stored[name].file)), key=lambda n: stored[n].file):
        with opened(file) as tensors:
            for name in names:
                yield name, tensors.get_tensor(stored[name].name)


def check_module(module: torch.nn.Module, directory: Path, stem: str) -> dict[str, Stored]:
    """Where the module's tensors are stored as `stem` in `directory`; nothing but headers is read.

    Raises:
        CheckpointError: see `stored_files` and `locate`; also a tensor for which the module has no place.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    files = stored_files(directory, stem)
    stored = locate(files, shapes, directory)
    refuse_unexpected(files, shapes, directory)
    return stored


def load_module(module: torch.nn.Module, directory: Path, stem: str, dtype: torch.dtype | None = None) -> None:
    """Fill a module that was built on the meta device; raises as `check_module` does before anything is loaded.

    Args:
        module: its state_dict says which tensors and shapes are needed.
        dtype: of the loaded weights; the stored one if None.
    """
    stored = check_module(module, directory, stem)
    module.load_state_dict({name: tensor.to(dtype=dtype, copy=True) for name, tensor in read(stored)}, assign=True)


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    stem: str = "model",
    dtypes: Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write tensors as `stem`.safetensors, or in shards with an index where they are more than `max_shard_bytes`.

    `folder` is one that `atomic_directory` gave, which turns a full disk into an `OutputError`.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()} | dict(dtypes or {})
    shards = _plan_shards(tensors, dtypes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file_name = f"{stem}-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        shard = {name: tensors[name].detach().to("cpu", dtypes[name]).contiguous() for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        size = sum(tensors[name].numel() * dtypes[name].itemsize for name in tensors)
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read too."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
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


def _checked_header(file: Path, name: str, header: Any, needed: tuple[int, ...]) -> Stored:
    shape, dtype = tuple(header.get_shape()), header.get_dtype()
    if shape != needed:
        raise CheckpointError(f"{file}: tensor {name!r} has shape {shape}, but config.json calls for {needed}")
    if dtype not in FLOATING:
        raise CheckpointError(f"{file}: tensor {name!r} is {dtype}, need one of {', '.join(FLOATING)}")
    return Stored(file, name, shape, FLOATING[dtype])


def _plan_shards(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
