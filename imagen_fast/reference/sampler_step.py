"""One step of any solver in plain PyTorch; `imagen_fast.ops.sampler_step` explains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import dense, dense_like
from .abs_quantile import abs_quantile
from .guidance import DynamicThreshold, Guidance
from .philox import normals

if TYPE_CHECKING:
    from ..diffusion.step_table import StepTable

# A coefficient: a Python number, or a 0-d tensor where the row is chosen by one
_Number = float | Tensor


def sampler_step(
    sample: Tensor,
    output: Tensor,
    table: StepTable,
    index: int | Tensor,
    *,
    unconditional_output: Tensor | None = None,
    guidance: float | Guidance = 1.0,
    threshold: str | DynamicThreshold | None = None,
    previous_x0: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    return_x0: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The next sample and the x0 it was made from, in sample's dtype and layout.

    Arguments as for `imagen_fast.ops.sampler_step`, a seed as (B,) int64; x0 is always returned. Everything is in
    float32 (float64 for float64) and rounded once, at the end.

    Raises:
        ValueError: shapes that do not fit, noise missing, an unknown threshold.
        IndexError: an int index outside the table.
    """
    _check_shapes(sample, output, unconditional_output, noise, table.learned_variance)
    sample = dense(sample)
    channels = sample.shape[1]
    row = _row_at(table, index) if isinstance(index, Tensor) else table.row(index)
    x, prediction, variance = _wide(sample), _wide(output[:, :channels]), _wide(output[:, channels:])
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if unconditional_output is not None:
        prediction = _guided(prediction, _wide(unconditional_output[:, :channels]), guidance)
    if noise is not None:
        noise = _wide(noise)
    elif seed is not None:
        noise = normals(seed, sample[0].numel() if len(sample) else 0, index).to(x.dtype).view(sample.shape)

    x0 = _sum((row["x0_from_sample"], x), (row["x0_from_output"], prediction), (row["x0_from_noise"], noise))
    x0 = _thresholded(x0, threshold)
    if noise is not None and table.learned_variance:
        share = (variance[:, :channels] + 1) / 2
        noise = noise * torch.exp(0.5 * (share * row["max_log_variance"] + (1 - share) * row["min_log_variance"]))
    following = _sum(
        (row["next_from_sample"], x),
        (row["next_from_output"], prediction),
        (row["next_from_x0"], x0),
        (row["next_from_previous_x0"], None if previous_x0 is None else _wide(previous_x0)),
        (row["noise_scale"], noise),
    )
    return dense_like(following.to(sample.dtype), sample), dense_like(x0.to(sample.dtype), sample)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _row_at(table: StepTable, index: Tensor) -> dict[str, _Number]:
    """The row that a 0-d tensor names, without reading it back; NaN where there is none."""
    rows = table.on(index.device)
    row = rows.index_select(0, index.reshape(1).clamp(0, len(rows) - 1))[0]
    row = torch.where((index >= 0) & (index < len(rows)), row, torch.nan)
    return dict(zip(table.row(0), row.unbind(), strict=True))


def _sum(*terms: tuple[_Number, Tensor | None]) -> Tensor:
    """Of coefficient · tensor; where a coefficient is 0 the tensor does not matter, or may be missing."""
    total: Tensor | None = None
    like = next(x for _, x in terms if x is not None)
    for coefficient, x in terms:
        if isinstance(coefficient, Tensor):
            if x is None:
                continue
            term = torch.where(coefficient != 0, coefficient.to(x.dtype) * x, 0.0)
        elif coefficient == 0:
            continue
        elif x is None:
            raise ValueError("noise is needed, or previous_x0: this row of the solver uses it")
        else:
            term = coefficient * x
        total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total


def _check_shapes(
    sample: Tensor, output: Tensor, unconditional_output: Tensor | None, noise: Tensor | None, learned_variance: bool
) -> None:
    batch, channels, *size = sample.shape
    if output.shape[1] < channels:
        raise ValueError(f"output must have at least {channels} channels, got {output.shape[1]}")
    if learned_variance and output.shape[1] != 2 * channels:
        raise ValueError(f"output must have {2 * channels} channels for a learned variance, got {output.shape[1]}")
    for name, given in (("output", output), ("unconditional_output", unconditional_output)):
        if given is None:
            continue
        enough = given.shape[1] in (channels, 2 * channels) if learned_variance else given.shape[1] >= channels
        if not enough or (*given.shape[:1], *given.shape[2:]) != (batch, *size):
            more = "twice the channels" if learned_variance else "more channels"
            raise ValueError(f"{name} must be {(batch, channels, *size)} or have {more}, got {tuple(given.shape)}")
    if noise is not None and noise.shape != sample.shape:
        raise ValueError(f"noise must be like sample, {tuple(sample.shape)}, got {tuple(noise.shape)}")


def _guided(conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
    difference, scale = conditional - unconditional, float(guidance.scale)
    dims = tuple(range(1, conditional.ndim))
    if guidance.remove_parallel:
        wide = conditional.double()
        overlap = (difference.double() * wide).sum(dims, keepdim=True)
        length = (wide * wide).sum(dims, keepdim=True).clamp_min(1e-24)
        difference = difference - (overlap / length).to(difference.dtype) * conditional
        guided = conditional + (scale - 1) * difference
    else:
        guided = unconditional + scale * difference
    if guidance.rescale:
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
    if not x0.numel():
        return x0
    if threshold.max_value is not None and threshold.max_value <= threshold.min_value:
        # Whatever the quantile is; but a NaN still takes the whole sample.
        nan = torch.where(x0.isnan(), x0, 0.0).flatten(1).sum(1)
        s = torch.full_like(nan, threshold.min_value) + nan
    else:
        s = abs_quantile(x0, threshold.percentile).clamp(threshold.min_value, threshold.max_value)
    s = s.to(x0.dtype).view(-1, *([1] * (x0.ndim - 1)))
    return torch.maximum(torch.minimum(x0, s), -s) / s
