"""Noise schedules as alphas_cumprod (n,), and which of the n training timesteps a sampler visits.

alphas_cumprod[t] is ᾱ_t of q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I); index 0 is the cleanest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops._checks import is_integer, is_number, not_negative
from .if_timesteps import IF_TIMESTEPS, TRAINED_TIMESTEPS


def squaredcos_cap_v2(n: int, max_beta: float = 0.999) -> Tensor:
    """The cosine schedule of improved DDPM (arXiv 2102.09672, section 3.2) in the discretisation of diffusers.

    β_t = min(1 − ᾱ((t+1)/n) / ᾱ(t/n), max_beta) with ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2).

    Args:
        n: number of training timesteps, at least 1.
        max_beta: the cap on β, above 0 and at most 1.

    Returns:
        alphas_cumprod (n,) in float64.

    Raises:
        ValueError: n is not positive, or max_beta out of range.

    Example:
        >>> squaredcos_cap_v2(1000).shape
        torch.Size([1000])
    """
    _check_positive(n)
    if not 0 < max_beta <= 1:
        raise ValueError(f"max_beta must be above 0 and at most 1, got {max_beta}")

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((t + 1) / n) / alpha_bar(t / n), max_beta) for t in range(n)]
    return _cumulate(torch.tensor(betas, dtype=torch.float64))


def linear_betas(n: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tensor:
    """The linear schedule of DDPM (arXiv 2006.11239): β rises evenly from beta_start to beta_end.

    Returns:
        alphas_cumprod (n,) in float64.

    Raises:
        ValueError: n is not positive, or the betas are not 0 < beta_start <= beta_end < 1.
    """
    _check_positive(n)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    return _cumulate(torch.linspace(beta_start, beta_end, n, dtype=torch.float64))


def cosine(n: int, s: float = 0.008) -> Tensor:
    """The cosine schedule in continuous time, ᾱ(u) = cos²((u + s) / (1 + s) · π/2), at u = 1/n, 2/n, …, 1.

    As imagen-pytorch samples: a step from u = 1/n ends at `final_alpha_cumprod` ᾱ(0) = `cosine_start(s)`, and √ᾱ is at
    least 1e-8.

    Returns:
        alphas_cumprod (n,) in float64.

    Raises:
        ValueError: n is not positive, or s is negative.
    """
    _check_positive(n)
    not_negative("s", s)
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    return ((times + s) / (1 + s) * (math.pi / 2)).cos().square().clamp(min=1e-16)


def cosine_start(s: float = 0.008) -> float:
    """ᾱ(0) of `cosine`, where its last step ends. Raises ValueError if s is negative."""
    not_negative("s", s)
    return math.cos(s / (1 + s) * math.pi / 2) ** 2


def shift_log_snr(alphas_cumprod: Tensor, factor: float) -> Tensor:
    """A schedule with ln(ᾱ / (1 − ᾱ)) raised by 2 ln(factor), for pictures of another size.

    Noise of the same strength hides less of a larger picture: factor = 64 / size shifts the schedule of a model of 64²
    to one of size² (simple diffusion, arXiv 2301.11093, section 3.1).

    Returns:
        alphas_cumprod (n,) in float64.

    Raises:
        ValueError: factor is not positive.
    """
    check_alphas_cumprod(alphas_cumprod)
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    return torch.sigmoid(torch.logit(alphas_cumprod.double()) + 2 * math.log(factor))


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels evenly spaced in σ^(1/rho), falling from sigma_max to sigma_min (EDM, arXiv 2206.00364, equation 5).

    They begin and end at exactly these; a single one is sigma_max.

    Returns:
        (n,) in float64 on the CPU, where tables of steps are made.

    Raises:
        ValueError: n or rho is not positive, or not 0 < sigma_min <= sigma_max < infinity.
    """
    _check_positive(n)
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min <= sigma_max < infinity, got {sigma_min} and {sigma_max}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[-1], sigmas[0] = sigma_min, sigma_max  # which the powers round
    return sigmas


def relative_sigmas(alphas_cumprod: Tensor) -> np.ndarray:
    """(n,) float64: σ = √((1 − ᾱ) / ᾱ), the noise over the signal."""
    check_alphas_cumprod(alphas_cumprod)
    values = alphas_cumprod.detach().double().cpu().numpy()
    if not values.all():
        raise ValueError("alphas_cumprod must be above 0: a solver in noise levels has none for pure noise")
    return np.sqrt((1 - values) / values)


