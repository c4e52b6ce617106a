"""RMS normalisation over the channels of every position, a scale and shift, and an activation, in one pass over memory.

    xhat = x * rstd        rstd = sqrt(C) / max(|x|, 1e-12), |x| the 2-norm of a position's C channels
    t    = xhat * weight * (1 + scale) + shift
    y    = activation(t)

`ChanRMSNorm` of imagen-pytorch 2.0 and later (lucidrains/imagen-pytorch), with the scale, shift and SiLU that its
blocks put after it; `normalize` is `torch.nn.functional.normalize`, with its eps of 1e-12. RMS normalisation: Zhang and
Sennrich, "Root Mean Square Layer Normalization", 2019.

A forward operator `channel_rms_norm_act_<backend>` returns y and rstd, (B, positions) in float32 (float64 for
float64): 4 bytes a position, beside which it would cost a pass over x to compute it again. The backward pass recomputes
t from x. With dt = dy * activation'(t), g = dt * weight * (1 + scale) and P = sum over the channels of g * xhat,

    dx = rstd * (g - xhat * P / C)      and without its second term where rstd = sqrt(C) / 1e-12, the clamp's constant

and with the sums over positions of every (sample, channel), S = sum dt and T = sum dt * xhat,

    dshift = S        dscale = weight * T        dweight = sum_B (1 + scale) * T
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .._autograd import register_autograd, run_operator
from ..backends import Backend, Op, dtypes
from ..layout import dense, dense_like
from ..reference.channel_rms_norm_act import channel_rms_norm_act as eager_channel_rms_norm_act
from . import _norms


class _Call(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    activation: str | None


def _check(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> _Call:
    _norms.check_x(x)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    _norms.check_per_channel("weight", weight, x, required=True)
    for name, parameter in (("scale", scale), ("shift", shift)):
        if parameter is not None:
            _norms.check_per_sample(name, parameter, x)
    _norms.check_activation(activation)
    return _Call(x, weight, scale, shift, activation)


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty((x.shape[0], math.prod(x.shape[2:])), dtype=_norms.accumulator(x))
    return x.new_empty_strided(x.shape, x.stride()), rstd


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    dx = x.new_empty_strided(x.shape, x.stride()) if needs & 1 else x.new_empty(0)
    return dx, *_norms.fake_gradients(x, (weight, scale, shift), needs >> 1)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, scale, shift, ctx.activation = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, rstd, weight, scale, shift)


def _register_autograd(backend: str) -> None:
    """The autograd formula of the operators of one backend."""
    backward = getattr(torch.ops.imagen_fast, f"channel_rms_norm_act_backward_{backend}").default

    def differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, rstd, weight, scale, shift = ctx.saved_tensors
        x, rstd = dense(x), rstd.contiguous()
        needed = ctx.needs_input_grad[:4]
        gradients = run_operator(
            backward, dense_like(dy, x), x, rstd, weight, scale, shift, ctx.activation, _norms.bits(needed)
        )
        return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None

    def no_second_derivative(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"channel_rms_norm_act has no second derivative on the {backend} backend; "
            'run its forward pass under imagen_fast.use_backend("eager"), which has'
        )

    operator, library = f"imagen_fast::channel_rms_norm_act_{backend}", _LIBRARY
    register_autograd(operator, differentiate, setup_context=_save_for_backward, lib=library)
    operator = f"imagen_fast::channel_rms_norm_act_backward_{backend}"
    torch.library.register_autograd(operator, no_second_derivative, lib=library)


def _define(backend: str) -> None:
    """The operators of a backend that a library implements."""
    _LIBRARY.define(
        f"channel_rms_norm_act_{backend}(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int activation) "
        "-> (Tensor y, Tensor rstd)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.define(
        f"channel_rms_norm_act_backward_{backend}(Tensor dy, Tensor x, Tensor rstd, Tensor weight, Tensor? scale, "
        "Tensor? shift, int activation, int needs) -> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(f"imagen_fast::channel_rms_norm_act_{backend}", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"imagen_fast::channel_rms_norm_act_backward_{backend}", _fake_backward, lib=_LIBRARY)
    _register_autograd(backend)


_define("cpu")
_define("cuda")
# For tests: how x is cut for the device; see csrc/channel_rms_norm_act/cuda.cu
_LIBRARY.define("_channel_rms_norm_act_cuda_plan(Tensor x, bool backward) -> int[]")


@_triton.once
def _define_triton() -> None:
    kernels = _triton.kernels("channel_rms_norm_act")
    _triton.define("channel_rms_norm_act_triton", kernels.forward, fake=_fake_forward)
    _triton.define("channel_rms_norm_act_backward_triton", kernels.backward, fake=_fake_backward)
    _register_autograd("triton")


def _run_eager(call: _Call) -> Tensor:
    x, weight, scale, shift, activation = call
    return eager_channel_rms_norm_act(x, weight, scale=scale, shift=shift, activation=activation)


def _arguments(call: _Call) -> tuple[Any, ...]:
    """A call as the operators take it."""
    x, weight, scale, shift, activation = call
    scale, shift = _norms.per_sample(scale, x), _norms.per_sample(shift, x)
    return dense(x), weight, scale, shift, _norms.ACTIVATION_CODES[activation]


def _run_cpu(call: _Call) -> Tensor:
    return run_operator(torch.ops.imagen_fast.channel_rms_norm_act_cpu.default, *_arguments(call))[0]


def _run_cuda(call: _Call) -> Tensor:
    return run_operator(torch.ops.imagen_fast.channel_rms_norm_act_cuda.default, *_arguments(call))[0]


def _run_triton(call: _Call) -> Tensor:
    _define_triton()
    return run_operator(torch.ops.imagen_fast.channel_rms_norm_act_triton.default, *_arguments(call))[0]


_OP = Op(
    "channel_rms_norm_act",
    _check,
    (
        Backend("eager", _run_eager),
        Backend("cpu", _run_cpu, (dtypes("x", torch.float16, torch.bfloat16, torch.float32, torch.float64),)),
        Backend("triton", _run_triton, (dtypes("x", torch.float16, torch.bfloat16, torch.float32),)),
        Backend("cuda", _run_cuda, (dtypes("x", torch.float16, torch.bfloat16, torch.float32),)),
    ),
    lambda call: _norms.notes(call.x),
)


def channel_rms_norm_act(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """`activation(normalize(x, dim=1) * sqrt(C) * weight * (1 + scale) + shift)`, fused.

    The norm and everything after it are in float32 (float64 for float64). As with `torch.nn.functional.normalize`, a
    vector shorter than 1e-12 is divided by 1e-12. Gradients flow to every tensor; the backward pass recomputes instead
    of storing activations and is deterministic. On the `eager` backend alone it can be differentiated twice.

    Under autocast x keeps its dtype and parameters are used as they are, whatever their dtypes.

    Args:
        x: (B, C, positions...) of rank 2 to 5, float16, bfloat16, float32 or float64. Dense NCHW and channels-last
            tensors are read in place; other strides are copied (`imagen_fast.explain` says so). B may be 0.
        weight: (C,). imagen-pytorch holds its `gamma` as (C, 1, 1): pass `gamma.flatten()`. Parameters may each have
            any dtype of 16 or 32 bits beside an x of 16 or 32 bits, and have float64 beside float64.
        scale, shift: (B, C) of any strides, or broadcastable to it, or None for 0.
        activation: "silu", "gelu" (exact, by erf), "gelu_tanh" or None.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: `ChanRMSNorm` and `Block` of lucidrains/imagen-pytorch, 2.0 and later; Zhang and Sennrich, "Root Mean Square
    Layer Normalization", 2019.

    Example:
        >>> scale, shift = block.time_mlp(embedding).chunk(2, dim=1)  # (B, C) each
        >>> h = ops.channel_rms_norm_act(x, block.norm.gamma.flatten(), scale=scale, shift=shift)
    """
    return _OP.run(_check(x, weight, scale=scale, shift=shift, activation=activation))
