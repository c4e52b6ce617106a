"""Is a result as accurate as eager PyTorch's? The one place where tolerances live.

A fixed tolerance is either too tight for one dtype or shape or too loose for another. What can be asked of a faster
kernel is that it is no less accurate than what it replaces. So three results are compared, all from the same inputs:

    ours    the result under test
    eager   plain PyTorch in the same dtype
    truth   plain PyTorch in float64, from the inputs (already rounded to their dtype) cast up

and the error of ours against the truth may be at most twice the error of eager against the truth, plus a floor. This is
the rule by which FlashAttention is tested (Dao-AILab/flash-attention, `tests/test_flash_attn.py`).

Example, for an op, its result and its gradients:
    >>> assert_op_as_accurate(ops.group_norm_act, x, 32, weight, bias, scale=scale)

for any function of your own:
    >>> assert_as_accurate(fast_softmax(x), x.softmax(-1), x.double().softmax(-1))

and for a model:
    >>> truth = copy.deepcopy(model).double()(x.double())
    >>> eager = model(x)
    >>> imagen_fast.accelerate(model)
    >>> assert_model_as_accurate(model(x), eager, truth)

A loop around a model, as in sampling, makes of the same rounding now a small and now a large difference. There it takes
many samples to tell who is more accurate: `assert_sampling_as_accurate`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import explain, use_backend

__all__ = [
    "assert_as_accurate",
    "assert_model_as_accurate",
    "assert_op_as_accurate",
    "assert_sampling_as_accurate",
    "largest_error",
    "model_error",
    "sampling_error",
]

# How much worse than eager's an error may be: of one op's result, and of a whole model's output.
_OP_FACTOR = 2.0
_MODEL_FACTOR = 1.5

# The floors, in ulp: relative to the largest value of the truth for the largest error, to its root mean square for the
# root mean square error. A correctly rounded result is within 0.5 and 0.3 of them.
_LARGEST_ULPS = 2.0
_MEAN_ULPS = 0.5

# In float32 on the CPU, results whose long sums are taken in another order differ by this much, relatively.
_FLOAT32_ON_CPU = 1e-5

# The truth itself is rounded in float64, so that a float64 result can only be held to the round-off of its long sums.
_FLOAT64 = 1e-12


def assert_as_accurate(ours: Tensor, eager: Tensor, truth: Tensor, *, name: str = "result") -> None:
    """Assert that the error of `ours` is at most twice that of `eager`, plus a floor of a few ulp.

    Both the largest error and the root mean square error over all elements are held to it: the first finds one wrong
    element, the second a small deviation everywhere. The floor is 2 ulp of the truth's largest magnitude, and half an
    ulp of its root mean square; in float32 on the CPU it is 1e-5 of either, in float64 1e-12.

    NaN and infinities are no errors where `truth` or `eager` has the same at the same place, and an error anywhere
    else. So is a finite value where both have none.

    Args:
        ours, eager: two tensors of one shape, floating dtype and device.
        truth: a float64 tensor of that shape.
        name: what the result is called in the message.

    Raises:
        AssertionError: with the worst element, its place, the errors and what was allowed.
        TypeError: `truth` is not float64, or `ours` not floating.

    Example: see the top of `imagen_fast.testing`.
    """
    _check_comparable(ours, eager, truth, name)
    ours64, eager64, truth = (tensor.detach().to(ours.device, torch.float64) for tensor in (ours, eager, truth))
    _check_not_finite(ours64, eager64, truth, name)
    our_error, eager_error = _error(ours64, truth), _error(eager64, truth)
    if not our_error.numel():
        return
    magnitude = truth.abs().where(truth.isfinite(), 0.0)

    largest_allowed = _OP_FACTOR * eager_error.max().item() + _floor(ours, _LARGEST_ULPS) * magnitude.max().item()
    if our_error.max().item() > largest_allowed:
        place = tuple(int(i) for i in torch.unravel_index(our_error.argmax(), our_error.shape))
        raise AssertionError(
            f"{name} is less accurate than eager PyTorch: its largest error is {our_error.max().item():.3g}, "
            f"at {place}: ours {ours64[place].item():.9g}, eager {eager64[place].item():.9g}, "
            f"truth {truth[place].item():.9g}\n"
            f"allowed: {largest_allowed:.3g}, from eager's largest error {eager_error.max().item():.3g} and the "
            f"truth's largest magnitude {magnitude.max().item():.3g} in {ours.dtype}\n"
            f"{int((our_error > largest_allowed).sum())} of {our_error.numel()} elements, shape {tuple(ours.shape)}, "
            f"are over it"
        )
    mean_allowed = _OP_FACTOR * _rms(eager_error) + _floor(ours, _MEAN_ULPS) * _rms(magnitude)
    if _rms(our_error) > mean_allowed:
        raise AssertionError(
            f"{name} is less accurate than eager PyTorch all over: its root mean square error is "
            f"{_rms(our_error):.3g}\n"
            f"allowed: {mean_allowed:.3g}, from eager's {_rms(eager_error):.3g} and the truth's root mean square "
            f"{_rms(magnitude):.3g} in {ours.dtype}, shape {tuple(ours.shape)}"
        )


def largest_error(ours: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error of `ours`, and the largest that `assert_as_accurate` allows it, for reports.

    Both are relative to the largest magnitude of `truth`. Arguments as for `assert_as_accurate`.
    """
    _check_comparable(ours, eager, truth, "result")
    ours64, eager64, truth = (tensor.detach().to(ours.device, torch.float64) for tensor in (ours, eager, truth))
    if not truth.numel():
        return 0.0, 0.0
    size = truth.abs().where(truth.isfinite(), 0.0).max().item() or 1.0
    our_error, eager_error = (_error(y, truth).max().item() / size for y in (ours64, eager64))
    return our_error, _OP_FACTOR * eager_error + _floor(ours, _LARGEST_ULPS)


