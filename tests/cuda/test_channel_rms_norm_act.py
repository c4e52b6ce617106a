"""The CUDA kernels of channel_rms_norm_act: every way to cut a tensor into tiles, on devices of several kinds.

What they compute in general is tested in `tests/ops/test_channel_rms_norm_act*.py`, which run on these kernels too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imagen_fast import ops
from imagen_fast.testing import assert_op_as_accurate

Emulator = Callable[..., None]

LARGE = {"capability": 90, "multiprocessors": 16}
SMALL = {"capability": 89, "multiprocessors": 1}  # so that blocks have several tiles; and little shared memory


class Plan(NamedTuple):
    resident: int
    positions: int
    vector: int
    threads: int
    team: int
    lanes: int
    blocks: int
    tiles: int


def plan(x: Tensor, backward: bool = False) -> Plan:
    return Plan(*torch.ops.imagen_fast._channel_rms_norm_act_cuda_plan(x, backward))


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, nhwc: bool = False) -> Tensor:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if nhwc else x


def parameters(x: Tensor) -> dict[str, Tensor]:
    """weight, scale and shift, as a U-Net has them: scale and shift are halves of one tensor."""
    batch, channels = x.shape[:2]
    scale, shift = torch.randn(batch, 2 * channels).to(x.dtype).chunk(2, dim=1)
    return {"weight": torch.randn(channels), "scale": scale, "shift": shift}


class Case(NamedTuple):
    device: dict[str, int]
    shape: tuple[int, ...]
    nhwc: bool
    expected: dict[str, int]  # of the plan of the backward pass


# One for each way through the kernels. In bf16 a vector has 8 elements.
WAYS = {
    "nchw": Case(LARGE, (2, 48, 9, 8), False, {"resident": 1, "vector": 8, "tiles": 1}),
    "nchw-elements": Case(LARGE, (2, 48, 9, 7), False, {"resident": 1, "vector": 1, "tiles": 1}),
    "nchw-tiles": Case(SMALL, (2, 10, 47, 56), False, {"resident": 1, "vector": 8, "blocks": 6, "tiles": 2}),
    "nchw-tiles-elements": Case(SMALL, (1, 5, 19, 31), False, {"vector": 1, "blocks": 7, "tiles": 3}),
    "nchw-one-block": Case(LARGE, (2, 40, 3, 8), False, {"vector": 8, "blocks": 1}),
    "nchw-many-blocks": Case(LARGE, (1, 40, 24, 24), False, {"vector": 8, "blocks": 18, "tiles": 1}),
    "nchw-many-channels": Case(SMALL, (1, 2309, 3, 8), False, {"resident": 0, "vector": 8}),
    "nhwc": Case(LARGE, (2, 48, 9, 7), True, {"resident": 1, "vector": 8, "lanes": 8, "tiles": 1}),
    "nhwc-elements": Case(LARGE, (2, 45, 9, 7), True, {"resident": 1, "vector": 1, "lanes": 32, "tiles": 1}),
    "nhwc-tiles": Case(SMALL, (2, 520, 1, 83), True, {"vector": 8, "team": 65, "blocks": 6, "tiles": 2}),
    "nhwc-warps-on-a-line": Case(LARGE, (1, 1032, 3, 3), True, {"vector": 8, "lanes": 32, "team": 129}),
    "nhwc-lines": Case(LARGE, (1, 777, 1, 3), True, {"vector": 1, "threads": 512, "team": 512}),
    "nhwc-many-channels": Case(SMALL, (1, 24600, 1, 3), True, {"resident": 0, "vector": 8, "team": 512}),
    "rank-2": Case(LARGE, (3, 96), False, {"vector": 8, "positions": 1, "blocks": 1}),
}

ways = pytest.mark.parametrize("way", WAYS)


def call(way: str, emulator: Emulator, dtype: torch.dtype, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    case = WAYS[way]
    emulator(**case.device, **more)
    x = image(case.shape, dtype, case.nhwc)
    return x, parameters(x)


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    x, _ = call(way, emulator, torch.bfloat16)
    found = plan(x, backward=True)._asdict()
    assert {name: found[name] for name in WAYS[way].expected} == WAYS[way].expected


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_each_way_is_right(way: str, dtype: torch.dtype, emulator: Emulator) -> None:
    x, arguments = call(way, emulator, dtype)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **arguments, activation="gelu")


@pytest.mark.parametrize("way", ["nchw", "nhwc", "nhwc-elements"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", None], ids=str)
def test_each_activation(way: str, activation: str | None, emulator: Emulator) -> None:
    x, arguments = call(way, emulator, torch.bfloat16)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **arguments, activation=activation)


def results(x: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    x = x.detach().requires_grad_()
    y = ops.channel_rms_norm_act(x, **leaves)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves.values()], torch.cos(y.detach()))]


@pytest.mark.instrumented
@pytest.mark.parametrize("way", ["nchw", "nchw-tiles", "nhwc-tiles", "nhwc-elements"])
def test_every_access_is_in_order_and_in_bounds(way: str, emulator: Emulator) -> None:
    """What is asserted is that the instrumented process reports nothing."""
    x, arguments = call(way, emulator, torch.bfloat16)
    assert all(result.isfinite().all() for result in results(x, arguments))


@ways
def test_blocks_and_threads_in_any_order(way: str, emulator: Emulator) -> None:
    """The result is the same to the last bit: nothing depends on who is first."""
    x, arguments = call(way, emulator, torch.bfloat16)
    first = results(x, arguments)
    for order in ("reverse", "random"):
        emulator(order=order, seed=3)
        for expected, found in zip(first, results(x, arguments), strict=True):
            assert torch.equal(expected, found)


@pytest.mark.parametrize("way", ["nchw", "nchw-elements", "nchw-many-channels", "nhwc", "nhwc-many-channels"])
def test_squares_that_overflow(way: str, emulator: Emulator) -> None:
    """Held to float64 alone: PyTorch's norm is infinite."""
    x, arguments = call(way, emulator, torch.float32)
    x[:, :, 1:] *= 5e37
    y = ops.channel_rms_norm_act(x, arguments["weight"], activation=None)
    root = math.sqrt(x.shape[1])
    truth = torch.nn.functional.normalize(x.double(), dim=1) * root * arguments["weight"].double()[:, None, None]
    torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("way", ["nchw-tiles", "nhwc-tiles", "nhwc-elements"])
