"""How the model's output is guided and the predicted picture kept in range."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): output = unconditional + scale · (conditional − unconditional).

    rescale pulls the guided output's standard deviation towards the conditional one's (arXiv 2305.08891, section 3.4);
    remove_parallel keeps of the difference only what is orthogonal to the conditional output (imagen-pytorch 2.1).
    """

    scale: float = 1.0
    rescale: float = 0.0
    remove_parallel: bool = False

    def __post_init__(self) -> None:
        _check_number("scale", self.scale)
        _check_number("rescale", self.rescale)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be between 0 and 1, got {self.rescale}")
        if not isinstance(self.remove_parallel, bool):
            raise TypeError(f"remove_parallel must be True or False, got {self.remove_parallel!r}")


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Imagen, section 2.3): s is the percentile of |x0| of each sample, at least min_value and at
    most max_value; x0 is clipped to [−s, s] and divided by s.

    The paper uses 0.995; DeepFloyd IF 0.95 with a max_value of 1.5 or 1.0; imagen-pytorch 0.95.
    """

    percentile: float
    min_value: float = 1.0
    max_value: float | None = None

    def __post_init__(self) -> None:
        _check_number("percentile", self.percentile)
        _check_number("min_value", self.min_value)
        if self.max_value is not None:
            _check_number("max_value", self.max_value)
        if not 0 <= self.percentile <= 1:
            raise ValueError(f"percentile must be between 0 and 1, got {self.percentile}")
        if not 0 < self.min_value < math.inf:
            raise ValueError(f"min_value must be positive and finite, got {self.min_value}")
        if self.max_value is not None and not self.max_value >= self.min_value:
            raise ValueError(f"max_value must be at least min_value {self.min_value}, got {self.max_value}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
