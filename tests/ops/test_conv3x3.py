"""The 3x3 convolution behind accelerated models: as accurate as PyTorch's, for every size and remainder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_fast import _native
from imagen_fast.ops import _conv3x3
from imagen_fast.testing import assert_as_accurate, assert_model_as_accurate

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (
        (mean + scale * torch.randn(shape, generator=generator))
        .to(dtype)
        .contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    )


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> None:
    def eager(*tensors: Tensor | None) -> Tensor:
        x, weight, bias, add = tensors
        y = F.conv2d(x, weight, bias, padding=1)
        return y if add is None else y + add

    ours = _conv3x3.conv3x3(x, _conv3x3.transformed(weight), bias, add, weight.shape[0])
    expected = eager(x, weight, bias, add)
    assert ours.shape == expected.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    truth = eager(*(None if t is None else t.double() for t in (x, weight, bias, add)))
    assert_as_accurate(ours, expected, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [
        ((1, 16, 1, 1), 16),
        ((2, 16, 5, 7), 80),
        ((1, 48, 4, 4), 64),
        ((3, 32, 9, 2), 144),
        ((1, 16, 83, 81), 16),  # more tiles than go through together
        ((0, 16, 8, 8), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("with_add", [True, False], ids=["add", "no-add"])
def test_every_size(
    kernel: str,
    poisoned_memory: None,
    shape: tuple[int, int, int, int],
    out_channels: int,
    with_bias: bool,
    with_add: bool,
    dtype: torch.dtype,
) -> None:
    x = random(*shape, dtype=dtype)
    weight = random(out_channels, shape[1], 3, 3, dtype=dtype, scale=shape[1] ** -0.5 / 3)
    bias = random(out_channels, dtype=dtype) if with_bias else None
    add = random(shape[0], out_channels, *shape[2:], dtype=dtype) if with_add else None
    compare(x, weight, bias, add)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "scale"), [(100.0, 1.0), (0.0, 300.0), (0.0, 1e-3)])
def test_every_range(kernel: str, dtype: torch.dtype, mean: float, scale: float) -> None:
    x = random(2, 32, 12, 13, dtype=dtype, mean=mean, scale=scale)
    compare(x, random(32, 32, 3, 3, dtype=dtype, scale=0.05), random(32, dtype=dtype), None)


@pytest.mark.parametrize("channels", [64, 512])
def test_float32_is_as_accurate_as_eager_in_nchw(kernel: str, channels: int) -> None:
    """To 1.5 times its error, as models are held to it; the floor of single results would hide what sums round away."""
    x = random(1, channels, 8, 9, dtype=torch.float32)
    weight = random(channels, channels, 3, 3, dtype=torch.float32, scale=channels**-0.5 / 3)
    ours = _conv3x3.conv3x3(x, _conv3x3.transformed(weight), None, None, channels)
    eager = F.conv2d(x.contiguous(), weight.contiguous(), padding=1)
    assert_model_as_accurate(ours, eager, F.conv2d(x.double(), weight.double(), padding=1))


def test_wrong_arguments_are_refused() -> None:
    if _native.unavailable_reason():
        pytest.skip("needs the cpu backend")
    x, weight = random(1, 16, 8, 8, dtype=torch.bfloat16), _conv3x3.transformed(torch.randn(32, 16, 3, 3).bfloat16())
    bias, add = random(32, dtype=torch.bfloat16), random(1, 32, 8, 8, dtype=torch.bfloat16)
    for arguments in (
        (x.contiguous(), weight, bias, add, 32),
        (x.double(), weight, bias, add, 32),
        (x[:, :8].contiguous(memory_format=torch.channels_last), weight, bias, add, 32),
        (x, weight[:35], bias, add, 32),
        (x, weight[:15], bias, add, 32),
        (x, weight.half(), bias, add, 32),
        (x, weight, bias[:31], add, 32),
        (x, weight, bias.float(), add, 32),
        (x, weight, bias, add[:, :16], 32),
        (x, weight, bias, add.contiguous(), 32),
        (x, weight, bias, add, 96),
    ):
        with pytest.raises(RuntimeError, match="conv3x3"):
            _conv3x3.conv3x3(*arguments)
