"""Group normalisation, a per-sample scale and shift, and an activation, in one pass over memory.

    xhat = (x - mean) / sqrt(var + eps)         mean and var over the channels of a group and all positions
    t    = (xhat * weight + bias) * (1 + scale) + shift
    y    = activation(t)

Group normalisation: Wu and He, "Group Normalization", 2018. Its scale-shift form: Dhariwal and Nichol, "Diffusion
Models Beat GANs on Image Synthesis", 2021, section 3; used by Imagen (SiLU) and DeepFloyd IF (GELU) before every
convolution.

The backward pass recomputes t from x. With dt = dy * activation'(t) and the sums over positions of every (sample,
channel), S = sum dt and T = sum dt * xhat, the parameters' gradients are

    dshift  = S                         dscale = weight * T + bias * S
    dweight = sum_B (1 + scale) * T     dbias  = sum_B (1 + scale) * S
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .._autograd import register_autograd, run_operator
from ..backends import Backend, Op, dtypes
from ..layout import dense, dense_like
from ..reference.group_norm_act import group_norm_act as eager_group_norm_act
from . import _checks, _norms


class _Call(NamedTuple):
    x: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    activation: str | None
    eps: float


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    eps: float = 1e-5,
) -> _Call:
    _norms.check_x(x)
    channels = x.shape[1]
    num_groups = _checks.integer("num_groups", num_groups, minimum=1)
    if channels == 0 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _norms.check_per_channel(name, parameter, x)
    for name, parameter in (("scale", scale), ("shift", shift)):
        if parameter is not None:
            _norms.check_per_sample(name, parameter, x)
    _norms.check_activation(activation)
    eps = _checks.not_negative("eps", eps)
    return _Call(x, num_groups, weight, bias, scale, shift, activation, eps)


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=_norms.accumulator(x)) for _ in range(2))
    return x.new_empty_strided(x.shape, x.stride()), mean, rstd


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    dx = x.new_empty_strided(x.shape, x.stride()) if needs & 1 else x.new_empty(0)
    return dx, *_norms.fake_gradients(x, (weight, bias, scale, shift), needs >> 1)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, scale, shift, ctx.activation, _ = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, weight, bias, scale, shift, *statistics)


def _register_autograd(backend: str) -> None:
    """The autograd formula of the operators of one backend."""
    backward = getattr(torch.ops.imagen_fast, f"group_norm_act_backward_{backend}").default

    def differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, *statistics = ctx.saved_tensors
        x, statistics = dense(x), [statistic.contiguous() for statistic in statistics]
        need_x, _, *need_parameters = ctx.needs_input_grad[:6]
        needed = (need_x, *need_parameters)
        parameters = (weight, bias, scale, shift)
        settings = (ctx.num_groups, *parameters, ctx.activation, _norms.bits(needed))
        gradients = run_operator(backward, dense_like(dy, x), x, *statistics, *settings)
        dx, *rest = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
        return dx, None, *rest, None, None

    def no_second_derivative(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"group_norm_act has no second derivative on the {backend} backend; "
            'run its forward pass under imagen_fast.use_backend("eager"), which has'
        )

    operator, library = f"imagen_fast::group_norm_act_{backend}", _LIBRARY
    register_autograd(operator, differentiate, setup_context=_save_for_backward, lib=library)
    operator = f"imagen_fast::group_norm_act_backward_{backend}"
    torch.library.register_autograd(operator, no_second_derivative, lib=library)


def _define(backend: str) -> None:
    """The operators of a backend that a library implements."""
    _LIBRARY.define(
        f"group_norm_act_{backend}(Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, "
        "Tensor? shift, int activation, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.define(
        f"group_norm_act_backward_{backend}(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int num_groups, "
        "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int activation, int needs) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(f"imagen_fast::group_norm_act_{backend}", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"imagen_fast::group_norm_act_backward_{backend}", _fake_backward, lib=_LIBRARY)
    _register_autograd(backend)


_define("cpu")
_define("cuda")
# For tests: how x is cut for the device; see csrc/group_norm_act/cuda.cu
_LIBRARY.define("_group_norm_act_cuda_plan(Tensor x, int num_groups, bool backward) -> int[]")


@_triton.once
def _define_triton() -> None:
    """The operators of Triton's backend, whose mean is two numbers: rounded, and what the rounding lost."""

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        y, mean, rstd = _fake_forward(*arguments)
        return y, mean, torch.empty_like(mean), rstd

    def fake_backward(dy: Tensor, x: Tensor, mean: Tensor, mean_error: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return _fake_backward(dy, x, mean, *rest)

    kernels = _triton.kernels("group_norm_act")
    _triton.define("group_norm_act_triton", kernels.forward, fake=fake_forward)
    _triton.define("group_norm_act_backward_triton", kernels.backward, fake=fake_backward)
    _register_autograd("triton")


def _run_eager(call: _Call) -> Tensor:
    x, num_groups, weight, bias, scale, shift, activation, eps = call
    return eager_group_norm_act(x, num_groups, weight, bias, scale=scale, shift=shift, activation=activation, eps=eps)


def _arguments(call: _Call) -> tuple[Any, ...]:
    """A call as the operators take it."""
    x, num_groups, weight, bias, scale, shift, activation, eps = call
    scale, shift = _norms.per_sample(scale, x), _norms.per_sample(shift, x)
    return dense(x), num_groups, weight, bias, scale, shift, _norms.ACTIVATION_CODES[activation], eps


def _run_cpu(call: _Call) -> Tensor:
    return run_operator(torch.ops.imagen_fast.group_norm_act_cpu.default, *_arguments(call))[0]


def _run_cuda(call: _Call) -> Tensor:
    return run_operator(torch.ops.imagen_fast.group_norm_act_cuda.default, *_arguments(call))[0]


def _run_triton(call: _Call) -> Tensor:
    _define_triton()
    return run_operator(torch.ops.imagen_fast.group_norm_act_triton.default, *_arguments(call))[0]


_OP = Op(
    "group_norm_act",
    _check,
    (
        Backend("eager", _run_eager),
        Backend("cpu", _run_cpu, (dtypes("x", torch.float16, torch.bfloat16, torch.float32, torch.float64),)),
        Backend("triton", _run_triton, (dtypes("x", torch.float16, torch.bfloat16, torch.float32),)),
        Backend("cuda", _run_cuda, (dtypes("x", torch.float16, torch.bfloat16, torch.float32),)),
    ),
    lambda call: _norms.notes(call.x),
)


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    eps: float = 1e-5,
) -> Tensor:
    """`activation(group_norm(x) * (1 + scale) + shift)`, fused.

    Statistics and everything after them are in float32 (float64 for float64), with the variance from centred values, so
    that a large mean costs no accuracy. Gradients flow to every tensor; the backward pass recomputes instead of storing
    activations and is deterministic. On the `eager` backend alone it can be differentiated twice.

    Under autocast x keeps its dtype and parameters are used as they are, whatever their dtypes.

    Args:
        x: (B, C, positions...) of rank 2 to 5, float16, bfloat16, float32 or float64. Dense NCHW and channels-last
            tensors are read in place; other strides are copied (`imagen_fast.explain` says so). B may be 0.
        num_groups: the number of groups; it divides C.
        weight, bias: (C,), or None for 1 and 0. Parameters may each have any dtype of 16 or 32 bits beside an x of 16
            or 32 bits, and have float64 beside float64.
        scale, shift: (B, C) of any strides, or broadcastable to it, or None for 0.
        activation: "silu", "gelu" (exact, by erf), "gelu_tanh" or None.
        eps: added to the variance; not negative.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: Wu and He, "Group Normalization", 2018; scale and shift as in Dhariwal and Nichol, "Diffusion Models Beat
    GANs on Image Synthesis", 2021; SiLU as in Imagen (Saharia et al., 2022), GELU as in DeepFloyd IF.

    Example:
        >>> scale, shift = time_projection(embedding).chunk(2, dim=1)  # (B, C) each
        >>> h = ops.group_norm_act(x, 32, norm.weight, norm.bias, scale=scale, shift=shift)
    """
    return _OP.run(_check(x, num_groups, weight, bias, scale=scale, shift=shift, activation=activation, eps=eps))
