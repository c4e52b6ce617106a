"""Forward noising, the diffusion process in one step.

    x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) noise,    alpha = alphas_cumprod[t]

the closed form of q(x_t | x_0) (Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", 2020, equation 4): in
distribution the same as the single steps q(x_s | x_{s-1}) = N(sqrt(a_s) x_{s-1}, (1 - a_s) I) one after the other for
s = 0, ..., t, with a_s = alphas_cumprod[s] / alphas_cumprod[s - 1]. Training noises its pictures by it, and cascades
the low-resolution picture that they condition on (noise-conditioning augmentation).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .._autograd import register_autograd, run_operator
from ..backends import Backend, Op, dtypes
from ..layout import dense, is_dense
from ..reference.add_noise import add_noise as eager_add_noise
from . import _checks


class _Call(NamedTuple):
    x0: Tensor
    noise: Tensor
    alphas_cumprod: Tensor
    timesteps: Tensor  # (B,)


def _check(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor | int) -> _Call:
    _checks.floating("x0", x0)
    if not 2 <= x0.dim() <= 5:
        raise ValueError(f"x0 must have 2 to 5 dimensions (B, C, positions...), got shape {tuple(x0.shape)}")
    x0, noise = _checks.promoted(x0, "noise", noise)
    _checks.floating("noise", noise)
    if noise.dtype != x0.dtype:
        raise TypeError(f"noise must be {x0.dtype} as x0 is, got {noise.dtype}")
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    _checks.floating("alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dim() != 1 or alphas_cumprod.shape[0] == 0:
        raise ValueError(f"alphas_cumprod must have shape (n,), got {tuple(alphas_cumprod.shape)}")
    if not isinstance(timesteps, Tensor):
        timesteps = _checks.integer("timesteps", timesteps, minimum=0)
        if timesteps >= alphas_cumprod.shape[0]:
            raise ValueError(f"timesteps must be less than {alphas_cumprod.shape[0]}, got {timesteps}")
        timesteps = torch.full(x0.shape[:1], timesteps, dtype=torch.int64, device=x0.device)
    elif timesteps.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"timesteps must be int64 or int32, got {timesteps.dtype}")
    elif timesteps.dim() == 0:
        timesteps = timesteps.expand(x0.shape[0])
    elif timesteps.shape != x0.shape[:1]:
        raise ValueError(f"timesteps must have shape ({x0.shape[0]},) or (), got {tuple(timesteps.shape)}")
    for name, tensor in (("noise", noise), ("alphas_cumprod", alphas_cumprod), ("timesteps", timesteps)):
        if tensor.device != x0.device:
            raise ValueError(f"{name} must be on {x0.device}, where x0 is, got {tensor.device}")
    return _Call(x0, noise, alphas_cumprod, timesteps)


_LIBRARY = torch.library.Library("imagen_fast", "FRAGMENT")


def _fake(x0: Tensor, *_: Any) -> Tensor:
    return x0.new_empty_strided(x0.shape, x0.stride())


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x0, noise, alphas_cumprod, timesteps = inputs
    kept = (x0, noise) if alphas_cumprod.requires_grad else (None, None)
    ctx.save_for_backward(alphas_cumprod, timesteps, *kept)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x0 and noise are dy times a factor: the op itself, with nothing in the other tensor's place."""
    alphas_cumprod, timesteps, x0, noise = ctx.saved_tensors
    need_dx0, need_dnoise, need_dalphas, _ = ctx.needs_input_grad
    nothing = torch.zeros_like(dy)
    dx0 = eager_add_noise(dy, nothing, alphas_cumprod, timesteps) if need_dx0 else None
    dnoise = eager_add_noise(nothing, dy, alphas_cumprod, timesteps) if need_dnoise else None
    dalphas = None
    if need_dalphas:
        n = alphas_cumprod.shape[0]
        alpha = alphas_cumprod.double()[timesteps.clamp(0, n - 1)]
        # (Not by flatten, which has no rule for gradients that are taken in batches.)
        within = tuple(range(1, dy.dim()))
        along_x0, along_noise = ((dy.double() * tensor.double()).sum(within) for tensor in (x0, noise))
        by_sample = along_x0 / (2 * alpha.sqrt()) - along_noise / (2 * (1 - alpha).sqrt())
        # (Not by index_add, whose order is not fixed on a GPU.)
        taken = timesteps[:, None] == torch.arange(n, device=timesteps.device)
        dalphas = by_sample[:, None].where(taken, 0.0).sum(0).to(alphas_cumprod.dtype)
    return dx0, dnoise, dalphas, None


