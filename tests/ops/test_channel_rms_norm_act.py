"""Accuracy of every kernel, forward and backward: layouts, dtypes, shapes, parameters, values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imagen_fast import layout, ops
from imagen_fast.testing import assert_as_accurate, assert_op_as_accurate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", None]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
layouts = pytest.mark.parametrize("layout_name", ["nchw", "nhwc"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout_name: str = "nchw") -> Tensor:
    x = (1.7 * torch.randn(shape) + 0.4).to(dtype)
    return layout.channels_last(x) if layout_name == "nhwc" else x


def parameters(x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All three; scale and shift are the strided halves of one projection, as in a U-Net."""
    batch, channels = x.shape[:2]
    scale, shift = torch.randn(batch, 2 * channels).to(dtype or x.dtype).chunk(2, dim=1)
    return {"weight": (1 + torch.randn(channels)).to(dtype or x.dtype), "scale": scale, "shift": shift}


@dtypes
@layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_layouts_and_activations(
    kernel: str, dtype: torch.dtype, layout_name: str, activation: str | None
) -> None:
    x = image((2, 48, 9, 7), dtype, layout_name)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x), activation=activation)


@layouts
def test_is_the_block_of_imagen_pytorch(backend: str, layout_name: str) -> None:
    """As its source has it: ChanRMSNorm with gamma (C, 1, 1), then scale and shift of shape (B, C, 1, 1), then SiLU."""
    x = image((2, 24, 5, 7), torch.float32, layout_name)
    gamma, (scale, shift) = torch.randn(24, 1, 1), torch.randn(2, 48, 1, 1).chunk(2, dim=1)

    def block(x: Tensor, gamma: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.silu(F.normalize(x, dim=1) * 24**0.5 * gamma * (scale + 1) + shift)

    ours = ops.channel_rms_norm_act(x, gamma.flatten(), scale=scale.flatten(1), shift=shift.flatten(1))
    everything = (x, gamma, scale, shift)
    assert_as_accurate(ours, block(*everything), block(*(t.double() for t in everything)))


@layouts
@pytest.mark.parametrize(
    "shape", [(3, 24), (3, 24, 77), (3, 24, 5, 7), (3, 24, 3, 5, 2)], ids=lambda s: f"rank{len(s)}"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ranks(kernel: str, shape: tuple[int, ...], layout_name: str, dtype: torch.dtype) -> None:
    x = image(shape, dtype, layout_name)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@layouts
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((0, 8, 4, 4), id="no-samples"),
        pytest.param((2, 8, 0, 4), id="no-positions"),
        pytest.param((3, 2, 5, 5), id="two-channels"),
        pytest.param((3, 3, 33, 9), id="three-channels"),
        pytest.param((1, 257, 1, 259), id="odd"),
        pytest.param((2, 128, 32, 32), id="unet-block"),
        pytest.param((1, 2816, 8, 8), id="many-channels"),
        pytest.param((1, 4, 300, 257), id="many-positions"),
    ],
)
def test_sizes(kernel: str, layout_name: str, shape: tuple[int, ...]) -> None:
    x = image(shape, torch.float32, layout_name)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@layouts
def test_one_channel_is_its_own_norm(kernel: str, layout_name: str) -> None:
    """The result is the sign of x, and the gradient 0, not what rounding leaves of it."""
    x = image((3, 1, 5, 7), torch.float32, layout_name).requires_grad_()
    y = ops.channel_rms_norm_act(x, torch.ones(1), activation=None)
    torch.testing.assert_close(y, x.sign())
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert (dx == 0).all()


@layouts
@pytest.mark.parametrize("names", [(), ("scale",), ("shift",), ("scale", "shift")], ids=lambda n: "+".join(n) or "none")
def test_every_subset_of_parameters(backend: str, layout_name: str, names: tuple[str, ...]) -> None:
    x = image((2, 12, 3, 5), torch.float32, layout_name)
    given_parameters = {name: p for name, p in parameters(x).items() if name in ("weight", *names)}
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **given_parameters)


@pytest.mark.parametrize("parameter_dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
def test_parameters_of_another_dtype(kernel: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    x = image((2, 40, 5, 5), dtype)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x, parameter_dtype))


@pytest.mark.parametrize("shape", [(2, 12), (1, 12), (2, 1), (1, 1), (12,), (1,), ()], ids=str)
def test_scale_and_shift_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    x = image((2, 12, 3, 5))
    scale, shift = torch.randn(shape), torch.randn(shape)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, torch.randn(12), scale=scale, shift=shift)


def test_parameters_of_any_strides(kernel: str) -> None:
    x = image((3, 12, 3, 5))
    assert_op_as_accurate(
        ops.channel_rms_norm_act,
        x,
        torch.randn(24)[::2],
        scale=torch.randn(12, 3).t(),
        shift=torch.randn(1, 12).expand(3, 12),
    )