def test_result_does_not_depend_on_the_batch(way: str, emulator: Emulator) -> None:
    x, arguments = call(way, emulator, torch.bfloat16)
    batch = torch.cat([x.flip(1), x, x.flip(1)])
    batch = batch.movedim(1, -1).contiguous().movedim(-1, 1) if WAYS[way].nhwc else batch
    n = len(x)
    repeated = arguments | {name: torch.cat([arguments[name]] * 3) for name in ("scale", "shift")}
    alone = ops.channel_rms_norm_act(x, **arguments)
    assert torch.equal(ops.channel_rms_norm_act(batch, **repeated)[n : 2 * n], alone)


@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("device", [LARGE, SMALL], ids=["large", "small"])
def test_batches(batch: int, device: dict[str, int], emulator: Emulator) -> None:
    emulator(**device)
    x = image((batch, 8, 17, 24), torch.bfloat16)
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


def test_unaligned_storage(emulator: Emulator) -> None:
    """Dense, but not at a multiple of 16 bytes: taken by elements."""
    emulator(**LARGE)
    x = torch.randn(1 + 2 * 8 * 8 * 8).to(torch.bfloat16)[1:].view(2, 8, 8, 8)
    assert plan(x).vector == 1
    assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))


@pytest.mark.parametrize("way", ["nchw-tiles", "nhwc"])
@pytest.mark.parametrize("needed", range(4))
def test_a_gradient_for_one_tensor_alone(way: str, needed: int, emulator: Emulator) -> None:
    x, affine = call(way, emulator, torch.bfloat16)
    arguments = [x, *affine.values()]

    def gradients(which: list[Tensor]) -> tuple[Tensor, ...]:
        y = ops.channel_rms_norm_act(arguments[0], arguments[1], scale=arguments[2], shift=arguments[3])
        return torch.autograd.grad(y, which, x.detach().cos())

    (alone,) = gradients([arguments[needed].requires_grad_()])
    for argument in arguments:
        argument.requires_grad_()
    assert torch.equal(alone, gradients(arguments)[needed])


# What imagen-pytorch normalises
REAL = [(1, 512, 64, 64), (1, 128, 256, 256), (1, 128, 1024, 1024)]


@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_one_sample_fills_an_h200(shape: tuple[int, ...], nhwc: bool, emulator: Emulator) -> None:
    emulator(capability=90, multiprocessors=132)
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    for backward in (False, True):
        found = plan(x, backward)
        assert (found.resident, found.vector) == (1, 8)
        assert 132 <= found.blocks <= (8 * 132 if backward else math.inf)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_many_channels_fit_every_device(capability: int, emulator: Emulator) -> None:
    """Launches are refused by the emulator where a block asks for more shared memory than the device has."""
    emulator(capability=capability, multiprocessors=1)
    for channels in (2048, 2816):
        x = image((1, channels, 2, 8), torch.bfloat16)
        assert_op_as_accurate(ops.channel_rms_norm_act, x, **parameters(x))