def assert_op_as_accurate(op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Assert that the results of an op, and its gradients for every floating tensor argument, are `as_accurate`.

    An argument that is a named tuple, such as a `RelativePositionBias`, has the gradients of its fields.

    Ours is the op on the backend that is selected (`imagen_fast.use_backend`), eager is its `eager` backend, and the
    truth its `eager` backend in float64. The gradients are of the results weighted by the same random numbers, and 0
    where a result does not depend on a tensor. Results must have the memory format of eager's, and gradients the dtype
    and shape of their tensors.

    Where the kernels of the selected backend have no backward pass (`ops.sampler_step`, `ops.abs_quantile`), the
    results alone are compared: a call that asks for gradients would not run on them.

    Args:
        op: one of `imagen_fast.ops`.
        args, kwargs: its arguments, as for a call.

    Raises:
        AssertionError: as `assert_as_accurate`, naming the result or the gradient.

    Example: see the top of `imagen_fast.testing`.
    """
    bound = inspect.signature(op).bind(*args, **kwargs).arguments
    run = _results_and_gradients if _has_gradients(op, bound) else _results
    ours = run(op, bound)
    with use_backend("eager"):
        eager = run(op, bound)
        truth = run(op, {name: _to_float64(value) for name, value in bound.items()})
    assert ours.keys() == eager.keys(), f"{op.__name__} gives {sorted(ours)}, eager {sorted(eager)}"
    for name, result in ours.items():
        if not name.startswith("gradient") and _layout(result) != _layout(eager[name]):
            raise AssertionError(f"{name} has strides {result.stride()}, eager's has {eager[name].stride()}")
        assert_as_accurate(result, eager[name], truth[name], name=f"{name} of {op.__name__}")


def _has_gradients(op: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Whether a call that asks for gradients runs on the same backend as one that does not."""
    from . import ops

    if getattr(ops, op.__name__, None) is not op:
        return True
    plain, (asking, _) = _bound(op, arguments), _with_leaves(op, arguments)
    with torch.no_grad():
        backend = explain(op, *plain.args, **plain.kwargs).backend
    with torch.enable_grad():
        return explain(op, *asking.args, **asking.kwargs).backend == backend


def _results(op: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """By name: "result 0", ..."""
    bound = _bound(op, arguments)
    with torch.no_grad():
        return _named(_outputs(op(*bound.args, **bound.kwargs)))


def _results_and_gradients(op: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """By name: "result 0", ... and "gradient of x", ..."""
    bound, leaves = _with_leaves(op, arguments)
    with torch.enable_grad():
        outputs = _outputs(op(*bound.args, **bound.kwargs))
    generator = torch.Generator("cpu").manual_seed(0)
    # Rounded to the narrowest dtype, so that all three runs start from the same numbers.
    weights = [
        torch.randn(output.shape, generator=generator, device="cpu").bfloat16().to(output.device, output.dtype)
        for output in outputs
    ]
    reached = [i for i, output in enumerate(outputs) if output.requires_grad]
    gradients = torch.autograd.grad(
        [outputs[i] for i in reached],
        list(leaves.values()),
        [weights[i] for i in reached],
        allow_unused=True,
        materialize_grads=True,
    )
    return _named(outputs) | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _bound(op: Callable[..., Any], arguments: dict[str, Any]) -> inspect.BoundArguments:
    bound = inspect.signature(op).bind_partial()
    bound.arguments.update(arguments)
    return bound


def _with_leaves(op: Callable[..., Any], arguments: dict[str, Any]) -> tuple[inspect.BoundArguments, dict[str, Tensor]]:
    """The arguments with a leaf of the graph for each floating tensor, and the leaves by name."""
    leaves: dict[str, Tensor] = {}

    def as_leaf(name: str, x: Tensor) -> Tensor:
        leaves[name] = x.detach().requires_grad_()
        return leaves[name]

    bound = _bound(op, {name: _with_floating(as_leaf, name, value) for name, value in arguments.items()})
    return bound, leaves


def _outputs(returned: Any) -> list[Tensor]:
    return [output for output in (returned if isinstance(returned, tuple) else (returned,)) if output is not None]


def _named(outputs: list[Tensor]) -> dict[str, Tensor]:
    return {f"result {i}": output.detach() for i, output in enumerate(outputs)}


def _layout(y: Tensor) -> list[int]:
    """The strides that say where elements lie: not those of an empty tensor or of dimensions of size 1."""
    return [stride for stride, size in zip(y.stride(), y.shape, strict=True) if size > 1] if y.numel() else []


def _with_floating(change: Callable[[str, Tensor], Tensor], name: str, value: Any) -> Any:
    """An argument with its floating tensors changed: itself, or the fields of a named tuple."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(
            *(_with_floating(change, f"{name}.{key}", x) for key, x in zip(value._fields, value, strict=True))
        )
    return change(name, value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _to_float64(value: Any) -> Any:
    return _with_floating(lambda _, x: x.double(), "", value)


def assert_model_as_accurate(ours: Tensor, eager: Tensor, truth: Tensor, *, name: str = "output") -> None:
    """Assert that the relative error of a whole model's output is at most 1.5 times that of eager PyTorch.

    The relative error is |y - truth| / |truth| in the 2-norm over all elements. NaN and infinities as in
    `assert_as_accurate`.

    Args:
        ours, eager: the output of the accelerated and of the original model, of one shape, floating dtype and device.
        truth: the output of the original model in float64.
        name: what the output is called in the message.

    Raises:
        AssertionError: with both errors.
        TypeError: `truth` is not float64, or `ours` not floating.

    Example: see the top of `imagen_fast.testing`.
    """
    _hold_model(ours, eager, truth, model_error(ours, eager, truth, name=name), name, "is", "")


def model_error(ours: Tensor, eager: Tensor, truth: Tensor, *, name: str = "output") -> tuple[float, float]:
    """The relative error of `ours`, and the largest that `assert_model_as_accurate` allows it, for reports.

    Arguments as for `assert_model_as_accurate`. Values that are not finite do not count here.
    """
    _check_comparable(ours, eager, truth, name)
    ours64, eager64, truth = (tensor.detach().to(ours.device, torch.float64) for tensor in (ours, eager, truth))
    size = _rms(truth.where(truth.isfinite(), 0.0)) or 1.0
    our_error, eager_error = _rms(_error(ours64, truth)) / size, _rms(_error(eager64, truth)) / size
    return our_error, _MODEL_FACTOR * eager_error + (_FLOAT64 if ours.dtype == torch.float64 else 0.0)


def assert_sampling_as_accurate(ours: Tensor, eager: Tensor, truth: Tensor, *, name: str = "samples") -> None:
    """Assert that the relative error of what a model samples is at most 1.5 times that of eager PyTorch, on average.

    Sampling feeds a model's output back to it, so that rounding grows by a factor that differs from sample to sample,
    by orders of magnitude. The 2-norm over some samples is the error of the worst of them, which may be anybody's. So
    the average is the geometric mean over the samples of |y - truth| / |truth|, each in the 2-norm over its elements:
    no sample rules it, and one in eight that is altogether wrong raises it by more than half, of a model in bfloat16.
    NaN and infinities as in `assert_as_accurate`.

    Args:
        ours, eager: the samples (B, ...) of the accelerated and of the original model, from the same noise; of one
            shape, floating dtype and device. B should be 16 or more.
        truth: the samples of the original model in float64.
        name: what the samples are called in the message.

    Raises:
        AssertionError: with both errors.
        TypeError: `truth` is not float64, or `ours` not floating.
    """
    errors = sampling_error(ours, eager, truth, name=name)
    _hold_model(ours, eager, truth, errors, name, "are", f", the geometric mean over {len(ours)}")


def sampling_error(ours: Tensor, eager: Tensor, truth: Tensor, *, name: str = "samples") -> tuple[float, float]:
    """The error of `ours`, and the largest that `assert_sampling_as_accurate` allows it, for reports.

    Arguments as for `assert_sampling_as_accurate`. Values that are not finite do not count here.
    """
    _check_comparable(ours, eager, truth, name)
    if not truth.numel():
        return 0.0, 0.0
    pairs = [model_error(*sample, name=name) for sample in zip(ours, eager, truth, strict=True)]
    # Nothing is more exact than float64, and a sample without an error at all would make the mean zero.
    logarithms = torch.tensor(pairs, dtype=torch.float64).clamp(min=_FLOAT64).log()
    error, allowed = logarithms.mean(0).exp().tolist()
    return error, allowed


def _hold_model(
    ours: Tensor, eager: Tensor, truth: Tensor, errors: tuple[float, float], name: str, verb: str, average: str
) -> None:
    """Raise AssertionError where the first of `errors` is above the second, or values that are not finite differ."""
    ours64, eager64, truth = (tensor.detach().to(ours.device, torch.float64) for tensor in (ours, eager, truth))
    _check_not_finite(ours64, eager64, truth, name)
    our_error, allowed = errors
    if our_error > allowed:
        raise AssertionError(
            f"{name} {verb} less accurate than the eager model's: relative error {our_error:.3g} in {ours.dtype}"
            f"{average}; allowed {allowed:.3g}, {_MODEL_FACTOR} times eager's"
        )


def _check_comparable(ours: Tensor, eager: Tensor, truth: Tensor, name: str) -> None:
    for what, given in {"ours": ours, "eager": eager, "truth": truth}.items():
        if not isinstance(given, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(given).__name__}")
    if truth.dtype != torch.float64:
        raise TypeError(f"truth must be float64, got {truth.dtype}")
    if not ours.dtype.is_floating_point:
        raise TypeError(f"ours must be floating, got {ours.dtype}")
    if ours.dtype != eager.dtype:
        raise AssertionError(f"{name} is {ours.dtype}, eager's is {eager.dtype}")
    if not ours.shape == eager.shape == truth.shape:
        shapes = (tuple(tensor.shape) for tensor in (ours, eager, truth))
        raise AssertionError("{} has shape {}, eager's {}, the truth {}".format(name, *shapes))


def _check_not_finite(ours: Tensor, eager: Tensor, truth: Tensor, name: str) -> None:
    """NaN and each infinity stand where eager or the truth has the same."""
    agrees = _same_kind(ours, truth) | _same_kind(ours, eager)
    if not agrees.all():
        place = tuple(int(i) for i in (~agrees).nonzero()[0])
        raise AssertionError(
            f"{name} has {ours[place].item():.9g} at {place}, where eager has {eager[place].item():.9g} and the "
            f"truth is {truth[place].item():.9g}; {int((~agrees).sum())} of {agrees.numel()} elements differ so"
        )


def _same_kind(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a.isfinite(), b.isfinite(), (a == b) | (a.isnan() & b.isnan()))


def _error(y: Tensor, truth: Tensor) -> Tensor:
    """|y - truth| where both are finite, else 0."""
    return (y - truth).abs().where(y.isfinite() & truth.isfinite(), 0.0)


def _floor(ours: Tensor, ulps: float) -> float:
    if ours.dtype == torch.float64:
        return _FLOAT64
    if ours.dtype == torch.float32 and ours.device.type == "cpu":
        return _FLOAT32_ON_CPU
    return ulps * torch.finfo(ours.dtype).eps


def _rms(values: Tensor) -> float:
    """Root mean square of finite values, of which even the largest can be squared once they are scaled."""
    largest = values.abs().max().item() if values.numel() else 0.0
    return largest * math.sqrt((values / largest).square().mean().item()) if largest else 0.0
