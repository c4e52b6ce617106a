"""Tensors of more than 2^31 elements: an offset of 32 bits would wrap."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import imagen_fast
from imagen_fast import ops

POSITIONS = 2**26 + 24  # of 16 channels, twice: past 2^31


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB on the device")
    with imagen_fast.use_backend(request.param):
        yield request.param


def image(channels_last: bool) -> torch.Tensor:
    shape = (2, POSITIONS, 16) if channels_last else (2, 16, POSITIONS)
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    return x.transpose(1, 2) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_channel_rms_norm_act(channels_last: bool, backend: str) -> None:
    x, weight = image(channels_last), torch.ones(16, device="cuda")
    with torch.no_grad():
        whole = ops.channel_rms_norm_act(x, weight)
        end = ops.channel_rms_norm_act(x[1:, :, -1024:].clone(), weight)
    torch.testing.assert_close(whole[1:, :, -1024:], end)
    assert end.float().std() > 0.1


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_group_norm_act(channels_last: bool, backend: str) -> None:
    x = image(channels_last)
    with torch.no_grad():
        whole = ops.group_norm_act(x, 4)
        alone = ops.group_norm_act(x[1:], 4)
    torch.testing.assert_close(whole[1:], alone)
    assert whole[1].float().std() > 0.1


def sequences(width: int) -> torch.Tensor:
    x = torch.randn(2, 2**30 // width + 24, width, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    return x


def test_rms_norm(backend: str) -> None:
    """Forward and backward."""
    x, weight = sequences(64).requires_grad_(), torch.ones(64, device="cuda")
    end = x.detach()[1:, -1024:].clone().requires_grad_()
    whole, alone = ops.rms_norm(x, weight), ops.rms_norm(end, weight)
    torch.testing.assert_close(whole[1:, -1024:], alone)
    assert alone.float().std() > 0.1
    (dx,) = torch.autograd.grad(whole, x, whole.detach())
    (expected,) = torch.autograd.grad(alone, end, alone.detach())
    torch.testing.assert_close(dx[1:, -1024:], expected)


def test_gated_gelu(backend: str) -> None:
    """Forward and backward, from one packed tensor, whose halves are read where they are."""
    packed = sequences(128).requires_grad_()
    end = packed.detach()[1:, -1024:].clone().requires_grad_()
    whole, alone = ops.gated_gelu(packed), ops.gated_gelu(end)
    torch.testing.assert_close(whole[1:, -1024:], alone)
    assert alone.float().std() > 0.1
    (dpacked,) = torch.autograd.grad(whole, packed, whole.detach())
    (expected,) = torch.autograd.grad(alone, end, alone.detach())
    torch.testing.assert_close(dpacked[1:, -1024:], expected)
