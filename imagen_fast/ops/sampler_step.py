"""One step of any diffusion solver: guidance, the prediction of x0, thresholding, the update and its noise, in one.

With x the sample, g the guided output, y the x0 of the step before and z noise, and the coefficients those of one row
of a `StepTable`,

    g    = unconditional + scale * (conditional - unconditional)
    x0   = threshold(x0_from_sample x + x0_from_output g + x0_from_noise z)
    next = next_from_sample x + next_from_output g + next_from_x0 x0 + next_from_previous_x0 y + noise_scale v z

where v is 1 or, with a learned variance, exp(logvar / 2), with logvar between min_log_variance and max_log_variance
where the variance channels of the (conditional) output place it in [-1, 1] (Nichol and Dhariwal, "Improved Denoising
Diffusion Probabilistic Models", 2021, equation 15). A term whose coefficient is 0 is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, Op, dtypes, no_gradient, run_operator
from ..layout import dense, has_one_position_stride, is_dense
from ..reference.guidance import DynamicThreshold, Guidance
from ..reference.sampler_step import sampler_step as eager_sampler_step
from . import _checks
from ._sampler_step_operators import define_triton, operator

if TYPE_CHECKING:
    from ..diffusion.step_table import StepTable

_NO_GUIDANCE = Guidance()


class _Call(NamedTuple):
    sample: Tensor
    output: Tensor
    table: StepTable
    row: int | Tensor
    unconditional_output: Tensor | None
    guidance: Guidance
    threshold: str | DynamicThreshold | None
    previous_x0: Tensor | None
    noise: Tensor | None
    seed: Tensor | None
    write_x0: bool


def _check(
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
    seed: int | Tensor | None = None,
    return_x0: bool | None = None,
) -> _Call:
    _checks.floating("sample", sample)
    if not 2 <= sample.dim() <= 5:
        raise ValueError(f"sample must have 2 to 5 dimensions (B, C, positions...), got shape {tuple(sample.shape)}")
    _check_table(table)
    _check_output("output", output, sample, table, required=True)
    if table.learned_variance and output.shape[1] != 2 * sample.shape[1]:
        raise ValueError(
            f"output must have {2 * sample.shape[1]} channels, twice sample's, for this table's learned variance, "
            f"got {output.shape[1]}"
        )
    if unconditional_output is not None:
        _check_output("unconditional_output", unconditional_output, sample, table)
    index = _check_index(index, table, sample)
    guidance = _check_guidance(guidance)
    _check_threshold(threshold)
    if previous_x0 is not None:
        _check_like("previous_x0", previous_x0, sample)
    elif table.uses("next_from_previous_x0"):
        raise ValueError("previous_x0 is needed: this table's solver uses the x0 of the step before")
    seed = _check_noise(noise, seed, table, index, sample)
    if return_x0 is None:
        return_x0 = _next_row_uses_x0(table, index)
    elif not isinstance(return_x0, bool):
        raise TypeError(f"return_x0 must be True, False or None, got {return_x0!r}")
    return _Call(
        sample, output, table, index, unconditional_output, guidance, threshold, previous_x0, noise, seed, return_x0
    )


def _check_table(table: StepTable) -> None:
    if not hasattr(table, "needs_x0"):  # by what it has: the module that defines it lies above this one
        raise TypeError(f"table must be a StepTable, got {type(table).__name__}")


def _check_output(name: str, output: Tensor, sample: Tensor, table: StepTable, *, required: bool = False) -> None:
    _checks.parameter(name, output, sample, "sample", required=required)
    shape, wanted = output.shape, sample.shape
    alike = len(shape) == len(wanted) and shape[:1] + shape[2:] == wanted[:1] + wanted[2:]
    learned = table.learned_variance
    if not alike or not (shape[1] in (wanted[1], 2 * wanted[1]) if learned else shape[1] >= wanted[1]):
        channels = "twice the channels" if learned else "more channels"
        raise ValueError(f"{name} must have shape {tuple(wanted)}, as sample, or {channels}, got {tuple(shape)}")


def _check_like(name: str, tensor: Tensor, sample: Tensor) -> None:
    _checks.parameter(name, tensor, sample, "sample")
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} must have shape {tuple(sample.shape)}, as sample, got {tuple(tensor.shape)}")


def _check_guidance(guidance: float | Guidance) -> Guidance:
    if isinstance(guidance, Guidance):
        return guidance
    if not _checks.is_number(guidance):
        raise TypeError(f"guidance must be a number or a Guidance, got {guidance!r}")
    return _NO_GUIDANCE if guidance == 1.0 else Guidance(float(guidance))


def _check_threshold(threshold: str | DynamicThreshold | None) -> None:
    if threshold is None or isinstance(threshold, DynamicThreshold):
        return
    if not isinstance(threshold, str) or threshold != "static":
        raise ValueError(f"threshold must be None, 'static' or a DynamicThreshold, got {threshold!r}")


def _check_index(index: int | Tensor, table: StepTable, sample: Tensor) -> int | Tensor:
    if isinstance(index, Tensor):
        if index.dim() != 0:
            raise ValueError(f"index must be an int or a 0-d tensor, got shape {tuple(index.shape)}")
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must be int64 or int32, got {index.dtype}")
        if index.device != sample.device:
            raise ValueError(f"index must be on {sample.device}, where sample is, got {index.device}")
        return index
    if not _checks.is_integer(index):
        raise TypeError(f"index must be an int or a 0-d tensor, got {index!r}")
    if not 0 <= index < len(table):
        raise IndexError(f"index must be between 0 and {len(table) - 1}, the rows of the table, got {index}")
    return _checks.plain_integer(index)


def _check_noise(
    noise: Tensor | None, seed: int | Tensor | None, table: StepTable, index: int | Tensor, sample: Tensor
) -> Tensor | None:
    """The seeds (B,), or None."""
    if noise is not None:
        if seed is not None:
            raise ValueError("noise and seed exclude each other, got both")
        _check_like("noise", noise, sample)
        return None
    if seed is not None:
        return _seeds(seed, sample)
    for column in ("noise_scale", "x0_from_noise"):
        if table.uses(column) and (isinstance(index, Tensor) or table.row(index)[column] != 0):
            raise ValueError("noise is needed, or a seed: this table's solver adds noise")
    return None


def _seeds(seed: int | Tensor, sample: Tensor) -> Tensor:
    batch = sample.shape[0]
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.shape != (batch,):
            raise ValueError(f"seed must have shape ({batch},), one for each sample, got {tuple(seed.shape)}")
        if seed.device != sample.device:
            raise ValueError(f"seed must be on {sample.device}, where sample is, got {seed.device}")
        return seed
    if not _checks.is_integer(seed):
        raise TypeError(f"seed must be an int or an int64 tensor, got {seed!r}")
    first = _checks.plain_integer(seed)
    if not -(2**63) <= first < 2**63:  # (in a graph that is traced there is no room for such numbers)
        first = (_checks.constant_integer(first) + 2**63) % 2**64 - 2**63
    return torch.arange(batch, device=sample.device) + first  # wraps around, as unsigned numbers do


def _next_row_uses_x0(table: StepTable, index: int | Tensor) -> bool:
    """Whether the step after this one takes this one's x0; for a row that only the device knows, whether any does."""
    if not table.uses("next_from_previous_x0"):
        return False
    if isinstance(index, Tensor):
        return True
    return table.needs_x0(index)


