"""Accuracy of every kernel, forward and backward: layouts, dtypes, shapes, parameters, values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from imagen_fast import layout, ops, use_backend
from imagen_fast.testing import assert_op_as_accurate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", None]
LAYOUTS = ["nchw", "nhwc"]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
layouts = pytest.mark.parametrize("layout_name", LAYOUTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout_name: str = "nchw") -> Tensor:
    x = (1.7 * torch.randn(shape) + 0.4).to(dtype)
    return layout.channels_last(x) if layout_name == "nhwc" else x


def parameters(x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All four; scale and shift are the strided halves of one projection, as in a U-Net."""
    batch, channels = x.shape[:2]
    scale, shift = torch.randn(batch, 2 * channels).to(dtype or x.dtype).chunk(2, dim=1)
    weight, bias = ((1 + torch.randn(channels)).to(dtype or x.dtype) for _ in range(2))
    return {"weight": weight, "bias": bias, "scale": scale, "shift": shift}


@dtypes
@layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_layouts_and_activations(
    kernel: str, dtype: torch.dtype, layout_name: str, activation: str | None
) -> None:
    x = image((2, 48, 9, 7), dtype, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, 6, **parameters(x), activation=activation)


@layouts
@pytest.mark.parametrize("channels_per_group", [22, 44, 66, 88, 110, 132, 154, 176])
def test_channels_per_group_of_deepfloyd_if(kernel: str, layout_name: str, channels_per_group: int) -> None:
    x = image((1, 4 * channels_per_group, 5, 6), torch.bfloat16, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x), activation="gelu")


@layouts
@pytest.mark.parametrize(
    "shape", [(3, 24), (3, 24, 77), (3, 24, 5, 7), (3, 24, 3, 5, 2)], ids=lambda s: f"rank{len(s)}"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ranks(kernel: str, shape: tuple[int, ...], layout_name: str, dtype: torch.dtype) -> None:
    x = image(shape, dtype, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x))


@layouts
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        pytest.param((0, 8, 4, 4), 2, id="no-samples"),
        pytest.param((2, 8, 0, 4), 2, id="no-positions"),
        pytest.param((3, 5, 13, 1), 5, id="one-channel-per-group"),
        pytest.param((3, 31, 3, 3), 1, id="one-group"),
        pytest.param((1, 6, 1, 259), 2, id="odd-row"),
        pytest.param((2, 64, 64, 64), 32, id="unet-block"),
        pytest.param((1, 4, 300, 257), 2, id="slab-of-many-chunks"),
    ],
)
def test_sizes(kernel: str, layout_name: str, shape: tuple[int, ...], groups: int) -> None:
    x = image(shape, torch.float32, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, groups, **parameters(x))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7), (2, 7, 1)], ids=str)
def test_one_value_per_group(kernel: str, shape: tuple[int, ...]) -> None:
    """It is its own mean: the result is act(bias), and the gradient is zero, up to a rounding times 1 / sqrt(eps)."""
    x, bias = image(shape).requires_grad_(), torch.randn(shape[1])
    y = ops.group_norm_act(x, shape[1], torch.randn(shape[1]), bias, eps=1e-4)
    torch.testing.assert_close(y, torch.nn.functional.silu(bias).reshape(-1, *[1] * (len(shape) - 2)).expand(shape))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.abs().max() < 1e-6 / math.sqrt(1e-4)


@layouts
@pytest.mark.parametrize(
    "names",
    [names for n in range(5) for names in itertools.combinations(("weight", "bias", "scale", "shift"), n)],
    ids=lambda names: "+".join(names) or "none",
)
def test_every_subset_of_parameters(backend: str, layout_name: str, names: tuple[str, ...]) -> None:
    x = image((2, 12, 3, 5), torch.float32, layout_name)
    given_parameters = {name: p for name, p in parameters(x).items() if name in names}
    assert_op_as_accurate(ops.group_norm_act, x, 3, **given_parameters)


@pytest.mark.parametrize("parameter_dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
def test_parameters_of_another_dtype(kernel: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    x = image((2, 40, 5, 5), dtype)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x, parameter_dtype))


