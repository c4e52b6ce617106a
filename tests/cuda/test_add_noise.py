"""The CUDA kernel of add_noise: accesses of 16 bytes and of single elements, chunks, orders of execution.

What it computes in general is tested in `tests/ops/test_add_noise.py`, which runs on this kernel too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imagen_fast import ops
from imagen_fast.diffusion import linear_betas
from imagen_fast.layout import channels_last
from imagen_fast.testing import assert_op_as_accurate

Emulator = Callable[..., None]


def vector(x0: Tensor, noise: Tensor) -> int:
    return torch.ops.imagen_fast._add_noise_cuda_plan(x0, noise)[0]


def call(way: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int]:
    """Arguments, and how many elements the kernel should access at a time."""
    torch.manual_seed(0)
    wide = 16 // dtype.itemsize
    shape = {
        "vectors": (2, 4, 24, 24),
        "vectors-with-a-rest": (1, 3, 37, 41),
        "a-rest-alone": (1, 1, 1, 3),
        "elements": (2, 3, 37, 41),
        "many-chunks": (1, 3, 120, 128),
    }.get(way, (2, 4, 12, 10))
    x0, noise = (torch.randn(shape).to(dtype) for _ in range(2))
    if way == "nhwc":
        x0, noise = channels_last(x0), channels_last(noise)
    if way == "mixed":
        return (channels_last(x0), noise, linear_betas(9), torch.tensor([3, 8])), 1
    if way == "halves":
        x0, noise = torch.randn(2, 8, 12, 10).to(dtype).chunk(2, dim=1)
        x0 = x0.contiguous()
    if way == "expanded":
        noise = noise[:1].expand(shape)
    if way == "unaligned":
        noise = torch.randn(1 + noise.numel()).to(dtype)[1:].view(shape)
    narrow = way in ("elements", "unaligned")
    return (x0, noise, linear_betas(9), torch.arange(shape[0]) + 3), 1 if narrow else wide


WAYS = ["vectors", "vectors-with-a-rest", "a-rest-alone", "elements", "many-chunks", "nhwc", "mixed", "halves"]
WAYS += ["expanded", "unaligned"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way(way: str, dtype: torch.dtype, emulator: Emulator) -> None:
    arguments, expected = call(way, dtype)
    assert vector(*arguments[:2]) == expected
    assert_op_as_accurate(ops.add_noise, *arguments)
    first = ops.add_noise(*arguments)
    emulator(order="reverse")
    assert torch.equal(ops.add_noise(*arguments), first)


@pytest.mark.instrumented
@pytest.mark.parametrize("way", ["vectors-with-a-rest", "a-rest-alone", "mixed"])
def test_every_access_is_in_order_and_in_bounds(way: str) -> None:
    """What is asserted is that the instrumented process reports nothing."""
    arguments, _ = call(way, torch.bfloat16)
    assert ops.add_noise(*arguments).isfinite().all()


def test_opcheck() -> None:
    arguments, _ = call("nhwc", torch.float32)
    torch.library.opcheck(
        torch.ops.imagen_fast.add_noise_cuda, (arguments[0], arguments[1].requires_grad_(), *arguments[2:])
    )


def test_direct_calls_of_the_operator_are_checked() -> None:
    """What the public op never does, but would read out of bounds."""
    (x0, noise, alphas, timesteps), _ = call("vectors", torch.float32)
    for arguments in (
        (x0, noise[:1], alphas, timesteps),
        (x0, noise.half(), alphas, timesteps),
        (x0[:1].expand(2, 4, 24, 24), noise, alphas, timesteps),
        (x0, noise, alphas.float(), timesteps),
        (x0, noise, alphas, timesteps[:1]),
    ):
        with pytest.raises(RuntimeError, match="add_noise"):
            torch.ops.imagen_fast.add_noise_cuda(*arguments)
