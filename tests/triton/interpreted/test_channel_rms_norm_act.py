"""channel_rms_norm_act in Triton's interpreter: both ways of launching it, on every kind of input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_fast import _triton, layout, ops
from imagen_fast.testing import assert_op_as_accurate

kernels = _triton.kernels("channel_rms_norm_act")

layouts = pytest.mark.parametrize("layout_name", ["nchw", "nhwc"])
both_ways = pytest.mark.parametrize("way", ["tile", "loop"], indirect=True)

SHAPE = (2, 27, 5, 7)  # several tiles, none of them full, in each loop of `way`


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way of launching, with tiles so small that every loop goes round more than once."""
    table = copy.deepcopy(kernels.CONFIGURATIONS.table)
    table["tile"] = {"default": [{"elements": 256, "least_elements": 256}]}
    table["split"] = {"default": [{"programs_per_multiprocessor": 4, "most_splits": 3}]}
    table["join"] = {"default": [{"splits": 2, "channels": 16, "num_warps": 4}]}
    table["parameters"] = {"default": [{"samples": 1, "channels": 16, "num_warps": 4}]}
    if request.param == "loop":
        table["forward"] = table["backward"] = {"default": []}
        table["loop"] = {"default": [{"elements": 128, "positions": 8, "num_warps": 4}]}
    monkeypatch.setattr(kernels.CONFIGURATIONS, "table", table)
    return request.param


def image(
    shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, layout_name: str = "nchw", nhwc: bool = False
) -> Tensor:
    x = (1.7 * torch.randn(shape) + 0.4).to(dtype)
    return layout.channels_last(x) if nhwc or layout_name == "nhwc" else x


def parameters(x: Tensor) -> dict[str, Tensor]:
    batch, channels = x.shape[:2]
    scale, shift = torch.randn(batch, 2 * channels).to(x.dtype).chunk(2, dim=1)
    return {"weight": (1 + torch.randn(channels)).to(x.dtype), "scale": scale, "shift": shift}


def launches(x: Tensor, needs: int = 0b1111) -> list[_triton.Launch]:
    with _triton.record(_triton.KNOWN_DEVICES["9.0"]) as recorded:
        affine = tuple(parameters(x).values())
        _, rstd = kernels.forward(x, *affine, 1)
        kernels.backward(x, x, rstd, *affine, 1, needs)
    return recorded


def names_of_launches(x: Tensor, needs: int = 0b1111) -> list[str]:
    names = [launch.kernel.__name__ for launch in launches(x, needs)]
    return [name.removeprefix("channel_rms_norm_act_").removesuffix("_kernel") for name in names]


def test_what_is_launched() -> None:
    sums, tile, loop = ["backward_join", "norm_parameters"], image((1, 128, 16, 16)), image((1, 8192, 3, 3))
    assert names_of_launches(tile) == ["tile", "backward_tile", *sums]
    assert names_of_launches(tile, needs=1) == ["tile", "backward_tile"]
    assert names_of_launches(image((2, 128, 2, 2))) == ["tile", "backward_tile", "norm_parameters"]
    assert names_of_launches(loop) == ["loop", "backward_means", "backward_apply", *sums]
    assert names_of_launches(loop, needs=1) == ["loop", "backward_means", "backward_apply"]
    assert names_of_launches(loop, needs=2) == ["loop", "backward_apply", *sums]
    assert names_of_launches(image((1, 4096, 3, 3), nhwc=True))[:2] == ["tile", "backward_tile"]
    assert names_of_launches(image((0, 64, 8, 8))) == ["norm_parameters"]


@layouts
@pytest.mark.parametrize("shape", [(1, 512, 64, 64), (1, 128, 256, 256)], ids=str)
def test_one_sample_fills_the_chip(layout_name: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x = layout.channels_last(x) if layout_name == "nhwc" else x
    for launch in launches(x):
        if "tile" in launch.kernel.__name__:
            assert math.prod(launch.grid) >= _triton.KNOWN_DEVICES["9.0"].multiprocessors


@both_ways
@layouts
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(torch.float16, "gelu_tanh"), (torch.bfloat16, "gelu"), (torch.float32, "silu"), (torch.float32, None)],
    ids=str,
)
def test_dtypes_and_activations(way: str, dtype: torch.dtype, layout_name: str, activation: str | None) -> None:
    x = image(dtype=dtype, layout_name=layout_name)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x), activation=activation)


