"""imagen-pytorch's samplers on `ops.sampler_step` and `ops.abs_quantile`, and its two guidance forwards in one.

These are methods of whole models, which keep their class: each is an attribute of the instance (`FusedMethod`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from imagen_pytorch.elucidated_imagen import ElucidatedImagen
from imagen_pytorch.imagen_pytorch import GaussianDiffusionContinuousTimes, Imagen, Unet
from torch import Tensor

from .. import ops
from ..diffusion import DynamicThreshold, Guidance, StepTable
from ..diffusion.coefficients import empty_row, x0_coefficients
from ._calls import Constant
from ._fused import FusedMethod, is_plain

_SMALLEST_VARIANCE = 1e-20  # the library clamps here before taking the logarithm
_SMALLEST_ALPHA = 1e-8  # and here before dividing by it
_PREDICTIONS = {"noise": "epsilon", "v": "v", "x_start": "x0"}


# ---- Guidance


class _OneHalfDropped(Constant):
    """Takes the place of `cond_drop_prob` in a batch whose second half is to be without its text.

    The library asks `1 - cond_drop_prob` whether it is 1 or 0, and otherwise compares uniform numbers with it.
    """

    def __rsub__(self, one: float) -> _OneHalfDropped:
        return self

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        uniform = args[0] if isinstance(args[0], Tensor) else args[1]
        return torch.arange(len(uniform), device=uniform.device) < len(uniform) // 2


class FusedGuidance(FusedMethod):
    """`Unet.forward_with_cond_scale`: with and without the text in one forward of twice the batch.

    Outside of training and without gradients; else in two, as the library does.
    """

    original = Unet
    method = "forward_with_cond_scale"
    ops = ()
    subclasses = True  # it calls their forward

    def __call__(self, *args: Any, cond_scale: float = 1.0, **kwargs: Any) -> Tensor:
        guidance = {name: kwargs.pop(name) for name in _GUIDANCE_ARGUMENTS if name in kwargs}
        outputs = None if cond_scale == 1 else self.outputs(*args, **kwargs)
        if outputs is None:
            method = type(self.owner).forward_with_cond_scale
            return method(self.owner, *args, cond_scale=cond_scale, **guidance, **kwargs)
        logits, null_logits = outputs
        if not _HAS_PROJECTION:
            return null_logits + (logits - null_logits) * cond_scale
        update = logits - null_logits
        if guidance.get("remove_parallel_component", True):
            update = _without_parallel(update, logits, guidance.get("keep_parallel_frac", 0.0))
        return logits + update * (cond_scale - 1)

    def outputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """The outputs with the text and without; None where two calls are needed."""
        unet = self.owner
        tensors = [value for value in (*args, *kwargs.values()) if value is not None]
        if unet.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not unet.cond_on_text or kwargs.get("text_embeds") is None or "cond_drop_prob" in kwargs:
            return None
        if not all(isinstance(value, Tensor) and is_plain(value) for value in tensors):
            return None
        batch = len(tensors[0])
        if any(value.dim() == 0 or len(value) != batch for value in tensors):
            return None

        def twice(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value, value])

        # The uniform numbers that nobody needs are not to move the caller's generator.
        device = tensors[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            both = unet.forward(
                *map(twice, args),
                cond_drop_prob=_OneHalfDropped(),
                **{name: twice(value) for name, value in kwargs.items()},
            )
        return both[:batch], both[batch:]


_GUIDANCE_ARGUMENTS = ("remove_parallel_component", "keep_parallel_frac")
_HAS_PROJECTION = _GUIDANCE_ARGUMENTS[0] in Unet.forward_with_cond_scale.__code__.co_varnames  # since 2.1


def _without_parallel(update: Tensor, logits: Tensor, kept: float) -> Tensor:
    """The update less (1 - kept) of its part along the logits of the same sample; in float64, as the library does."""
    flat, along = update.flatten(1).double(), torch.nn.functional.normalize(logits.flatten(1).double(), dim=-1)
    parallel = (flat * along).sum(-1, keepdim=True) * along
    return (flat - (1 - kept) * parallel).to(update.dtype).view_as(update)


# ---- Imagen's sampler


# What `p_sample` hands to the U-Net, and the name that it has there
_UNET_ARGUMENTS = {name: name for name in ("text_embeds", "text_mask", "cond_images", "lowres_cond_img", "self_cond")}
_RENAMED = {
    "cfg_remove_parallel_component": "remove_parallel_component",
    "cfg_keep_parallel_frac": "keep_parallel_frac",
}
_NOT_FOR_PICTURES = ("cond_video_frames", "post_cond_video_frames")


# What the library calls for a step, and this does not
_SOLVER = ("predict_start_from_noise", "predict_start_from_v", "q_posterior")


def _has_own(owner: Any, library: type, methods: tuple[str, ...]) -> bool:
    """Whether an object or its class has other methods than the library's class."""
    return any(name in vars(owner) or getattr(type(owner), name) is not getattr(library, name) for name in methods)