def test_parameters_of_four_dtypes(kernel: str) -> None:
    x = image((2, 40, 5, 5), torch.bfloat16)
    mixed = parameters(x)
    mixed["weight"], mixed["bias"], mixed["scale"] = (
        mixed["weight"].float(),
        mixed["bias"].half(),
        mixed["scale"].half(),
    )
    assert_op_as_accurate(ops.group_norm_act, x, 4, **mixed)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_scale_costs_the_gradients_of_weight_and_bias_nothing(kernel: str, scale_dtype: torch.dtype) -> None:
    """Absolutely: eager PyTorch rounds 1 + scale to the dtype of scale."""
    x, dy = image((2, 40, 5, 5)), torch.randn(2, 40, 5, 5)
    scale = (0.01 * torch.randn(2, 40)).to(scale_dtype)
    affine = [torch.randn(40, requires_grad=True) for _ in range(2)]
    ours = torch.autograd.grad(ops.group_norm_act(x, 4, *affine, scale=scale), affine, dy)
    exact = [p.detach().double().requires_grad_() for p in affine]
    with use_backend("eager"):
        truth = ops.group_norm_act(x.double(), 4, *exact, scale=scale.double())
    for gradient, true in zip(ours, torch.autograd.grad(truth, exact, dy.double()), strict=True):
        torch.testing.assert_close(gradient.double(), true, rtol=0, atol=1e-5 * true.abs().max().item())


@pytest.mark.parametrize("shape", [(2, 12), (1, 12), (2, 1), (1, 1), (12,), (1,), ()], ids=str)
def test_scale_and_shift_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    x = image((2, 12, 3, 5))
    assert_op_as_accurate(ops.group_norm_act, x, 3, scale=torch.randn(shape), shift=torch.randn(shape))


def test_parameters_of_any_strides(kernel: str) -> None:
    x = image((3, 12, 3, 5))
    assert_op_as_accurate(
        ops.group_norm_act,
        x,
        3,
        weight=torch.randn(24)[::2],
        bias=torch.randn(12, 2)[:, 1],
        scale=torch.randn(12, 3).t(),
        shift=torch.randn(1, 12).expand(3, 12),
    )


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("mean", "deviation"), [(1000.0, 1.0), (-3e4, 20.0), (0.0, 1e-4), (3e-3, 1e-3)], ids=str)
def test_mean_and_deviation(kernel: str, layout_name: str, dtype: torch.dtype, mean: float, deviation: float) -> None:
    x = (deviation * torch.randn(2, 24, 17, 16, dtype=torch.float64) + mean).to(dtype)
    x = layout.channels_last(x) if layout_name == "nhwc" else x
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x))


def test_large_mean_is_no_excuse(backend: str) -> None:
    """Absolutely, and not beside eager alone: PyTorch's channels-last kernel is off by 0.33 here."""
    x = image((2, 32, 64, 64), torch.float32, "nhwc") + 1000
    truth = torch.group_norm(x.double().contiguous(), 4)
    assert (ops.group_norm_act(x, 4, activation=None) - truth).abs().max() < 5e-4


@layouts
@pytest.mark.parametrize("group_size", [5, 6])
def test_large_means_and_tiny_deviations_in_bf16(kernel: str, layout_name: str, group_size: int) -> None:
    """Absolutely: what the statistics lose must not be more than what rounding the result to 8 bits hides."""
    means, deviations = torch.tensor([[0, 100, -1000, 0, 3, 1e12], [1, 0.3, 2, 1e-19, 1, 1e9]])
    channels = [v.repeat_interleave(group_size)[:, None, None] for v in (means, deviations)]
    x = (channels[0] + channels[1] * torch.randn(2, 6 * group_size, 17, 33)).bfloat16()
    x = layout.channels_last(x) if layout_name == "nhwc" else x
    truth = torch.group_norm(x.double().contiguous(), 6, eps=0)
    y = ops.group_norm_act(x, 6, activation=None, eps=0)
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)


@layouts
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4, 1e-30])
def test_constants(kernel: str, layout_name: str, value: float) -> None:
    """The deviation is 0, and eps alone keeps the result finite."""
    x = image((2, 24, 9, 7), torch.float32, layout_name).fill_(value)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x))


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wide_range(kernel: str, layout_name: str, dtype: torch.dtype) -> None:
    x = image((2, 24, 9, 7), dtype, layout_name)
    x = x * torch.logspace(-3, 3, 24).to(dtype)[:, None, None]
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x))


