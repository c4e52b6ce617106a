"""One step of any solver in plain PyTorch: guidance, x0, thresholding, update, noise (see `diffusion.step_table`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .guidance import DynamicThreshold, Guidance

if TYPE_CHECKING:
    from ..diffusion.step_table import StepTable


def sampler_step(
    sample: Tensor,
    output: Tensor,
    table: StepTable,
    index: int,
    *,
    unconditional_output: Tensor | None = None,
    guidance: float | Guidance = 1.0,
    threshold: str | DynamicThreshold | None = None,
    previous_x0: Tensor | None = None,
    noise: Tensor | None = None,
    return_x0: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The next sample and the x0 it was made from.

    Args:
        sample: (B, C, …), x_t.
        output: (B, C, …), or (B, 2C, …) with variance channels, the model's output with the text.
        table: the solver; index: its row.
        unconditional_output: the model's output without the text, for guidance.
        threshold: None, "static" (clip to ±1) or a `DynamicThreshold`.
        noise: like sample; needed where the row's noise_scale is not zero.

    Raises:
        ValueError: shapes that do not fit, noise missing, an unknown threshold.
        IndexError: index outside the table.
    """
    channels = sample.shape[1]
    _check_shapes(sample, output, unconditional_output, noise, table.learned_variance)
    row = table.row(index)
    prediction, variance = output[:, :channels], output[:, channels:]
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if unconditional_output is not None:
        prediction = _guided(prediction, unconditional_output[:, :channels], guidance)
    x0 = row["x0_from_sample"] * sample + row["x0_from_output"] * prediction
    if row["x0_from_noise"] and noise is not None:
        x0 = x0 + row["x0_from_noise"] * noise
    x0 = _thresholded(x0, threshold)
    following = row["next_from_sample"] * sample + row["next_from_x0"] * x0
    if row["next_from_output"]:
        following = following + row["next_from_output"] * prediction
    if row["next_from_previous_x0"]:
        if previous_x0 is None:
            raise ValueError(f"previous_x0 is needed: row {index} of this solver reads it")
        following = following + row["next_from_previous_x0"] * previous_x0
    if row["noise_scale"]:
        if noise is None:
            raise ValueError(f"noise is needed: row {index} of this solver adds noise")
        scale: float | Tensor = row["noise_scale"]
        if table.learned_variance:
            fraction = (variance + 1) / 2
            log_variance = fraction * row["max_log_variance"] + (1 - fraction) * row["min_log_variance"]
            scale = scale * torch.exp(0.5 * log_variance)
        following = following + scale * noise
    return following, x0


def _check_shapes(
    sample: Tensor, output: Tensor, unconditional_output: Tensor | None, noise: Tensor | None, learned_variance: bool
) -> None:
    batch, channels, *size = sample.shape
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"output must have {channels} or {2 * channels} channels, got {output.shape[1]}")
    if learned_variance and output.shape[1] == channels:
        raise ValueError(f"output must have {2 * channels} channels for a learned variance, got {channels}")
    for name, given in (("output", output), ("unconditional_output", unconditional_output)):
        if given is not None and given.shape != (batch, output.shape[1], *size):
            raise ValueError(f"{name} must be {(batch, output.shape[1], *size)}, got {tuple(given.shape)}")
    if noise is not None and noise.shape != sample.shape:
        raise ValueError(f"noise must be like sample, {tuple(sample.shape)}, got {tuple(noise.shape)}")


def _guided(conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
    difference = conditional - unconditional
    if guidance.remove_parallel:
        dims = tuple(range(1, conditional.ndim))
        overlap = (difference * conditional).sum(dims, keepdim=True)
        length = (conditional * conditional).sum(dims, keepdim=True).clamp_min(1e-24)
        difference = difference - overlap / length * conditional
        guided = conditional + (guidance.scale - 1) * difference
    else:
        guided = unconditional + guidance.scale * difference
    if guidance.rescale:
        dims = tuple(range(1, conditional.ndim))
        ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        guided = guidance.rescale * guided * ratio + (1 - guidance.rescale) * guided
    return guided


def _thresholded(x0: Tensor, threshold: str | DynamicThreshold | None) -> Tensor:
    if threshold is None:
        return x0
    if threshold == "static":
        return x0.clamp(-1, 1)
    if not isinstance(threshold, DynamicThreshold):
        raise ValueError(f"threshold must be None, 'static' or a DynamicThreshold, got {threshold!r}")
    # One sample at a time: torch.quantile takes at most 2^24 values.
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32))
    quantiles = [torch.quantile(sample.flatten().abs(), threshold.percentile) for sample in wide]
    s = torch.stack(quantiles).clamp(threshold.min_value, threshold.max_value) if quantiles else x0.new_ones(0)
    s = s.to(x0.dtype).view(-1, *([1] * (x0.ndim - 1)))
    return torch.maximum(torch.minimum(x0, s), -s) / s