@lru_cache(maxsize=4096)
def _one_step(log_snr: float, log_snr_next: float, last: bool, prediction: Any) -> StepTable:
    """A step of `GaussianDiffusionContinuousTimes`: its posterior, written out in float64.

    In terms of log-SNR λ, α² = sigmoid(λ), σ² = sigmoid(−λ) and c = 1 − exp(λ − λ'),
    next = α' ((1 − c) x / α + c x0) + σ' √c z.
    """

    def alpha_sigma(value: float) -> tuple[float, float]:
        small = math.exp(-abs(value))
        larger, smaller = math.sqrt(1 / (1 + small)), math.sqrt(small / (1 + small))
        return (larger, smaller) if value > 0 else (smaller, larger)

    (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(log_snr), alpha_sigma(log_snr_next)
    c = -math.expm1(log_snr - log_snr_next)
    row = empty_row(log_snr, sigma / alpha if alpha else math.inf)
    row["x0_from_sample"], row["x0_from_output"] = x0_coefficients(
        prediction, max(alpha, _SMALLEST_ALPHA) if prediction == "epsilon" else alpha, sigma
    )
    row["next_from_sample"] = alpha_next * (1 - c) / alpha
    row["next_from_x0"] = alpha_next * c
    row["noise_scale"] = 0.0 if last else math.sqrt(max(sigma_next**2 * c, _SMALLEST_VARIANCE))
    return StepTable.of_rows([row])


class FusedSample(FusedMethod):
    """`Imagen.p_sample`: guidance, x0, threshold, update and noise in one op, with the noise that the library draws."""

    original = Imagen
    method = "p_sample"
    ops = ("sampler_step",)
    subclasses = True
    _times: tuple[Tensor, int, Tensor] | None = None  # all times of a sampling, their version, and they on the CPU

    @classmethod
    def why_left(cls, owner: Any) -> str | None:
        if owner.is_video:
            return "it samples videos"
        if _has_own(owner, Imagen, ("p_mean_variance",)):
            return "it has a p_mean_variance of its own"
        return None

    @torch.no_grad()
    def __call__(self, unet: Any, x: Tensor, t: Any, *, noise_scheduler: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        table = self._table(x, t, noise_scheduler, kwargs)
        if table is None:
            method = type(self.owner).p_sample
            return method(self.owner, unet, x, t, noise_scheduler=noise_scheduler, **kwargs)
        output, unconditional_output, guidance = self._outputs(unet, x, noise_scheduler.get_condition(t), kwargs)
        percentile = float(self.owner.dynamic_thresholding_percentile)
        following, x0 = ops.sampler_step(
            x,
            output,
            table,
            0,
            unconditional_output=unconditional_output,
            guidance=guidance,
            threshold=DynamicThreshold(percentile) if kwargs.get("dynamic_threshold", True) else "static",
            noise=torch.randn_like(x),
            return_x0=True,
        )
        assert x0 is not None
        return following, x0

    def _table(self, x: Tensor, t: Any, noise_scheduler: Any, kwargs: dict[str, Any]) -> StepTable | None:
        """The solver of this one step; None where the library has to make it."""
        t_next = kwargs.get("t_next")
        if not (isinstance(t, Tensor) and isinstance(t_next, Tensor)):
            return None
        if type(noise_scheduler) is not GaussianDiffusionContinuousTimes or not is_plain(x) or 0 in x.shape:
            return None
        if _has_own(self.owner, Imagen, ("p_mean_variance",)):
            return None
        if _has_own(noise_scheduler, GaussianDiffusionContinuousTimes, _SOLVER):
            return None
        if any(kwargs.get(name) is not None for name in _NOT_FOR_PICTURES):
            return None
        prediction = _PREDICTIONS.get(kwargs.get("pred_objective", "noise"))
        t, t_next = self._on_host(t), self._on_host(t_next)
        times, times_next = t.tolist(), t_next.tolist()
        if prediction is None or len(set(times)) != 1 or len(set(times_next)) != 1:
            return None
        log_snr, log_snr_next = (noise_scheduler.log_snr(value[:1]).item() for value in (t, t_next))
        return _one_step(log_snr, log_snr_next, times_next[0] == 0, prediction)

    def _on_host(self, t: Tensor) -> Tensor:
        """The same times, on the CPU. The library makes all of a sampling at once, and `t` is a view of them: a device
        is waited for at the first step alone."""
        every = t._base
        if every is None or every.is_inference() or not every.is_contiguous():
            return t.cpu()
        known = self._times
        if known is None or known[0] is not every or known[1] != every._version:
            known = self._times = (every, every._version, every.cpu())
        return known[2].as_strided(t.shape, t.stride(), t.storage_offset() - every.storage_offset())

    def _outputs(
        self, unet: Any, x: Tensor, condition: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The U-Net's output, the one without the text where the op is to guide, and how."""
        owner, scale = self.owner, kwargs.get("cond_scale", 1.0)
        if scale != 1.0 and not owner.can_classifier_guidance:
            raise AssertionError(
                "imagen was not trained with conditional dropout, and thus one cannot use classifier free guidance "
                "(cond_scale anything other than 1)"
            )
        given = {name: kwargs.get(name) for name in _UNET_ARGUMENTS}
        given["lowres_noise_times"] = owner.lowres_noise_schedule.get_condition(kwargs.get("lowres_noise_times"))
        kept = kwargs.get("cfg_keep_parallel_frac", 0.0)
        method = vars(unet).get("forward_with_cond_scale")
        if isinstance(method, FusedGuidance) and scale != 1 and kept == 0:
            outputs = method.outputs(x, condition, **given)
            if outputs is not None:
                removes = _HAS_PROJECTION and bool(kwargs.get("cfg_remove_parallel_component", True))
                return *outputs, Guidance(float(scale), remove_parallel=removes)
        how = {name: kwargs[key] for key, name in _RENAMED.items() if key in kwargs}
        return unet.forward_with_cond_scale(x, condition, cond_scale=scale, **how, **given), None, 1.0


# ---- ElucidatedImagen's threshold


class FusedThreshold(FusedMethod):
    """`ElucidatedImagen.threshold_x_start`, with the exact quantile by selection instead of by sorting."""

    original = ElucidatedImagen
    method = "threshold_x_start"
    ops = ("abs_quantile",)
    subclasses = True

    def __call__(self, x_start: Tensor, dynamic_threshold: bool = True) -> Tensor:
        if not dynamic_threshold or not is_plain(x_start) or 0 in x_start.shape:
            return type(self.owner).threshold_x_start(self.owner, x_start, dynamic_threshold)
        s = ops.abs_quantile(x_start, float(self.owner.dynamic_thresholding_percentile)).clamp(min=1.0)
        s = s.to(x_start.dtype).view(-1, *(1,) * (x_start.dim() - 1))
        return x_start.clamp(-s, s) / s
