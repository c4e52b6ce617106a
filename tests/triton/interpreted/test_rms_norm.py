"""rms_norm in Triton's interpreter: rows that stay on the chip, rows that are walked, and its operators."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_fast import _triton, ops
from imagen_fast.testing import assert_op_as_accurate

kernels = _triton.kernels("rms_norm")

SMALL = _triton.Device("9.0", 2, 32, 227 * 1024)


@pytest.fixture(params=["stays", "walk"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way on a device of two multiprocessors, in tiles so small that every loop goes round more than once."""
    torch.manual_seed(0)
    table = copy.deepcopy(kernels.CONFIGURATIONS.table)
    rows = [{"up_to": 128, "tile": 128, "programs_per_multiprocessor": 1, "num_warps": 4}]
    table["forward"] = table["backward"] = {"default": rows if request.param == "stays" else []}
    table["forward_walk"] = table["backward_walk"] = {"default": [{"tile": 16, "num_warps": 4}]}
    table["weight_walk"] = {"default": [{"rows": 2, "columns": 16, "programs_per_multiprocessor": 4, "num_warps": 4}]}
    table["join"] = {"default": [{"parts": 2, "columns": 16, "num_warps": 4}]}
    monkeypatch.setattr(kernels.CONFIGURATIONS, "table", table)
    monkeypatch.setattr(kernels, "device_of", lambda x: SMALL)
    return request.param


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, residual: bool = True) -> dict[str, Tensor]:
    call = {"x": 1.7 * torch.randn(shape) + 0.4, "weight": 1 + torch.randn(shape[-1])}
    call |= {"residual": torch.randn(shape)} if residual else {}
    return {name: value.to(dtype) for name, value in call.items()}


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(way: str, dtype: torch.dtype, residual: bool) -> None:
    assert_op_as_accurate(ops.rms_norm, **arguments((2, 7, 40), dtype, residual))


@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (3, 128), (1, 77), (23, 16), (0, 8)], ids=str)
def test_sizes(way: str, shape: tuple[int, ...]) -> None:
    assert_op_as_accurate(ops.rms_norm, **arguments(shape))


def test_strides(way: str) -> None:
    x = torch.randn(2, 6, 72).bfloat16()[..., 24:48]
    residual = torch.randn(6, 2, 24).transpose(0, 1).bfloat16()
    weight = torch.randn(24)
    assert_op_as_accurate(ops.rms_norm, x, weight, residual=residual)
    assert_op_as_accurate(ops.rms_norm, residual, weight, residual=x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(way: str, value: float) -> None:
    call = arguments((9, 40))
    call["x"][4, 7] = value
    assert ops.rms_norm(**call)[0].isfinite().all(-1).sum() == 8
    assert_op_as_accurate(ops.rms_norm, **call)


def test_same_bits_again_and_for_any_number_of_rows(way: str) -> None:
    call = {name: value.requires_grad_() for name, value in arguments((13, 40), torch.bfloat16).items()}

    def run(rows: slice) -> list[Tensor]:
        part = {name: value if name == "weight" else value[rows] for name, value in call.items()}
        y, summed = ops.rms_norm(**part)
        return [y.detach(), *torch.autograd.grad((y, summed), list(part.values()), (summed.detach(), y.detach()))]

    first, again, alone = run(slice(None)), run(slice(None)), run(slice(5, 6))
    assert all(map(torch.equal, first, again))
    for i in (0, 1, 3):  # not the weight's gradient
        assert torch.equal(first[i][5:6], alone[i])


def launches(x: Tensor, residual: Tensor | None, needs: int, architecture: str = "9.0") -> list[Any]:
    weight = torch.empty(x.shape[-1], device="meta")
    with _triton.record(_triton.KNOWN_DEVICES[architecture]) as recorded:
        y, summed, rstd = kernels.forward(x, weight, residual, 1e-6)
        kernels.backward(y, None, x if residual is None else summed, rstd, weight, needs)
    return recorded


@pytest.mark.parametrize("architecture", _triton.KNOWN_DEVICES)
def test_what_is_launched(architecture: str) -> None:
    def names(width: int, needs: int) -> list[str]:
        x = torch.empty(2, 77, width, device="meta", dtype=torch.bfloat16)
        found = launches(x, None, needs, architecture)
        return [launch.kernel.__name__.removeprefix("rms_norm").removesuffix("_kernel") for launch in found]

    for width in (5, 768, 1472, 4096):
        assert names(width, 3) == ["", "_backward", "_join"]
        assert names(width, 1) == ["", "_backward"]
    assert names(10240, 3) == ["", "_backward_walk", "_weight_walk", "_join"]
    assert names(20480, 3) == ["_walk", "_backward_walk", "_weight_walk", "_join"]
    assert names(20480, 1) == ["_walk", "_backward_walk"]
    assert names(20480, 2) == ["_walk", "_weight_walk", "_join"]


@pytest.mark.parametrize("width", [768, 4096, 20480])
def test_programs_have_all_rows_and_fill_the_chip(width: int) -> None:
    x = torch.empty(8, 512, width, device="meta", dtype=torch.bfloat16)
    for launch in launches(x, x, 3):
        arguments, programs = launch.arguments, math.prod(launch.grid)
        rows = arguments.get("rows_of_program", arguments.get("rows_of_part", arguments.get("BLOCK_R", 1)))
        if "join" not in launch.kernel.__name__:
            columns = math.ceil(width / arguments["BLOCK_C"]) if "rows_of_part" in arguments else 1
            assert 4096 <= programs // columns * rows < 4096 + rows
            assert programs >= 120


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_operators(residual: bool) -> None:
    call = arguments((2, 6, 24), torch.bfloat16, residual)
    x, weight, added = call["x"].transpose(0, 1), call["weight"], call.get("residual")
    added = None if added is None else added.transpose(0, 1).contiguous()
    ops.rms_norm(x, weight)  # defines the operators
    forward, backward = (getattr(torch.ops.imagen_fast, f"rms_norm{part}_triton") for part in ("", "_backward"))
    leaves = [None if p is None else p.detach().requires_grad_() for p in (x, weight, added)]
    torch.library.opcheck(forward.default, (*leaves, 1e-6))
    y, summed, rstd = forward(x, weight, added, 1e-6)
    for needs in (1, 2, 3):
        saved = summed if residual else x
        torch.library.opcheck(backward.default, (y, summed if residual else None, saved, rstd, weight, needs))