@layouts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_group_alone(kernel: str, layout_name: str, value: float) -> None:
    x = image((2, 24, 9, 7), torch.float32, layout_name)
    x[1, 7, 3, 2] = value
    affine = parameters(x)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **affine)
    bad = ops.group_norm_act(x, 4, **affine).isnan()
    assert bad[1, 6:12].all()
    assert bad.sum() == 6 * 9 * 7


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(kernel: str, activation: str | None) -> None:
    """Where exp overflows, and where it underflows."""
    x = image((1, 4, 8, 33))
    shift = torch.tensor([[-200.0, -20.0, 20.0, 1e4]])
    assert_op_as_accurate(ops.group_norm_act, x, 4, shift=shift, scale=torch.full((1, 4), 30.0), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_and_nan_parameters(kernel: str, activation: str | None) -> None:
    """Expected values are the activations' limits; -inf times a factor of 0 is NaN. (PyTorch's own gelu(inf) is NaN
    where it is vectorised.)"""
    x = image((1, 4, 8, 33))
    shift = torch.tensor([[-math.inf, math.inf, math.nan, 0.0]])
    y = ops.group_norm_act(x, 4, shift=shift, activation=activation)
    low = math.nan if activation else -math.inf
    for channel, expected in enumerate((low, math.inf, math.nan)):
        torch.testing.assert_close(y[0, channel], torch.full((8, 33), expected), equal_nan=True)
    assert y[0, 3].isfinite().all()


@pytest.mark.parametrize("eps", [0, 1e-12, 1e-5, 1.0])
def test_eps(kernel: str, eps: float) -> None:
    assert_op_as_accurate(ops.group_norm_act, 0.01 * image((2, 24, 9, 7)), 4, eps=eps)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    groups, per_group = draw(st.integers(1, 6)), draw(st.integers(1, 37))
    rank = draw(st.integers(2, 5))
    shape = (draw(st.integers(0, 3)), groups * per_group, *(draw(st.integers(0, 11)) for _ in range(rank - 2)))
    # The gradient of a group of one or two values is what is left when all but everything cancels.
    assume(math.prod(shape) == 0 or per_group * math.prod(shape[2:]) >= 8)
    dtype = draw(st.sampled_from(DTYPES))
    order = draw(st.permutations(range(rank)))
    padding = draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    # x is a window into a larger tensor whose dimensions lie in memory in any order.
    full = torch.randn([shape[i] + padding[i] for i in order]).permute([order.index(i) for i in range(rank)])
    x = full[tuple(slice(pad, None) for pad in padding)].to(dtype)
    channels = shape[1]
    parameter_dtypes = DTYPES[3:] if dtype == torch.float64 else DTYPES[:3]
    optional: dict[str, Any] = {}
    for name in ("weight", "bias", "scale", "shift"):
        if draw(st.booleans()):
            like = (
                (channels,) if name in ("weight", "bias") else draw(st.sampled_from([shape[:2], (channels,), (1, 1)]))
            )
            optional[name] = torch.randn(like).to(draw(st.sampled_from(parameter_dtypes)))
    return {"x": x, "num_groups": groups, "activation": draw(st.sampled_from(ACTIVATIONS)), **optional}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call(call: dict[str, Any]) -> None:
    assert call["x"].dtype in DTYPES
    assert_op_as_accurate(ops.group_norm_act, **call)


@layouts
@pytest.mark.parametrize("shape", [(1, 32, 65, 63), (4, 32, 9, 7), (1, 4, 256, 257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(
    kernel: str, layout_name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not kernel.startswith("cpu"):
        pytest.skip("its threads are not the processor's")
    x = image(shape, dtype, layout_name)
    affine = parameters(x)
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in affine.values())]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 5, 1):
            torch.set_num_threads(n)
            y = ops.group_norm_act(x, 4, **affine)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, x.detach())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def test_result_does_not_depend_on_the_batch(kernel: str) -> None:
    x = image((5, 32, 9, 7))
    whole = ops.group_norm_act(x, 4)
    assert torch.equal(whole, torch.cat([ops.group_norm_act(sample, 4) for sample in x.split(1)]))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gradients_in_float32_beside_a_constant_in_16_bits(kernel: str, activation: str) -> None:
    """Where all errors of the activation's slope are alike, a sum shows them."""
    torch.manual_seed(0)
    x = torch.full((2, 96, 4, 4), 1.5, dtype=torch.bfloat16)
    weight, scale, shift = torch.randn(96), torch.randn(2, 96), torch.randn(2, 96)
    assert_op_as_accurate(
        ops.group_norm_act, x, 32, weight, torch.randn(96), scale=scale, shift=shift, activation=activation
    )
