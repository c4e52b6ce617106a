"""The product on packed weights: as accurate as PyTorch's, at every size, stride and instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_fast import _native
from imagen_fast.ops import _packed_linear
from imagen_fast.testing import assert_as_accurate

from .conftest import CAPABILITIES

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the C++ library is not built here")


def random(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) + mean).bfloat16()


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """Ours against PyTorch's product in bfloat16, and float64."""

    def reference(*tensors: Tensor | None) -> Tensor:
        x, weight, bias, add = tensors
        y = F.linear(x, weight, bias)
        return y if add is None else y + add

    ours = _packed_linear.pack(weight).product(x, bias, add)
    truth = reference(*(None if t is None else t.double() for t in (x, weight, bias, add)))
    assert_as_accurate(ours, reference(x, weight, bias, add), truth)
    return ours


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 47, 49, 150])
@pytest.mark.parametrize("columns", [1, 16, 63, 64, 65, 200])
def test_sizes(rows: int, columns: int, capability: str) -> None:
    for terms in (2, 70, 514):
        check(random(rows, terms), random(columns, terms, seed=1))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_add", [False, True])
def test_bias_and_sum(with_bias: bool, with_add: bool, capability: str) -> None:
    bias = random(130, seed=2, mean=3.0) if with_bias else None
    add = random(3, 17, 130, seed=3, mean=-20.0) if with_add else None
    check(random(3, 17, 66), random(130, 66, seed=1), bias, add)


def test_strided_rows(capability: str) -> None:
    """Parts of a packed projection, a window into a sequence, and sequences first."""
    weight, bias = random(96, 64, seed=1), random(96, seed=2)
    x, add = random(2, 21, 192).split(64, dim=2)[1], random(2, 21, 288, seed=3).split(96, dim=2)[2]
    check(x, weight, bias, add)
    check(x[:, 3:9], weight, bias, add[:, 5:11])
    first = random(21, 2, 64).transpose(0, 1)
    assert check(first, weight, bias, add).stride() == (96, 192, 1)
    check(random(2, 3, 5, 64), weight, bias, random(2, 3, 5, 96))
    check(random(4, 64), random(64, 300, seed=4).t()[:130])


def test_one_weight_serves_every_instruction_set() -> None:
    best = _native.cpu_capability()
    weight = random(100, 66, seed=1)
    packed, x = _packed_linear.pack(weight), random(9, 66)
    try:
        for name in CAPABILITIES[: CAPABILITIES.index(best) + 1]:
            _native.set_cpu_capability(name)
            torch.testing.assert_close(packed.product(x), F.linear(x, weight), rtol=2e-2, atol=2e-2)
            assert torch.equal(_packed_linear.pack(weight).packed, packed.packed)
    finally:
        _native.set_cpu_capability(best)


def test_threads_share_panels_and_rows(capability: str) -> None:
    """A thread's part begins and ends within a panel; the result does not depend on how many there are."""
    x, weight = random(331, 130), random(192, 130, seed=1)
    packed, before = _packed_linear.pack(weight), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(packed.product(x))
    finally:
        torch.set_num_threads(before)
    check(x, weight)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = random(14, 66), random(70, 66, seed=1)
    x[3, 5], x[8, 0] = torch.nan, torch.inf
    y = _packed_linear.pack(weight).product(x)
    assert y[3].isnan().all()
    assert not y[8].isfinite().any()
    assert y[[i for i in range(14) if i not in (3, 8)]].isfinite().all()


def test_empty() -> None:
    packed = _packed_linear.pack(random(70, 66))
    assert packed.product(random(0, 66)).shape == (0, 70)
    assert packed.product(random(2, 0, 66)).shape == (2, 0, 70)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.zeros(4, 6), "float32"),
        (random(4, 7), "an odd number of terms"),
        (random(1, 4098), "a panel larger than a cache"),
        (random(0, 4), "no columns"),
    ],
    ids=str,
)
def test_what_it_is_not_for(weight: Tensor, why: str) -> None:
    assert not _packed_linear.is_faster(weight), why


def test_it_is_for_machines_with_the_instruction_and_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, tiles, expected in (
        ("avx512_bf16", "none", True),
        ("avx512_bf16", "hardware", False),
        ("avx512", "none", False),
    ):
        monkeypatch.setattr(_native, "cpu_capability", lambda value=capability: value)
        monkeypatch.setattr(_native, "matrix_tiles", lambda value=tiles: value)
        assert _packed_linear.is_faster(random(4, 6)) == expected


def test_wrong_tensors_are_refused() -> None:
    packed = _packed_linear.pack(random(70, 66))
    with pytest.raises(RuntimeError, match="bfloat16 alone"):
        packed.product(torch.zeros(3, 66))
    with pytest.raises(RuntimeError, match="packed does not fit"):
        packed.product(random(3, 64))
    with pytest.raises(RuntimeError, match="bias must be"):
        packed.product(random(3, 66), bias=random(64))
    with pytest.raises(RuntimeError, match="add does not fit"):
        packed.product(random(3, 66), add=random(3, 64))
    with pytest.raises(RuntimeError, match="even last size"):
        _packed_linear.pack(random(4, 7))


@pytest.mark.parametrize("terms", [(2, 70), (66, 4), (514, 30)], ids=str)
def test_rows_in_two_tensors(terms: tuple[int, int], capability: str) -> None:
    weight = _packed_linear.pack(random(130, sum(terms), seed=1))
    bias, add = random(130, seed=2), random(3, 17, 130, seed=3)
    x, more = (random(3, 17, count, seed=4) for count in terms)
    whole = torch.cat((x, more), dim=-1)
    assert torch.equal(weight.product(x, bias, add, more), weight.product(whole, bias, add))
    assert torch.equal(weight.product(x[0, :1], None, None, more[0, :1]), weight.product(whole[0, :1]))
    with_gaps = torch.zeros(3, 17, 200, dtype=torch.bfloat16)
    with_gaps[..., : terms[1]] = more
    assert torch.equal(weight.product(x, bias, add, with_gaps[..., : terms[1]]), weight.product(whole, bias, add))


def test_rows_that_do_not_continue_others() -> None:
    weight, x = _packed_linear.pack(random(8, 12, seed=1)), random(2, 3, 8)
    for more in (random(2, 4, 4), random(2, 3, 6), random(2, 3, 3), random(2, 3, 4).float()):
        with pytest.raises(RuntimeError, match="packed_linear"):
            weight.product(x, None, None, more)
