"""The CUDA kernels of attention: every way to cut a problem into tiles, on devices of several kinds.

What they compute in general is tested in `tests/ops/test_attention*.py`, which run on these kernels too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imagen_fast import RelativePositionBias, ops
from imagen_fast.ops._attention_buckets import diagonal_buckets
from imagen_fast.testing import assert_op_as_accurate

Emulator = Callable[..., None]

HOPPER = {"capability": 90, "multiprocessors": 4}
ADA = {"capability": 89, "multiprocessors": 4}  # little shared memory
MANY = {"capability": 90, "multiprocessors": 132}

NAMES = ("q", "k", "v", "context_k", "context_v")

common_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(
    batch: int = 1,
    q_heads: int = 2,
    kv_heads: int = 1,
    queries: int = 19,
    keys: int = 23,
    context: int = 9,
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """In memory (B, L, H, D), as it comes out of a projection."""
    sizes = ((q_heads, queries), (kv_heads, keys), (kv_heads, keys), (kv_heads, context), (kv_heads, context))
    return {
        name: torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)
        for name, (heads, length) in zip(NAMES, sizes, strict=True)
    }


# ---- Tiles


class Plan(NamedTuple):
    rows: int
    warps: int
    stages: int
    query_rows: int
    query_stages: int
    key_rows: int
    key_stages: int


def plan(q: Tensor, k: Tensor, bias: RelativePositionBias | None = None) -> Plan:
    table = None if bias is None else bias.table
    buckets = None if bias is None else diagonal_buckets(bias, q.shape[2], k.shape[2])
    return Plan(*torch.ops.imagen_fast._attention_cuda_plan(q, k, table, buckets))


class Case(NamedTuple):
    device: dict[str, int]
    sizes: dict[str, Any]
    expected: dict[str, int]  # of the plan
    table: bool = False


FP32 = {"dtype": torch.float32}

# One for each template of a kernel, and for each way to make room in shared memory
WAYS = {
    "one-warp": Case(HOPPER, {"queries": 5, "keys": 7}, {"rows": 16, "query_rows": 16, "key_rows": 16, "stages": 2}),
    "few-rows": Case(HOPPER, {"queries": 33, "keys": 30}, {"rows": 48, "query_rows": 48, "key_rows": 32}),
    "small-tiles": Case(MANY, {"queries": 130, "keys": 75}, {"rows": 64, "warps": 4, "query_rows": 64, "key_rows": 64}),
    "large-tiles": Case(
        HOPPER, {"queries": 130, "keys": 401}, {"rows": 128, "warps": 4, "query_rows": 128, "key_rows": 128}
    ),
    "large-tiles-128": Case(
        HOPPER, {"queries": 130, "keys": 401, "width": 128}, {"rows": 128, "warps": 8, "query_rows": 128}
    ),
    "width-256": Case(HOPPER, {"queries": 35, "keys": 40, "width": 256}, {"rows": 48, "stages": 2, "query_stages": 2}),
    "width-256-little-memory": Case(
        ADA, {"queries": 65, "keys": 70, "width": 256}, {"rows": 64, "query_rows": 64, "query_stages": 1}
    ),
    "width-256-table-little-memory": Case(
        ADA, {"queries": 65, "keys": 70, "width": 256}, {"query_rows": 32, "query_stages": 1}, table=True
    ),
    "fp32": Case(HOPPER, {"queries": 40, "keys": 37, **FP32}, {"rows": 48, "stages": 2}),
    "fp32-128": Case(HOPPER, {"queries": 20, "keys": 37, "width": 128, **FP32}, {"stages": 2, "query_stages": 2}),
    "fp32-128-little-memory": Case(
        ADA, {"queries": 65, "keys": 70, "width": 128, **FP32}, {"rows": 64, "stages": 1, "query_rows": 32}
    ),
    "fp32-256": Case(HOPPER, {"queries": 40, "keys": 37, "width": 256, **FP32}, {"rows": 48, "query_rows": 48}),
    "fp32-256-little-memory": Case(
        ADA, {"queries": 40, "keys": 37, "width": 256, **FP32}, {"rows": 48, "stages": 1, "query_rows": 16}, True
    ),
}

ways = pytest.mark.parametrize("way", WAYS)


def call(way: str, emulator: Emulator, **more: Any) -> dict[str, Any]:
    case = WAYS[way]
    emulator(**case.device, **more)
    arguments = inputs(**case.sizes)
    if case.table:
        arguments["bias"] = RelativePositionBias(torch.randn(32, arguments["q"].shape[1]))
    return arguments


@ways
def test_each_way_is_taken(way: str, emulator: Emulator) -> None:
    arguments = call(way, emulator)
    found = plan(arguments["q"], arguments["k"], arguments.get("bias"))._asdict()
    assert {name: found[name] for name in WAYS[way].expected} == WAYS[way].expected


@ways
def test_each_way_is_right(way: str, emulator: Emulator) -> None:
    assert_op_as_accurate(ops.attention, **call(way, emulator))


def results(arguments: dict[str, Any], names: tuple[str, ...] | None = None) -> list[Tensor]:
    """The result, and the gradients of the named arguments, by default of all."""
    given = {}
    for name, x in arguments.items():
        wanted = (names is None or name in names) and (not isinstance(x, Tensor) or x.is_floating_point())
        if isinstance(x, RelativePositionBias):
            given[name] = x._replace(table=x.table.detach().requires_grad_(wanted))
        else:
            given[name] = x.detach().requires_grad_(wanted) if isinstance(x, Tensor) else x
    out = ops.attention(**given)
    tensors = (x.table if isinstance(x, RelativePositionBias) else x for x in given.values())
    leaves = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()))]


def everything(**sizes: Any) -> dict[str, Any]:
    """With T5's bias, a mask, and normalised queries and keys."""
    arguments = inputs(**({"batch": 2, "queries": 37, "keys": 45} | sizes))
    q, keys = arguments["q"], arguments["k"].shape[2] + arguments["context_k"].shape[2]
    scales = {name: 1 + 0.3 * torch.randn(q.shape[3]) for name in ("q_scale", "k_scale")}
    mask = torch.rand(q.shape[0], keys) > 0.3
    return arguments | scales | {"bias": RelativePositionBias(torch.randn(32, q.shape[1])), "key_mask": mask}