def _run_eager(call: _Call) -> tuple[Tensor, Tensor | None]:
    following, x0 = eager_sampler_step(
        call.sample,
        call.output,
        call.table,
        call.row,
        unconditional_output=call.unconditional_output,
        guidance=call.guidance,
        threshold=call.threshold,
        previous_x0=call.previous_x0,
        noise=call.noise,
        seed=call.seed,
    )
    return following, x0 if call.write_x0 else None


def _common_dtype(call: _Call) -> torch.dtype:
    """The widest of the tensors'; beside a narrower sample the result is rounded to that in the end."""
    dtype = call.sample.dtype
    for tensor in (call.output, call.unconditional_output, call.previous_x0, call.noise):
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _readable(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As the kernels read it: its positions at one distance from each other."""
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if has_one_position_stride(tensor) else dense(tensor)


def _arguments(call: _Call, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of the operators, see `_sampler_step_operators`."""
    sample, output, table, index, unconditional_output, guidance, threshold, previous_x0, noise, seed, write_x0 = call
    percentile, min_value, max_value = 0.0, 1.0, math.inf
    kind = 0 if threshold is None else 1
    if isinstance(threshold, DynamicThreshold):
        kind, percentile, min_value = 2, float(threshold.percentile), float(threshold.min_value)
        if threshold.max_value is not None:
            max_value = float(threshold.max_value)
    return (
        dense(sample.to(dtype)),
        _readable(output, dtype),
        _readable(unconditional_output, dtype),
        _readable(previous_x0, dtype),
        _readable(noise, dtype),
        None if seed is None else seed.contiguous(),
        table.on(sample.device),
        index.long() if isinstance(index, Tensor) else table.index(index, sample.device),
        table.learned_variance,
        float(guidance.scale),
        float(guidance.rescale),
        guidance.remove_parallel,
        kind,
        percentile,
        min_value,
        max_value,
        write_x0,
    )


_cpu = operator("cpu")
_cuda = operator("cuda")


def _run_cpu(call: _Call) -> tuple[Tensor, Tensor | None]:
    return _run_on(_cpu, call)


def _run_cuda(call: _Call) -> tuple[Tensor, Tensor | None]:
    return _run_on(_cuda, call)


def _run_triton(call: _Call) -> tuple[Tensor, Tensor | None]:
    define_triton()
    return _run_on(operator("triton"), call)


def _run_on(kernels: Any, call: _Call) -> tuple[Tensor, Tensor | None]:
    dtype, wanted = _common_dtype(call), call.sample.dtype
    following, x0 = run_operator(kernels, *_arguments(call, dtype))
    if dtype != wanted:
        following, x0 = following.to(wanted), x0.to(wanted)
    return following, x0 if call.write_x0 else None


def _notes(call: _Call) -> list[str]:
    notes = []
    if not is_dense(call.sample):
        notes.append("sample will be copied: its strides are neither dense NCHW nor dense NHWC")
    dtype = _common_dtype(call)
    for name in ("sample", "output", "unconditional_output", "previous_x0", "noise"):
        tensor = getattr(call, name)
        if tensor is None or (name == "sample" and tensor.dtype == dtype):
            continue
        if tensor.dtype != dtype:
            notes.append(f"{name} will be copied: its dtype is not the widest of the tensors'")
        elif not has_one_position_stride(tensor):
            notes.append(f"{name} will be copied: its positions do not lie at one distance from each other")
    return notes


_NO_GRADIENT = no_gradient("sample", "output", "unconditional_output", "previous_x0", "noise")

_OP = Op(
    "sampler_step",
    _check,
    (
        Backend("eager", _run_eager),
        Backend(
            "cpu",
            _run_cpu,
            (dtypes("sample", torch.float16, torch.bfloat16, torch.float32, torch.float64), _NO_GRADIENT),
        ),
        Backend("triton", _run_triton, (dtypes("sample", torch.float16, torch.bfloat16, torch.float32), _NO_GRADIENT)),
        Backend("cuda", _run_cuda, (dtypes("sample", torch.float16, torch.bfloat16, torch.float32), _NO_GRADIENT)),
    ),
    _notes,
)


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
    seed: int | Tensor | None = None,
    return_x0: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step of the solver that `table` describes, fused: from x_t and the model's output to the next sample.

    Everything is in float32 (float64 for float64) and rounded once, at the end. A sample's result does not depend on
    its batch. Gradients, where they are asked for, are those of plain PyTorch, on the `eager` backend.

    Args:
        sample: (B, C, positions...) of rank 2 to 5, float16, bfloat16, float32 or float64. Dense NCHW and channels-last
            samples are read in place, other strides are copied (`imagen_fast.explain` says so). B may be 0.
        output: the model's output with the text, of sample's shape; where the table has a learned variance, with twice
            its channels, of which the second half is the variance. Without one, further channels are ignored.
        table: the solver, a `StepTable`.
        index: which of its rows. An int is checked. A 0-d tensor on sample's device stays there, so that a loop can be
            captured as a graph; a row out of range gives NaN. Under `torch.compile` every int has a graph of its own,
            of which there may be few; all tensors share one.
        unconditional_output: the output without the text; without it there is no guidance. Its variance is ignored,
            and may be left out.
        guidance: the scale, or a `Guidance`. Like the numbers of a threshold, a constant of graphs that
            `torch.compile` makes.
        threshold: of x0: None, "static" (clip to ±1), or a `DynamicThreshold`, which clips to the exact quantile of
            each sample's magnitudes and divides by it. With the latter, a sample with any NaN in its x0 becomes NaN.
        previous_x0: the x0 that the step before returned; needed where any row of the table uses it.
        noise: like sample. Or instead
        seed: an int64 tensor (B,), or an int s, which gives sample b the seed s + b: the noise is drawn in the kernel
            by Philox, and depends on the seed, the row and the place in the sample alone (`reference/philox.py`).
        return_x0: whether x0, after the threshold, is returned; None for where the table's next row needs it.

    Returns:
        The next sample, and x0 or None: of sample's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        IndexError: an int index is out of range.
        BackendError: the backend that `use_backend` forces cannot serve this call.

    Source: solvers as named in `StepTable`; guidance: Ho and Salimans, 2022; dynamic thresholding: Imagen (Saharia et
    al., 2022, section 2.3).

    Example:
        >>> table = StepTable.ddpm(squaredcos_cap_v2(1000), steps=100, variance="learned_range")
        >>> for index, timestep in enumerate(table.timesteps):
        ...     uncond, cond = unet(torch.cat([x, x]), timestep, text).chunk(2)
        ...     x, _ = ops.sampler_step(x, cond, table, index, unconditional_output=uncond, guidance=7.0,
        ...                             threshold=DynamicThreshold(0.95, max_value=1.5), seed=0)
    """
    return _OP.run(  # type: ignore[no-any-return]
        _check(
            sample,
            output,
            table,
            index,
            unconditional_output=unconditional_output,
            guidance=guidance,
            threshold=threshold,
            previous_x0=previous_x0,
            noise=noise,
            seed=seed,
            return_x0=return_x0,
        )
    )
