"""The quantile of |x| over each sample, exactly, without a sort.

With v_0 <= v_1 <= ... the magnitudes of a sample's n values in order, and r + w = q (n - 1) split into an integer and a
fraction in [0, 1), both in float64,

    abs_quantile = v_r + w (v_{r+1} - v_r)

as `numpy.quantile` has it. It is what dynamic thresholding takes of the predicted picture at every step (Saharia et
al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", 2022, section 2.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from ..backends import Backend, Op, dtypes, no_gradient, run_operator
from ..layout import dense, is_dense
from ..reference.abs_quantile import abs_quantile as eager_abs_quantile
from . import _checks


class _Call(NamedTuple):
    x: Tensor
    q: float


def _check(x: Tensor, q: float) -> _Call:
    _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions (B, ...), got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have values in each sample, got shape {tuple(x.shape)}")
    return _Call(x, _checks.probability("q", q))


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake(x: Tensor, q: float) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))


def _define(backend: str) -> Any:
    """The operator of a backend that a library implements."""
    name = f"abs_quantile_{backend}"
    _LIBRARY.define(f"{name}(Tensor x, float q) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"imagen_fast::{name}", _fake, lib=_LIBRARY)
    return getattr(torch.ops.imagen_fast, name).default


_cpu = _define("cpu")
_cuda = _define("cuda")
# For tests: who selects; see csrc/abs_quantile/cuda.cu
_LIBRARY.define("_abs_quantile_cuda_plan(Tensor x) -> int[]")


def _samples_are_dense(x: Tensor) -> bool:
    """Whether each sample fills its memory, in any order of its elements and at any distance from the next."""
    if is_dense(x):
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _run_cpu(call: _Call) -> Tensor:
    x, q = call
    result: Tensor = run_operator(_cpu, x if _samples_are_dense(x) else dense(x), q)
    return result


def _run_cuda(call: _Call) -> Tensor:
    x, q = call
    result: Tensor = run_operator(_cuda, x if _samples_are_dense(x) else dense(x), q)
    return result


@_triton.once
def _define_triton() -> None:
    _triton.define("abs_quantile_triton", _triton.kernels("abs_quantile").forward, fake=_fake)


def _run_triton(call: _Call) -> Tensor:
    _define_triton()
    x, q = call
    operator = torch.ops.imagen_fast.abs_quantile_triton.default
    result: Tensor = run_operator(operator, x if _samples_are_dense(x) else dense(x), q)
    return result


def _notes(call: _Call) -> list[str]:
    return [] if _samples_are_dense(call.x) else ["x will be copied: its samples are not dense"]


_OP = Op(
    "abs_quantile",
    _check,
    (
        Backend("eager", lambda call: eager_abs_quantile(*call)),
        Backend(
            "cpu",
            _run_cpu,
            (dtypes("x", torch.float16, torch.bfloat16, torch.float32, torch.float64), no_gradient("x")),
        ),
        Backend("triton", _run_triton, (dtypes("x", torch.float16, torch.bfloat16, torch.float32), no_gradient("x"))),
        Backend("cuda", _run_cuda, (dtypes("x", torch.float16, torch.bfloat16, torch.float32), no_gradient("x"))),
    ),
    _notes,
)


def abs_quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of |x| over each sample, with linear interpolation.

    The result is the true one, rounded once: of `numpy.quantile(abs(x), q)` in float64, where x is finite. (Of
    `torch.quantile` it can differ by some tens of ulp, and that takes at most 2^24 values.) Gradients, where they are
    asked for, are those of plain PyTorch, on the `eager` backend.

    Args:
        x: (B, n), or samples (B, ...) of any shape with at least one value, in float16, bfloat16, float32 or float64.
            Samples that are dense in memory, in any order of their dimensions, are read in place; others are copied
            (`imagen_fast.explain` says so). B may be 0.
        q: from 0, the smallest magnitude, to 1, the largest.

    Returns:
        (B,) in float32, or in float64 for float64. Between a finite value and infinity, and between infinities, it is
        infinity; where a rank is hit exactly, the value there. A sample with any NaN gives NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: dynamic thresholding in Imagen (Saharia et al., 2022, section 2.3).

    Example:
        >>> limit = ops.abs_quantile(x0, 0.995).clamp(min=1)  # (B,)
        >>> x0 = (x0 / limit[:, None, None, None]).clamp(-1, 1)
    """
    return _OP.run(_check(x, q))