def with_bias(*shape: int, **sizes: Any) -> dict[str, Any]:
    return inputs(**({"batch": 2, "queries": 37, "keys": 45} | sizes)) | {"bias": torch.randn(shape)}


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("kind", ["everything", "bias", "fp32"])
def test_blocks_and_threads_in_any_order(kind: str, order: str, emulator: Emulator) -> None:
    """The result is the same to the last bit: nothing depends on who is first."""
    emulator(**HOPPER)
    arguments = {
        "everything": lambda: everything(queries=70),
        "bias": lambda: with_bias(1, 2, 1, 54),
        "fp32": lambda: everything(dtype=torch.float32),
    }[kind]()
    first = results(arguments)
    emulator(order=order, seed=3)
    for expected, found in zip(first, results(arguments), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.instrumented
@pytest.mark.parametrize("kind", ["everything", "bias", "shared-bias", "fp32", "one-stage", "windows", "unaligned"])
def test_every_access_is_in_order_and_in_bounds(kind: str, emulator: Emulator) -> None:
    """What is asserted is that the instrumented process reports nothing."""
    emulator(**(ADA if kind == "one-stage" else HOPPER))
    arguments = {
        "everything": lambda: everything(batch=1, queries=35, keys=70),
        "bias": lambda: with_bias(1, 2, 19, 32, batch=1, queries=19, keys=23),
        "shared-bias": lambda: with_bias(1, 1, 1, 32, queries=35, keys=23),
        "fp32": lambda: everything(batch=1, queries=19, keys=37, dtype=torch.float32),
        "one-stage": lambda: inputs(queries=65, keys=66, q_heads=1, width=256),
        "windows": lambda: everything(batch=1, q_heads=1, queries=19, keys=520, width=8),  # one has 512 columns
        "unaligned": lambda: {name: unaligned(x) for name, x in inputs().items()},
    }[kind]()
    assert all(result.isfinite().all() for result in results(arguments))


# ---- Edges


# Tiles of keys have 64, 32 or 16 rows.
@common_dtypes
@pytest.mark.parametrize(
    ("keys", "context"), [(64, 0), (63, 65), (65, 64), (1, 33), (0, 31), (32, 32), (129, 1)], ids=str
)
def test_edges_of_tiles(keys: int, context: int, dtype: torch.dtype, emulator: Emulator) -> None:
    emulator(**HOPPER)
    assert_op_as_accurate(ops.attention, **inputs(queries=66, keys=keys, context=context, width=72, dtype=dtype))


@pytest.mark.parametrize("width", [8, 24, 56, 120, 248])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_widths_between_those_of_tiles(width: int, dtype: torch.dtype, emulator: Emulator) -> None:
    emulator(**HOPPER)
    assert_op_as_accurate(ops.attention, **inputs(width=width, dtype=dtype))


@common_dtypes
@pytest.mark.parametrize(("queries", "keys"), [(20, 1100), (1100, 20), (530, 515)], ids=str)
def test_more_diagonals_than_fit_at_once(queries: int, keys: int, dtype: torch.dtype, emulator: Emulator) -> None:
    """A block has the bias of 512 columns at a time, and collects the table's gradient so."""
    emulator(**HOPPER)
    arguments = inputs(q_heads=1, queries=queries, keys=keys, width=8, dtype=dtype)
    bias = RelativePositionBias(torch.randn(32, 1), max_distance=800)
    assert_op_as_accurate(ops.attention, **arguments, bias=bias, scale=1.0)


@pytest.mark.parametrize("rows", [7, 300])
def test_any_number_of_buckets(rows: int, emulator: Emulator) -> None:
    emulator(**HOPPER)
    bias = RelativePositionBias(torch.randn(rows, 3), False, 400)
    assert_op_as_accurate(ops.attention, **inputs(2, 3, queries=70, keys=50, dtype=torch.float32), bias=bias)


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"queries": 0}, {"q_heads": 0}, {"keys": 0}, {"keys": 0, "context": 0}, {"queries": 0, "keys": 0}],
    ids=str,
)
@pytest.mark.parametrize("form", ["plain", "table", "normalized", "bias"])
def test_empty(sizes: dict[str, int], form: str, emulator: Emulator) -> None:
    emulator(**HOPPER)
    arguments = inputs(**sizes, dtype=torch.float32)
    if form == "table":
        arguments["bias"] = RelativePositionBias(torch.randn(32, arguments["q"].shape[1]))
    if form == "normalized":
        arguments |= {"q_scale": torch.randn(64), "k_scale": torch.randn(64)}
    if form == "bias":
        arguments["bias"] = torch.randn(arguments["q"].shape[2], 1)
    assert_op_as_accurate(ops.attention, **arguments)