def _define(backend: str) -> Any:
    """The operator of a backend that a library implements."""
    name = f"add_noise_{backend}"
    _LIBRARY.define(
        f"{name}(Tensor x0, Tensor noise, Tensor alphas_cumprod, Tensor timesteps) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(f"imagen_fast::{name}", _fake, lib=_LIBRARY)
    register_autograd(f"imagen_fast::{name}", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY)
    return getattr(torch.ops.imagen_fast, name).default


_cpu = _define("cpu")
_cuda = _define("cuda")
# For tests: how the tensors are cut for the device; see csrc/add_noise/cuda.cu
_LIBRARY.define("_add_noise_cuda_plan(Tensor x0, Tensor noise) -> int[]")


@_triton.once
def _define_triton() -> None:
    _triton.define("add_noise_triton", _triton.kernels("add_noise").forward, fake=_fake)
    register_autograd("imagen_fast::add_noise_triton", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY)


def _arguments(call: _Call) -> tuple[Tensor, ...]:
    """A call as the operators of the libraries take it."""
    x0, noise, alphas_cumprod, timesteps = call
    return dense(x0), dense(noise), alphas_cumprod.double().contiguous(), timesteps.long().contiguous()


def _run_cpu(call: _Call) -> Tensor:
    y: Tensor = run_operator(_cpu, *_arguments(call))
    return y


def _run_cuda(call: _Call) -> Tensor:
    y: Tensor = run_operator(_cuda, *_arguments(call))
    return y


def _run_triton(call: _Call) -> Tensor:
    _define_triton()
    x0, noise, alphas_cumprod, timesteps = call
    y: Tensor = run_operator(
        torch.ops.imagen_fast.add_noise_triton.default, dense(x0), dense(noise), alphas_cumprod, timesteps
    )
    return y


def _notes(call: _Call) -> list[str]:
    return [
        f"{name} will be copied: its strides are neither dense NCHW nor dense NHWC"
        for name, tensor in (("x0", call.x0), ("noise", call.noise))
        if not is_dense(tensor)
    ]


_OP = Op(
    "add_noise",
    _check,
    (
        Backend("eager", lambda call: eager_add_noise(*call)),
        Backend("cpu", _run_cpu, (dtypes("x0", torch.float16, torch.bfloat16, torch.float32, torch.float64),)),
        Backend("triton", _run_triton, (dtypes("x0", torch.float16, torch.bfloat16, torch.float32),)),
        Backend("cuda", _run_cuda, (dtypes("x0", torch.float16, torch.bfloat16, torch.float32),)),
    ),
    _notes,
)


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor | int) -> Tensor:
    """`sqrt(alpha) * x0 + sqrt(1 - alpha) * noise` with `alpha = alphas_cumprod[timesteps]` for each sample.

    The roots are taken in float64, the sum in float32 (float64 for float64), rounded once. Gradients flow to x0,
    noise and alphas_cumprod. Under autocast x0 and noise of different dtypes are cast to the wider one, as by the sum.

    Args:
        x0: (B, C, positions...) of rank 2 to 5, float16, bfloat16, float32 or float64. Dense NCHW and channels-last
            tensors are read in place; other strides are copied (`imagen_fast.explain` says so). B may be 0.
        noise: like x0, in any layout.
        alphas_cumprod: (n,) in any floating dtype, see `imagen_fast.diffusion.squaredcos_cap_v2`.
        timesteps: (B,) in int64 or int32, or one for all: a 0-d tensor or an int. A tensor's values are not read back
            to be checked: a sample whose timestep is outside of [0, n) becomes NaN.

    Returns:
        A tensor of x0's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", 2020, equation 4.

    Example:
        >>> t = torch.randint(1000, (x0.shape[0],))
        >>> x_t = ops.add_noise(x0, torch.randn_like(x0), squaredcos_cap_v2(1000), t)
    """
    return _OP.run(_check(x0, noise, alphas_cumprod, timesteps))
