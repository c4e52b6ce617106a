"""The CUDA kernels of group_norm_act: every way to cut a tensor into tiles, on devices of several kinds.

What they compute in general is tested in `tests/ops/test_group_norm_act*.py`, which run on these kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast import ops
from imagen_fast.testing import assert_as_accurate, assert_op_as_accurate

Emulator = Callable[..., None]

HOPPER = {"capability": 90, "multiprocessors": 16}
AMPERE = {"capability": 80, "multiprocessors": 16}  # no clusters
ADA = {"capability": 89, "multiprocessors": 16}  # neither clusters nor much shared memory


class Plan(NamedTuple):
    resident: int
    chunks: int
    groups_together: int
    vector: int
    threads: int
    team: int


def plan(x: Tensor, groups: int, backward: bool = False) -> Plan:
    return Plan(*torch.ops.imagen_fast._group_norm_act_cuda_plan(x, groups, backward))


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, nhwc: bool = False) -> Tensor:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if nhwc else x


def parameters(x: Tensor) -> dict[str, Tensor]:
    """weight, bias, scale and shift, as a U-Net has them: scale and shift are halves of one tensor."""
    batch, channels = x.shape[:2]
    scale, shift = torch.randn(batch, 2 * channels).to(x.dtype).chunk(2, dim=1)
    return {"weight": torch.randn(channels), "bias": torch.randn(channels), "scale": scale, "shift": shift}


class Case(NamedTuple):
    device: dict[str, int]
    shape: tuple[int, ...]
    groups: int
    nhwc: bool
    expected: dict[str, int]  # of the plan


# One for each way through the kernels. In bf16 a vector has 8 elements.
WAYS = {
    "block": Case(HOPPER, (2, 24, 8, 8), 4, False, {"resident": 1, "chunks": 1, "vector": 8}),
    "block-elements": Case(HOPPER, (2, 24, 9, 7), 4, False, {"resident": 1, "chunks": 1, "vector": 1}),
    "block-warps-on-a-line": Case(AMPERE, (1, 16, 32, 64), 8, False, {"resident": 1, "vector": 8, "team": 64}),
    "block-nhwc": Case(HOPPER, (2, 64, 8, 9), 4, True, {"resident": 1, "groups_together": 1, "vector": 8}),
    "block-nhwc-groups": Case(HOPPER, (2, 48, 8, 9), 8, True, {"groups_together": 4, "vector": 8}),
    "block-nhwc-22": Case(HOPPER, (2, 22 * 5, 5, 5), 5, True, {"groups_together": 1, "vector": 1}),
    "block-nhwc-22-groups": Case(HOPPER, (2, 22 * 8, 5, 5), 8, True, {"groups_together": 4, "vector": 8}),
    "block-nhwc-rest": Case(HOPPER, (2, 2 * 20, 5, 5), 20, True, {"groups_together": 8, "vector": 8}),
    "block-nhwc-lines": Case(HOPPER, (1, 1042, 1, 3), 2, True, {"vector": 1, "threads": 512, "team": 512}),
    "block-rank-2": Case(HOPPER, (3, 96), 8, False, {"resident": 1, "vector": 8}),
    "cluster-2": Case(HOPPER, (1, 64, 16, 16), 8, False, {"resident": 1, "chunks": 1}),
    "cluster-4": Case(HOPPER, (2, 16, 32, 33), 2, False, {"resident": 1, "chunks": 4, "vector": 8}),
    "cluster-8": Case(HOPPER, (1, 8, 64, 72), 1, False, {"resident": 1, "chunks": 8, "vector": 8}),
    "cluster-8-elements": Case(HOPPER, (1, 7, 71, 67), 1, False, {"resident": 1, "chunks": 8, "vector": 1}),
    "cluster-8-nhwc": Case(HOPPER, (1, 64, 31, 31), 2, True, {"resident": 1, "chunks": 8, "vector": 8}),
    "cluster-8-nhwc-groups": Case(HOPPER, (1, 12, 61, 41), 2, True, {"groups_together": 2, "chunks": 8, "vector": 1}),
    "split": Case(AMPERE, (2, 12, 48, 40), 2, False, {"resident": 0, "vector": 8}),
    "split-elements": Case(AMPERE, (1, 6, 47, 71), 2, False, {"resident": 0, "vector": 1}),
    "split-nhwc": Case(AMPERE, (2, 48, 33, 17), 2, True, {"resident": 0, "vector": 8, "groups_together": 1}),
    "split-nhwc-groups": Case(AMPERE, (1, 24, 47, 41), 6, True, {"resident": 0, "vector": 8, "groups_together": 4}),
    "split-many-channels": Case(ADA, (1, 2304, 3, 8), 1, False, {"resident": 0, "vector": 8}),
    "split-nhwc-many-channels": Case(ADA, (1, 4608, 3, 3), 1, True, {"resident": 0, "vector": 8}),
}
WAYS["cluster-2"] = Case(HOPPER, (1, 64, 24, 24), 8, False, {"resident": 1, "chunks": 2, "vector": 8})

ways = pytest.mark.parametrize("way", WAYS)


def call(way: str, emulator: Emulator, dtype: torch.dtype, **more: Any) -> tuple[Tensor, dict[str, Any]]:
    case = WAYS[way]
    emulator(**case.device, **more)
    x = image(case.shape, dtype, case.nhwc)
    return x, {"num_groups": case.groups, **parameters(x)}


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    x, _ = call(way, emulator, torch.bfloat16)
    for backward in (False, True):
        found = plan(x, WAYS[way].groups, backward)._asdict()
        assert {name: found[name] for name in WAYS[way].expected} == WAYS[way].expected


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_each_way_is_right(way: str, dtype: torch.dtype, emulator: Emulator) -> None:
    x, arguments = call(way, emulator, dtype)
    assert_op_as_accurate(ops.group_norm_act, x, **arguments, activation="gelu")


@pytest.mark.parametrize("way", ["block", "block-nhwc", "cluster-4", "split", "split-nhwc"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", None], ids=str)
def test_each_activation(way: str, activation: str | None, emulator: Emulator) -> None:
    x, arguments = call(way, emulator, torch.bfloat16)
    assert_op_as_accurate(ops.group_norm_act, x, **arguments, activation=activation)


def results(x: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    x = x.detach().requires_grad_()
    y = ops.group_norm_act(x, **(arguments | leaves))
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves.values()], torch.cos(y.detach()))]


@pytest.mark.instrumented
@pytest.mark.parametrize("way", ["block", "block-nhwc-groups", "cluster-2", "split-nhwc"])
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


@ways
def test_large_mean(way: str, emulator: Emulator) -> None:
    """Of the result. (The backward pass starts from a mean that is rounded to fp32, half an ulp of 1000 off.)"""
    x, arguments = call(way, emulator, torch.float32)
    x = x + 1000
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with imagen_fast.use_backend("eager"):
        eager, truth = ops.group_norm_act(x, **arguments), ops.group_norm_act(x.double(), **wide)
    assert_as_accurate(ops.group_norm_act(x, **arguments), eager, truth)


@pytest.mark.parametrize("way", ["block", "block-nhwc-22", "cluster-2", "cluster-8-nhwc", "split", "split-nhwc-groups"])
def test_result_does_not_depend_on_the_batch(way: str, emulator: Emulator) -> None:
    x, arguments = call(way, emulator, torch.bfloat16)
    batch = torch.cat([x.flip(1), x, x.flip(1)])
    batch = batch.movedim(1, -1).contiguous().movedim(-1, 1) if WAYS[way].nhwc else batch
    n = len(x)
    for name in ("scale", "shift"):
        arguments[name] = torch.cat([arguments[name]] * 3)
    alone = ops.group_norm_act(x, **(arguments | {name: arguments[name][:n] for name in ("scale", "shift")}))
    assert torch.equal(ops.group_norm_act(batch, **arguments)[n : 2 * n], alone)


@pytest.mark.parametrize("per_group", [22, 44, 66, 88, 110, 132, 154, 176])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_channels_of_deepfloyd(per_group: int, nhwc: bool, emulator: Emulator) -> None:
    emulator(**HOPPER)
    x = image((2, 4 * per_group, 4, 4), torch.bfloat16, nhwc)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x), activation="gelu")


@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=["hopper", "ampere"])
def test_batches(batch: int, device: dict[str, int], emulator: Emulator) -> None:
    emulator(**device)
    x = image((batch, 8, 32, 33), torch.bfloat16)
    assert_op_as_accurate(ops.group_norm_act, x, 2, **parameters(x))


def test_unaligned_storage(emulator: Emulator) -> None:
    """Dense, but not at a multiple of 16 bytes: taken by elements."""
    emulator(**HOPPER)
    x = torch.randn(1 + 2 * 8 * 8 * 8).to(torch.bfloat16)[1:].view(2, 8, 8, 8)
    assert plan(x, 2).vector == 1
    assert_op_as_accurate(ops.group_norm_act, x, 2, **parameters(x))


def test_gradient_that_is_not_aligned_as_x_is(emulator: Emulator) -> None:
    emulator(**HOPPER)
    x = image((2, 8, 8, 8), torch.bfloat16).requires_grad_()
    dy = torch.randn(1 + x.numel()).to(torch.bfloat16)
    y = ops.group_norm_act(x, 2)
    unaligned = torch.autograd.grad(y, x, dy[1:].view(x.shape), retain_graph=True)[0]
    aligned = torch.autograd.grad(y, x, dy[1:].view(x.shape).clone())[0]
    torch.testing.assert_close(unaligned, aligned)


def test_gradients_of_parameters_alone(emulator: Emulator) -> None:
    for device in (HOPPER, AMPERE):
        emulator(**device)
        x = image((2, 8, 32, 33), torch.bfloat16)
        affine = {name: p.detach().requires_grad_() for name, p in parameters(x).items()}
        y = ops.group_norm_act(x, 2, **affine)
        alone = torch.autograd.grad(y.sum(), list(affine.values()))
        with_x = torch.autograd.grad(ops.group_norm_act(x.requires_grad_(), 2, **affine).sum(), list(affine.values()))
        for expected, found in zip(with_x, alone, strict=True):
            assert torch.equal(expected, found)


# (shape, groups): what DeepFloyd IF, Imagen and its super-resolution normalise
REAL = [((1, 512, 64, 64), 32), ((1, 128, 256, 256), 32), ((1, 2112, 32, 32), 32), ((1, 128, 1024, 1024), 32)]


@pytest.mark.parametrize(("shape", "groups"), REAL, ids=lambda value: str(value))
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_one_sample_fills_an_h200(shape: tuple[int, ...], groups: int, nhwc: bool, emulator: Emulator) -> None:
    emulator(capability=90, multiprocessors=132)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x = torch.empty_strided(shape, x.to(memory_format=torch.channels_last).stride() if nhwc else x.stride()).to(x.dtype)
    for backward in (False, True):
        found = plan(x, groups, backward)
        assert found.vector == 8
        assert groups // found.groups_together * found.chunks >= 120 or (nhwc and found.chunks == 8)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_large_slabs_fit_every_device(capability: int, emulator: Emulator) -> None:
    """Launches are refused by the emulator where a block asks for more shared memory than the device has."""
    emulator(capability=capability, multiprocessors=4)
    x = image((1, 8, 160, 160), torch.bfloat16)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x))