# ---- Memory


def unaligned(x: Tensor) -> Tensor:
    """With an address that is a multiple of an element's size alone."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.transpose(1, 2).shape).transpose(1, 2)
    return storage.copy_(x)


@common_dtypes
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_unaligned_storage(name: str, dtype: torch.dtype, emulator: Emulator) -> None:
    """Copied to shared memory element by element; the result is the same."""
    emulator(**HOPPER)
    arguments = inputs(dtype=dtype)
    moved = {key: unaligned(x) if name in (key, "all") else x for key, x in arguments.items()}
    for expected, found in zip(results(arguments), results(moved), strict=True):
        assert torch.equal(expected, found)


def test_gradient_that_is_not_aligned(emulator: Emulator) -> None:
    emulator(**HOPPER)
    q, k, v = (x.requires_grad_() for x in list(inputs().values())[:3])
    out = ops.attention(q, k, v)
    dout = torch.randn_like(out)
    aligned = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for expected, found in zip(aligned, torch.autograd.grad(out, (q, k, v), unaligned(dout)), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_widest_head_fits_every_device(capability: int, dtype: torch.dtype, emulator: Emulator) -> None:
    """Launches are refused by the emulator where a block asks for more shared memory than the device has."""
    emulator(capability=capability, multiprocessors=1)
    for arguments in (
        everything(batch=1, q_heads=1, queries=66, keys=66, width=256, dtype=dtype),
        with_bias(1, 1, 66, 75, batch=1, q_heads=1, queries=66, keys=66, width=256, dtype=dtype),
    ):
        assert all(result.isfinite().all() for result in results(arguments))


# ---- What results do not depend on


@common_dtypes
def test_result_does_not_depend_on_the_batch(dtype: torch.dtype, emulator: Emulator) -> None:
    """Though a larger batch is cut into larger tiles."""
    emulator(capability=90, multiprocessors=8)
    arguments = inputs(4, queries=130, keys=100, dtype=dtype)
    del arguments["context_k"], arguments["context_v"]
    alone = {name: x[1:2] for name, x in arguments.items()}
    assert plan(alone["q"], alone["k"]).query_rows != plan(arguments["q"], arguments["k"]).query_rows
    for whole, one in zip(results(arguments), results(alone), strict=True):
        assert torch.equal(whole[1:2], one)


def test_gradients_do_not_depend_on_which_are_asked_for(emulator: Emulator) -> None:
    emulator(**HOPPER)
    for arguments in (everything(), with_bias(2, 37, 54), inputs(width=256)):
        together = dict(zip((n for n in arguments if n != "key_mask"), results(arguments)[1:], strict=True))
        for name, expected in together.items():
            assert torch.equal(results(arguments, (name,))[1], expected)


# ---- Biases


@common_dtypes
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 70, 54), (1, 2, 70, 54), (2, 1, 70, 54), (2, 2, 1, 54), (1, 1, 1, 54), (70, 54), (70, 1), (2, 1, 1), ()],
    ids=str,
)
def test_bias_broadcasts(shape: tuple[int, ...], dtype: torch.dtype, emulator: Emulator) -> None:
    emulator(**HOPPER)
    assert_op_as_accurate(ops.attention, **with_bias(*shape, queries=70, width=16, dtype=dtype))


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_bias_that_masks(lowest: float, dtype: torch.dtype, emulator: Emulator) -> None:
    """A row of the lowest finite numbers is attended to evenly, one of -inf not at all."""
    emulator(**HOPPER)
    arguments = inputs(dtype=dtype)
    bias = torch.zeros(1, 1, 19, 32)
    bias[..., 20:] = lowest
    bias[..., 3, :] = lowest
    assert_op_as_accurate(ops.attention, **arguments, bias=bias)
    assert ops.attention(**arguments, bias=bias)[:, :, 3].any() == math.isfinite(lowest)


# ---- The operators


@pytest.mark.parametrize("kind", ["everything", "bias"])
def test_opcheck(kind: str, emulator: Emulator) -> None:
    emulator(**HOPPER)
    arguments = everything(width=16) if kind == "everything" else with_bias(2, 1, 1, 54, width=16)
    bias = arguments.get("bias")
    table = buckets = None
    if isinstance(bias, RelativePositionBias):
        table, buckets, bias = bias.table, diagonal_buckets(bias, 37, 45).clone(), None
    others = (arguments.get(name) for name in ("key_mask", "q_scale", "k_scale"))
    given = [*(arguments[name] for name in NAMES), bias, table, buckets, *others, 0.3]
    operators = torch.ops.imagen_fast
    torch.library.opcheck(operators.attention_cuda.default, given)
    out, lse = operators.attention_cuda(*given)
    for needs in (0b111111111, 0b001100001):
        backward = operators.attention_backward_cuda.default
        torch.library.opcheck(backward, (torch.randn_like(out), out, lse, *given, needs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 3, 6, 16)}, "heads"),
        ({"v": torch.zeros(1, 2, 7, 16)}, "v must have"),
        ({"q": torch.zeros(1, 4, 5, 16, dtype=torch.float64)}, "k must have|float16, bfloat16 and float32"),
        ({"bias": torch.zeros(1, 1, 5, 8)}, "broadcast"),
        ({"table": torch.zeros(8, 4)}, "buckets"),
        ({"table": torch.zeros(8, 4)[:0], "buckets": torch.zeros(10, dtype=torch.int32)}, "table must have rows"),
        ({"q_scale": torch.zeros(16)}, "go together"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_operator_refuses(changes: dict[str, Any], message: str) -> None:
    q, k = torch.zeros(1, 4, 5, 16), torch.zeros(1, 2, 6, 16)
    names = ("context_k", "context_v", "bias", "table", "buckets", "key_mask", "q_scale", "k_scale")
    arguments = {"q": q, "k": k, "v": k, **dict.fromkeys(names), "scale": 1.0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.imagen_fast.attention_cuda(*(arguments | changes).values())