def check_alphas_cumprod(alphas_cumprod: Tensor) -> None:
    """Raise ValueError unless it is a tensor of shape (n,) with values from 0 to below 1."""
    if not isinstance(alphas_cumprod, Tensor) or alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 1:
        found = tuple(alphas_cumprod.shape) if isinstance(alphas_cumprod, Tensor) else type(alphas_cumprod).__name__
        raise ValueError(f"alphas_cumprod must be (n,), got {found}")
    if not ((alphas_cumprod >= 0) & (alphas_cumprod < 1)).all():
        raise ValueError("alphas_cumprod must be at least 0 and below 1 everywhere")


def spaced_timesteps(n: int, steps: int | str | Sequence[int], spacing: str = "leading", offset: int = 0) -> list[int]:
    """The timesteps a sampler visits, noisiest first.

    Args:
        n: number of training timesteps.
        steps: how many to visit; or the timesteps themselves, strictly falling; or the name of one of DeepFloyd IF's
            lists, such as "fast27" or "super40" (`IF_TIMESTEPS`).
        spacing: "leading" (0, n/steps, 2n/steps, …), "trailing" (…, n − 1) or "linspace" (0 … n − 1), as in diffusers.
        offset: a whole number, added to every timestep of "leading".

    Raises:
        TypeError: steps are none of these, or offset is no whole number.
        ValueError: steps outside [1, n], an unknown spacing or name, or timesteps (with the offset, or as given) that
            leave [0, n) or do not fall.
    """
    _check_positive(n)
    if isinstance(steps, str):
        steps = _named_timesteps(n, steps)
    given = given_timesteps(steps)
    if given is not None:
        if not all(is_number(t) and float(t).is_integer() for t in given):
            raise ValueError(f"steps must fall strictly, be whole numbers and lie in [0, {n}), got {given}")
        timesteps = [int(t) for t in given]
        falling = all(a > b for a, b in itertools.pairwise(timesteps))
        if not timesteps or not falling or timesteps[0] >= n or timesteps[-1] < 0:
            raise ValueError(f"steps must fall strictly, be whole numbers and lie in [0, {n}), got {given}")
        return timesteps
    steps = check_count(n, steps)
    if spacing == "leading":
        check_offset(n, (steps - 1) * (n // steps), offset)
        return [i * (n // steps) + offset for i in reversed(range(steps))]
    if spacing == "trailing":
        return [int(t) for t in trailing_timesteps(n, steps)]
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, n - 1, steps).round()[::-1]]
    raise ValueError(f"spacing must be 'leading', 'trailing' or 'linspace', got {spacing!r}")


def given_timesteps(steps: Any) -> list[Any] | None:
    """The timesteps that `steps` holds, as Python's numbers; None if it is how many. TypeError if it is neither."""
    if isinstance(steps, bool) or is_integer(steps):
        return None
    try:
        return [t.item() if isinstance(t, Tensor) and t.ndim == 0 else t for t in steps]
    except TypeError as error:
        raise TypeError(f"steps must be how many, the timesteps, or a list's name, got {steps!r}") from error


def check_count(n: int, steps: Any) -> int:
    """The number of timesteps; raises ValueError unless there are as many among n."""
    if isinstance(steps, bool) or not 1 <= steps <= n:
        raise ValueError(f"steps must be between 1 and {n}, got {steps}")
    return int(steps)


def check_offset(n: int, largest: int, offset: int) -> None:
    """Raise an error unless `offset` is an integer that keeps timesteps from 0 to `largest` in [0, n)."""
    if not is_integer(offset):
        raise TypeError(f"offset must be an integer, got {offset!r}")
    if not 0 <= offset < n - largest:
        raise ValueError(f"offset must keep the timesteps in [0, {n}), got {offset}")


def trailing_timesteps(n: int, steps: int) -> np.ndarray:
    """(steps,) float64: n − 1 and evenly down from it, rounded as diffusers' own arithmetic rounds halves."""
    return np.arange(n, 0, -(n / steps))[:steps].round() - 1  # a rounded step can leave room for one more


def _named_timesteps(n: int, name: str) -> Sequence[int]:
    if name not in IF_TIMESTEPS:
        raise ValueError(f"steps must be a number, timesteps, or one of {', '.join(IF_TIMESTEPS)}, got {name!r}")
    if n != TRAINED_TIMESTEPS:
        raise ValueError(f"steps {name!r} are {TRAINED_TIMESTEPS} training timesteps' own, the schedule has {n}")
    return IF_TIMESTEPS[name]


def _cumulate(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)


def _check_positive(n: int) -> None:
    if n < 1:
        raise ValueError(f"the number of training timesteps must be at least 1, got {n}")