@both_ways
@layouts
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((0, 8, 4, 4), id="no-samples"),
        pytest.param((2, 8, 0, 4), id="no-positions"),
        pytest.param((5, 37), id="rank-2"),
        pytest.param((5, 37, 1), id="one-position"),
        pytest.param((1, 3, 1, 259), id="odd-row"),
        pytest.param((1, 16, 8, 16), id="whole-tiles"),
        pytest.param((1, 8, 3, 5, 7), id="rank-5"),
    ],
)
def test_sizes(way: str, layout_name: str, shape: tuple[int, ...]) -> None:
    x = image(shape, torch.float32, layout_name)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@pytest.mark.parametrize("way", ["loop"], indirect=True)
@layouts
def test_one_channel_is_its_own_norm(way: str, layout_name: str) -> None:
    x = image((3, 1, 5, 7), torch.float32, layout_name).requires_grad_()
    y = ops.channel_rms_norm_act(x, torch.ones(1), activation=None)
    torch.testing.assert_close(y, x.sign())
    assert (torch.autograd.grad(y, x, torch.randn_like(y))[0] == 0).all()


@both_ways
@layouts
@pytest.mark.parametrize("size", [0.0, 1e-14, 3e-11, 1e18, 1e30, 3e38], ids=str)
def test_short_and_long_vectors(way: str, layout_name: str, size: float) -> None:
    """Of those whose squares overflow, PyTorch's norm is infinite: they are held to float64 alone."""
    x = image(layout_name=layout_name)
    x[1, :, 3, 2:6] = size * torch.rand(SHAPE[1], 4).clamp_min(0.1)
    affine = parameters(x)
    if size < 1e19:
        assert_op_as_accurate(ops.channel_rms_norm_act, x, **affine)
        return
    y = ops.channel_rms_norm_act(x, affine["weight"], activation=None)
    truth = (
        torch.nn.functional.normalize(x.double(), dim=1) * SHAPE[1] ** 0.5 * affine["weight"].double()[:, None, None]
    )
    torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=0)


@both_ways
@layouts
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_position_alone(way: str, layout_name: str, value: float) -> None:
    x = image(layout_name=layout_name)
    x[1, 4, 3, 2] = value
    affine = parameters(x)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **affine)
    bad = ops.channel_rms_norm_act(x, **affine).isnan()
    assert bad.sum() == bad[1, :, 3, 2].sum() == (SHAPE[1] if math.isnan(value) else 1)


@both_ways
def test_parameters_of_any_strides_and_dtypes(way: str) -> None:
    x = image((3, 12, 9, 8), torch.bfloat16)
    strided = {"weight": torch.randn(24)[::2], "scale": torch.randn(12, 3).t()}
    strided["shift"] = torch.randn(1, 12).bfloat16().expand(3, 12)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **strided)


@both_ways
@layouts
def test_same_bits_again_and_in_any_batch(way: str, layout_name: str) -> None:
    x = image(layout_name=layout_name)
    affine = parameters(x)
    runs = []
    for _ in range(2):
        leaves = [p.detach().requires_grad_() for p in (x, *affine.values())]
        y = ops.channel_rms_norm_act(leaves[0], **dict(zip(affine, leaves[1:], strict=True)))
        runs.append([y.detach(), *torch.autograd.grad(y, leaves, x)])
    for first, again in zip(*runs, strict=True):
        assert torch.equal(first, again)
    for i in range(2):
        alone = {name: p[i : i + 1] if p.dim() == 2 else p for name, p in affine.items()}
        assert torch.equal(ops.channel_rms_norm_act(x[i : i + 1], **alone), runs[0][0][i : i + 1])


@both_ways
@pytest.mark.parametrize("needed", range(4))
def test_a_gradient_for_one_tensor_alone(way: str, needed: int) -> None:
    x = image()
    arguments: list[Any] = [x, *parameters(x).values()]

    def gradients(which: list[Tensor]) -> tuple[Tensor, ...]:
        y = ops.channel_rms_norm_act(arguments[0], arguments[1], scale=arguments[2], shift=arguments[3])
        return torch.autograd.grad(y, which, x.detach().cos())

    (alone,) = gradients([arguments[needed].requires_grad_()])
    for argument in arguments:
        argument.requires_grad_()
    assert torch.equal(alone, gradients(arguments)[needed])
