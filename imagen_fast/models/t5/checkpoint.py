"""Hugging Face directories of T5 encoders: config.json and safetensors, whole or in shards. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...config import read_json
from ...files import atomic_directory
from .. import checkpoint
from .config import MODEL_TYPES, T5Config
from .tokenizer import FILES as TOKENIZER_FILES

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

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checkpoint.FLOATING.values()}

_WRITTEN = ("config.json", *checkpoint.patterns_of("model"), *TOKENIZER_FILES)


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
        dtype = stored["embedding.weight"].dtype
    # Copies, for the files are mapped into memory and may change on disk.
    return {
        name: tensor.to(device=device, dtype=parameter_dtype(name, dtype), copy=True)
        for name, tensor in checkpoint.read(stored)
    }


def refuse_to_replace_others(directory: Path) -> None:
    """Raise `OutputError` if `directory` holds anything but a T5 checkpoint as `save_directory` writes it."""

    def written(values: checkpoint.Values) -> tuple[str, ...]:
        return _WRITTEN if values.get("model_type") in MODEL_TYPES else ()

    checkpoint.refuse_to_replace_others(directory, "a T5 checkpoint", written)


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
        TypeError: weights cannot have this dtype.
    """
    checkpoint.check_dtype(dtype)
    refuse_to_replace_others(directory)
    dtypes = {name: tensor.dtype if dtype is None else parameter_dtype(name, dtype) for name, tensor in state.items()}
    with atomic_directory(directory) as folder:
        values = {**config.to_huggingface(), "dtype": str(dtypes["embedding.weight"]).removeprefix("torch.")}
        checkpoint.write_json(folder / "config.json", values)
        for file_name, content in extra_files.items():
            (folder / file_name).write_bytes(content)
        checkpoint.write(
            folder,
            {huggingface_name(name): tensor for name, tensor in state.items()},
            dtypes={huggingface_name(name): dtype for name, dtype in dtypes.items()},
            max_shard_bytes=max_shard_bytes,
        )


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter `name` in a model of `dtype`."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def _locate(directory: Path, shapes: Mapping[str, torch.Size], variant: str | None) -> dict[str, checkpoint.Stored]:
    """Where each tensor of `shapes` is stored, by our names; raises if one is missing or does not fit."""
    files = checkpoint.stored_files(directory, variant=variant)
    wanted: dict[str, str] = {}
    for name in shapes:
        theirs = huggingface_name(name)
        other = _OTHER_NAMES.get(theirs)
        wanted[name] = other if other in files and theirs not in files else theirs
    stored = checkpoint.locate(files, {theirs: tuple(shapes[name]) for name, theirs in wanted.items()}, directory)
    expected = set(wanted.values()) | set(_OTHER_NAMES.values())
    checkpoint.refuse_unexpected((name for name in files if name.startswith("encoder.")), expected, directory)
    return {name: stored[theirs] for name, theirs in wanted.items()}
