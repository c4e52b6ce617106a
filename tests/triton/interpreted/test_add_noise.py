"""add_noise in Triton's interpreter: what is read as it is given, tiles at the edge, what is launched."""

from __future__ import annotations

import copy

import pytest
import torch

from imagen_fast import _triton, layout, ops
from imagen_fast.diffusion import linear_betas
from imagen_fast.testing import assert_op_as_accurate

kernels = _triton.kernels("add_noise")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a sample has many, with an edge in either direction."""
    table = copy.deepcopy(kernels.CONFIGURATIONS.table)
    table["forward"] = {"default": [{"tile": 64, "channels": 2, "num_warps": 4}]}
    monkeypatch.setattr(kernels.CONFIGURATIONS, "table", table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layouts", ["nchw-nchw", "nchw-nhwc", "nhwc-nchw", "nhwc-nhwc"])
@pytest.mark.usefixtures("small_tiles")
def test_tiles_at_the_edge(layouts: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 5, 7, 11).to(dtype) for _ in range(2)]
    x0, noise = (
        layout.channels_last(x) if name == "nhwc" else x for x, name in zip(tensors, layouts.split("-"), strict=True)
    )
    assert_op_as_accurate(ops.add_noise, x0, noise, linear_betas(50), torch.tensor([7, 49]))


def test_timesteps_out_of_range_spoil_their_own_sample_alone() -> None:
    x0, noise = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    for dtype in (torch.int32, torch.int64):
        y = ops.add_noise(x0, noise, linear_betas(50), torch.tensor([0, 50, -1, 49], dtype=dtype))
        assert y[1:3].isnan().all()
        assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_schedules_and_timesteps_are_read_as_they_are(dtype: torch.dtype) -> None:
    x0, noise, alphas = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5), linear_betas(50).to(dtype)
    timesteps = torch.tensor([3, 0, 9])
    expected = ops.add_noise(x0, noise, alphas, timesteps)
    strided = timesteps.repeat_interleave(2).int()[::2]
    assert torch.equal(ops.add_noise(x0, noise, alphas.repeat_interleave(3)[::3], strided), expected)
    assert torch.equal(ops.add_noise(x0, noise, alphas, 9)[2], expected[2])
    assert_op_as_accurate(ops.add_noise, x0, noise, alphas, timesteps)


def test_samples_at_one_timestep_add_up_in_the_gradient_of_the_schedule() -> None:
    assert_op_as_accurate(
        ops.add_noise, torch.randn(5, 2, 6, 6), torch.randn(5, 2, 6, 6), linear_betas(9), torch.tensor([3, 3, 8, 3, 0])
    )


def test_opcheck() -> None:
    ops.add_noise(torch.randn(1, 2), torch.randn(1, 2), linear_betas(9), 0)  # defines the operator
    arguments = (torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4, requires_grad=True), linear_betas(9))
    torch.library.opcheck(torch.ops.imagen_fast.add_noise_triton, (*arguments, torch.tensor([1, 8, 0])))


def test_samples_of_one_layout_are_read_as_rows() -> None:
    nchw = torch.randn(2, 3, 64, 64)
    nhwc = layout.channels_last(nchw)
    for x0, noise, channels in ((nchw, nchw, 1), (nhwc, nhwc, 1), (nchw, nhwc, 3), (nhwc, nchw, 3)):
        with _triton.record(_triton.KNOWN_DEVICES["9.0"]) as launches:
            kernels.forward(x0, noise, linear_betas(9), torch.tensor([1, 2]))
        assert [launch.arguments["channels"] for launch in launches] == [channels]
