"""Checks that ops share. An error names the argument, what it got and what it needs."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from ..backends import nearest

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BESIDE_EACH_OTHER = FLOATING[:3]

# NumPy's scalars are registered as such; the first ones are found faster.
_INTEGERS = (int, torch.SymInt, numbers.Integral)
_NUMBERS = (float, int, numbers.Real)


def floating(name: str, x: Tensor) -> None:
    """x is a tensor of one of the four dtypes that ops compute in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {x.layout}")


def parameter(name: str, p: Tensor, x: Tensor, x_name: str = "x", *, required: bool = False) -> None:
    """p may stand beside x: on its device, and of its dtype, or any two of 16 and 32 bits.

    `required` is for the message: whether None, which is no parameter here, is no argument either.
    """
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a tensor{'' if required else ' or None'}, got {type(p).__name__}")
    if p.dtype != x.dtype and not (p.dtype in _BESIDE_EACH_OTHER and x.dtype in _BESIDE_EACH_OTHER):
        needed = "float64" if x.dtype == torch.float64 else "float16, bfloat16 or float32"
        article = "an" if x_name == "x" else "a"
        raise TypeError(f"{name} must be {needed} beside {article} {x_name} of {x.dtype}, got {p.dtype}")
    if p.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {p.layout}")
    if p.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, where {x_name} is, got {p.device}")


def alike(name: str, y: Tensor, x_name: str, x: Tensor) -> None:
    """y is a tensor of the shape and dtype of x, and on its device."""
    floating(name, y)
    if y.dtype != x.dtype:
        raise TypeError(f"{name} must be {x.dtype}, as {x_name} is, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, where {x_name} is, got {y.device}")
    if y.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {x_name}, {tuple(x.shape)}, got {tuple(y.shape)}")


def promoted(x: Tensor, name: str, y: Any) -> tuple[Tensor, Any]:
    """x and y, of the wider of their dtypes where PyTorch would make them so: under autocast, which leaves sums and
    products alone. Without it they stay as they are, for the op to refuse."""
    if not isinstance(y, Tensor) or y.dtype == x.dtype:
        return x, y
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x, y
    floating(name, y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def is_integer(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def plain_integer(value: Any) -> int:
    """An integer as Python's (or, of a traced size, as it is)."""
    return value if isinstance(value, int | torch.SymInt) else int(value)  # type: ignore[return-value]


def constant_integer(value: int) -> int:
    """The same where it is traced: it becomes a constant, and its graph one for this value alone."""
    return operator.index(value)


def integer(name: str, value: Any, minimum: int) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return plain_integer(value)


def number(name: str, value: Any) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def not_negative(name: str, value: Any) -> float:
    if not 0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return float(value)


def probability(name: str, value: Any) -> float:
    if not 0 <= number(name, value) <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


def one_of(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if not isinstance(value, str | None) or value not in known:
        names = [option for option in known if option is not None]
        raise ValueError(f"unknown {name} {value!r}; {nearest(str(value), names)}{' or None' if None in known else ''}")
