"""abs_quantile in Triton's interpreter: digits of the key, samples that several programs share, what is launched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imagen_fast import _triton, layout, ops
from imagen_fast.reference.abs_quantile import abs_quantile as reference

kernels = _triton.kernels("abs_quantile")

PERCENTILES = (0.0, 0.5, 0.995, 1.0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TILE = 256


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def always_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample fits one program, and three programs share one."""
    table = copy.deepcopy(kernels.CONFIGURATIONS.table)
    table["whole"] = {"default": []}
    table["split"] = {"default": [{"tile": TILE, "programs_per_multiprocessor": 3, "num_warps": 4}]}
    monkeypatch.setattr(kernels.CONFIGURATIONS, "table", table)
    device = _triton.KNOWN_DEVICES["9.0"]._replace(multiprocessors=1)
    monkeypatch.setattr(kernels, "device_of", lambda x: device)


def assert_exact(x: Tensor, q: float) -> None:
    """To one ulp of float32."""
    ours, true = ops.abs_quantile(x, q), reference(x.double(), q).float()
    off = (torch.nextafter(true, ours) != ours) & (true != ours) & ~(true.isnan() & ours.isnan())
    assert not off.any(), f"q = {q}, {x.shape}: ours {ours[off]}, true {true[off]}"


def from_bits(*bits: int) -> Tensor:
    return torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "ties": lambda x: (4 * x).round() / 4,
    "two-values": lambda x: x.sign() * (1 + (x > 1)),
    "constant": lambda x: torch.full_like(x, -2.5),
    "zeros-and-one": lambda x: torch.zeros_like(x).index_fill_(1, torch.tensor([0]), 1.0),
    "wide-range": lambda x: (8 * x).exp(),
    "subnormal": lambda x: x * 1e-42,
    "half-infinite": lambda x: torch.where(x > 0, torch.inf, x),
    "infinite": lambda x: torch.full_like(x, -torch.inf),
    "some-nan": lambda x: torch.where(x > 3, torch.nan, x),
    # The next greater value differs in the first digit of the key, in the second or in the third.
    "first-digits": lambda x: 2.0 ** (3 * x).round(),
    "second-digits": lambda x: 1 + x.abs().clamp(max=5).mul(20).round() / 1000,
    "third-digits": lambda x: 1 + x.abs().mul(100).round() * 2**-23,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [TILE, 5 * TILE - 3], ids=str)
@pytest.mark.usefixtures("always_split")
def test_split_values(kind: str, n: int) -> None:
    x = KINDS[kind](torch.randn(1, n))
    for q in PERCENTILES:
        assert_exact(x, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("n", [1, 2, 31, TILE + 1, 3 * TILE + 5])
@pytest.mark.usefixtures("always_split")
def test_split_sizes_and_dtypes(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(2, n).to(dtype)
    for q in (0.0, 1 / 3, 0.9999):
        assert_exact(x, q)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_every_neighbour_by_its_bits(split: bool, request: pytest.FixtureRequest) -> None:
    """Keys around the ends of a digit, in all orders of rank and weight."""
    if split:
        request.getfixturevalue("always_split")
    x = from_bits(
        0, 1, 0x3FF, 0x400, 0x401, 0xFFFFF, 0x100000, 0x100001, 0x3F8FFFFF, 0x3F900000, 0x7F7FFFFF, 0x7F800000
    )
    steps = x.shape[1] - 1
    for rank in range(steps + 1):
        assert ops.abs_quantile(x, rank / steps) == x[0, rank]
        if rank < steps:
            assert_exact(x, (rank + 0.7) / steps)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_ranks_that_are_hit_exactly(split: bool, request: pytest.FixtureRequest) -> None:
    """In float64, as 1 / 3 of 3 is 1; else what lies between 2 and infinity would be infinite."""
    if split:
        request.getfixturevalue("always_split")
    for n in (3, 10, 25):
        for rank in range(n):
            if rank / n * n == rank:
                x = torch.full((1, n + 1), math.inf)
                x[0, : rank + 1] = 2.0
                assert ops.abs_quantile(x, rank / n).item() == 2.0


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0xFF800001, 0xFFFFFFFF], ids=hex)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_every_nan(bits: int, split: bool, request: pytest.FixtureRequest) -> None:
    if split:
        request.getfixturevalue("always_split")
    x = torch.cat([torch.randn(1, 300), from_bits(bits)], dim=1)
    x = torch.cat([x, torch.randn(1, 301), torch.full((1, 301), math.inf)])
    for q in PERCENTILES:
        assert ops.abs_quantile(x, q).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_same_in_any_batch_and_at_any_distance(split: bool, request: pytest.FixtureRequest) -> None:
    if split:
        request.getfixturevalue("always_split")
    x = torch.randn(4, 3, 17, 19)
    expected = torch.cat([ops.abs_quantile(row[None], 0.37) for row in x])
    assert torch.equal(ops.abs_quantile(x, 0.37), expected)
    assert torch.equal(ops.abs_quantile(x[::2], 0.37), expected[::2])
    assert torch.equal(ops.abs_quantile(layout.channels_last(x), 0.37), expected)
    assert torch.equal(ops.abs_quantile(x[:1].expand(2, 3, 17, 19), 0.37), expected[:1].expand(2))
    assert ops.abs_quantile(x[:0], 0.37).shape == (0,)


def test_how_many_programs_there_are_does_not_matter(always_split: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (8 * torch.randn(1, 5 * TILE)).round() / 8
    results = []
    for multiprocessors in (1, 2, 100):
        device = _triton.KNOWN_DEVICES["9.0"]._replace(multiprocessors=multiprocessors)
        monkeypatch.setattr(kernels, "device_of", lambda x, device=device: device)
        results.append(ops.abs_quantile(x, 0.9))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck() -> None:
    ops.abs_quantile(torch.randn(1, 2), 0.5)  # defines the operator
    torch.library.opcheck(torch.ops.imagen_fast.abs_quantile_triton, (torch.randn(2, 50), 0.95))


def test_what_is_launched() -> None:
    def names(*shape: int) -> list[str]:
        with _triton.record(_triton.KNOWN_DEVICES["9.0"]) as launches:
            kernels.forward(torch.empty(shape), 0.5)
        return [launch.kernel.__name__.removeprefix("abs_quantile_").removesuffix("_kernel") for launch in launches]

    assert names(2, 3, 64, 64) == ["whole"]
    assert names(2, 3, 256, 256) == ["count", "count", "count", "finish"]
    assert names(0, 3, 64, 64) == []
