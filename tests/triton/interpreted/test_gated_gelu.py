"""gated_gelu in Triton's interpreter: how rows are cut into tiles, and its operators."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_fast import _triton, ops
from imagen_fast.testing import assert_op_as_accurate

kernels = _triton.kernels("gated_gelu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("packed", [False, True], ids=["two-tensors", "packed"])
@pytest.mark.parametrize("shape", [(7, 5), (3, 1472), (1, 10240), (1030, 2)], ids=str)
def test_tiles(shape: tuple[int, int], packed: bool) -> None:
    """Several rows, the last ones missing; several columns, the last ones missing; whole tiles."""
    gate, value = (2 * torch.randn(shape).bfloat16() for _ in range(2))
    assert_op_as_accurate(ops.gated_gelu, *((torch.cat([gate, value], -1),) if packed else (gate, value)))


@pytest.mark.parametrize("architecture", _triton.KNOWN_DEVICES)
@pytest.mark.parametrize("width", [5, 768, 1472, 10240])
def test_tiles_cover_every_element_of_what_a_model_has(architecture: str, width: int) -> None:
    gate = torch.empty(2, 77, 2 * width, dtype=torch.bfloat16, device="meta")
    with _triton.record(_triton.KNOWN_DEVICES[architecture]) as launches:
        kernels.backward(kernels.forward(gate, None, True), gate, None, True, 1)
    assert len(launches) == 2
    for _, grid, arguments in launches:
        rows, columns = math.ceil(154 / arguments["BLOCK_R"]), math.ceil(width / arguments["BLOCK_C"])
        assert math.prod(grid) == rows * columns
        assert arguments["BLOCK_R"] * arguments["BLOCK_C"] <= 2048


@pytest.mark.parametrize("packed", [False, True], ids=["two-tensors", "packed"])
def test_operators(packed: bool) -> None:
    gate = torch.randn(6, 2, 24).transpose(0, 1).bfloat16()
    value = None if packed else torch.randn(2, 6, 24).bfloat16()
    y = ops.gated_gelu(gate, value)  # defines the operators
    forward, backward = (getattr(torch.ops.imagen_fast, f"gated_gelu{part}_triton") for part in ("", "_backward"))
    leaves = [None if x is None else x.detach().requires_grad_() for x in (gate, value)]
    torch.library.opcheck(forward.default, (*leaves, True))
    for needs in (1, 2, 3):
        torch.library.opcheck(backward.default, (torch.randn_like(y), gate, value, True, needs))
