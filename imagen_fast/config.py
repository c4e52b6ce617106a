"""Dataclass configurations to and from plain dictionaries, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError, ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `values`; nested dataclasses are built from nested mappings.

    Args:
        cls: a dataclass.
        values: its fields by name; fields with a default may be missing.
        where: what to call this configuration in errors, such as a file's name.

    Raises:
        ConfigError: an unknown key (the nearest known one is suggested), a missing key, or a value of the wrong type.
    """
    where = where or cls.__name__
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table of keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    hints = typing.get_type_hints(cls)
    known = {key: _convert(hints[key], value, f"{where}: {key!r}") for key, value in values.items()}
    try:
        return cls(**known)
    except TypeError as error:
        missing = [name for name, f in fields.items() if name not in known and _required(f)]
        raise ConfigError(f"{where}: missing key {', '.join(map(repr, missing)) or error}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as a dictionary that JSON can hold (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `CheckpointError` if the file is missing or is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, where) for item in value)
        if len(value) != len(arguments):
            raise ConfigError(f"{where} must hold {len(arguments)} values, got {value!r}")
        return tuple(_convert(a, item, where) for a, item in zip(arguments, value, strict=True))
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin is None and isinstance(hint, type)  # in Python 3.10 list[int] is a type, too
    if plain and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