@layouts
@dtypes
def test_zero_vectors(kernel: str, layout_name: str, dtype: torch.dtype) -> None:
    """Divided by 1e-12 and not by 0: the result is act(shift), and the gradient is large but no NaN."""
    x = image((2, 24, 9, 7), dtype, layout_name)
    x[1, :, 3, 2:6] = 0
    x[:, :, 8] = 0
    affine = parameters(x)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **affine)
    x.requires_grad_()
    y = ops.channel_rms_norm_act(x, **affine)
    torch.testing.assert_close(y[0, :, 8, 0], F.silu(affine["shift"][0]))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not dx.isnan().any()


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-14, 1e-12, 3e-11, 1e-6, 1e10, 1e18])
def test_short_and_long_vectors(kernel: str, layout_name: str, dtype: torch.dtype, size: float) -> None:
    x = size * image((2, 24, 9, 7), dtype, layout_name)
    # Far from where the norm meets its lower bound, at which the gradient jumps.
    affine = parameters(x)
    norms = x.double().norm(dim=1)
    assert ((norms < 0.9e-12) | (norms > 1.1e-12)).all()
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **affine)


@layouts
def test_subnormal_values(kernel: str, layout_name: str) -> None:
    x = 1e-40 * image((2, 24, 9, 7), torch.float32, layout_name)
    assert x.abs().max() < torch.finfo(torch.float32).smallest_normal
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@layouts
@pytest.mark.parametrize("size", [1e19, 1e30, 1e38])
def test_squares_that_overflow(kernel: str, layout_name: str, size: float) -> None:
    """Absolutely: plain PyTorch's norm is infinite here, and its result act(shift)."""
    x = size * (torch.rand(2, 24, 9, 7) + 0.5)
    x[0, :, 0] = 1
    x = layout.channels_last(x) if layout_name == "nhwc" else x
    y = ops.channel_rms_norm_act(x, torch.ones(24), activation=None)
    truth = F.normalize(x.double(), dim=1) * 24**0.5
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=0)


def test_float16_norm_does_not_overflow(kernel: str) -> None:
    x = (2e4 * torch.randn(2, 24, 9, 7)).clamp(-6e4, 6e4).half()
    assert (x.float().norm(dim=1) > 65504).any()
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@layouts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_not_finite_spoils_its_own_position_alone(
    kernel: str, layout_name: str, value: float, dtype: torch.dtype
) -> None:
    x = image((2, 24, 9, 7), dtype, layout_name)
    x[1, 7, 3, 2] = value
    affine = parameters(x)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **affine)
    bad = ops.channel_rms_norm_act(x, **affine).isnan()
    assert bad[1, :, 3, 2].sum() == (24 if math.isnan(value) else 1)
    assert bad.sum() == bad[1, :, 3, 2].sum()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_and_nan_parameters(kernel: str, activation: str | None) -> None:
    x = image((1, 4, 8, 33))
    shift = torch.tensor([[-math.inf, math.inf, math.nan, 0.0]])
    y = ops.channel_rms_norm_act(x, torch.ones(4), shift=shift, activation=activation)
    low = math.nan if activation else -math.inf
    for channel, expected in enumerate((low, math.inf, math.nan)):
        torch.testing.assert_close(y[0, channel], torch.full((8, 33), expected), equal_nan=True)
    assert y[0, 3].isfinite().all()


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wide_range(kernel: str, layout_name: str, dtype: torch.dtype) -> None:
    x = image((2, 24, 9, 7), dtype, layout_name)
    x = x * torch.logspace(-3, 3, 24).to(dtype)[:, None, None]
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    shape = (draw(st.integers(0, 3)), draw(st.integers(2, 99)), *(draw(st.integers(0, 11)) for _ in range(rank - 2)))
    dtype = draw(st.sampled_from(DTYPES))
    order = draw(st.permutations(range(rank)))
    padding = draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    # x is a window into a larger tensor whose dimensions lie in memory in any order.
    full = torch.randn([shape[i] + padding[i] for i in order]).permute([order.index(i) for i in range(rank)])
    x = full[tuple(slice(pad, None) for pad in padding)].to(dtype)
    parameter_dtypes = DTYPES[3:] if dtype == torch.float64 else DTYPES[:3]
    optional: dict[str, Any] = {}
    for name in ("scale", "shift"):
        if draw(st.booleans()):
            like = draw(st.sampled_from([shape[:2], (shape[1],), (1, 1)]))
            optional[name] = torch.randn(like).to(draw(st.sampled_from(parameter_dtypes)))
    weight = torch.randn(shape[1]).to(draw(st.sampled_from(parameter_dtypes)))
    return {"x": x, "weight": weight, "activation": draw(st.sampled_from(ACTIVATIONS)), **optional}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call(call: dict[str, Any]) -> None:
    assert_op_as_accurate(ops.channel_rms_norm_act, **call)


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
            y = ops.channel_rms_norm_act(x, **affine)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, x.detach())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def test_result_does_not_depend_on_the_batch(kernel: str) -> None:
    x, weight = image((5, 32, 9, 7)), torch.randn(32)
    whole = ops.channel_rms_norm_act(x, weight)
    assert torch.equal(whole, torch.cat([ops.channel_rms_norm_act(sample, weight) for sample in x.split(1)]))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gradients_in_float32_beside_a_constant_in_16_bits(kernel: str, activation: str) -> None:
    """Where all errors of the activation's slope are alike, a sum shows them."""
    torch.manual_seed(0)
    x = torch.full((2, 96, 4, 4), 1.5, dtype=torch.bfloat16)
    weight, scale, shift = torch.randn(96), torch.randn(2, 96), torch.randn(2, 96)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, weight, scale=scale, shift=shift, activation=activation)
