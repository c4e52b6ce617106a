"""The noise that the step draws: known answers, the same bits on every kernel, normal, and without correlations."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from imagen_fast import _native, backends, layout, ops, use_backend
from imagen_fast.diffusion import StepTable, squaredcos_cap_v2
from imagen_fast.reference import philox

# The noise is all that is left of a step from x = 0 to a model that says 0.
TABLE = StepTable.ddpm(squaredcos_cap_v2(1000), steps=10, variance="fixed_large")
SCALE = [TABLE.row(i)["noise_scale"] for i in range(10)]

# Kernels for a GPU take no float64, in which the normals show as they are.
EMULATED = any(backends._EMULATED.values())
WIDEST = torch.float32 if EMULATED else torch.float64


def noise(shape: tuple[int, ...], seed: int | Tensor, row: int = 3, dtype: torch.dtype = WIDEST) -> Tensor:
    zero = torch.zeros(shape, dtype=dtype)
    following, _ = ops.sampler_step(zero, zero, TABLE, row, seed=seed)
    return following.double() / SCALE[row]


def stream(kernel: str, seed: int, row: int, stage: int, first: int, counters: int) -> tuple[Tensor, Tensor]:
    """Words and normals, (counters, 4) each."""
    if kernel == "cuda":
        return torch.ops.imagen_fast._philox_cuda(torch.tensor([seed]), row, stage, first, counters)
    _native.load()
    return torch.ops.imagen_fast._philox_cpu(seed, row, stage, first, counters)


def test_known_answers() -> None:
    """Of Random123, the reference implementation (file kat_vectors)."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for (*counter, k0, k1), expected in (
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        tensors = [torch.tensor(word) for word in (*counter, k0, k1)]
        assert tuple(int(word) for word in philox.philox(tuple(tensors[:4]), (tensors[4], tensors[5]))) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0])
@pytest.mark.parametrize("row", [0, 7, 2**31])
def test_words_are_the_same_bits_on_every_kernel(kernel: str, seed: int, row: int) -> None:
    words, normals = stream(kernel, seed, row, 0, 0, 1003)
    reference = philox.words(torch.tensor([seed]), 1003, row)[0]
    assert torch.equal(words.long() & 0xFFFFFFFF, reference)
    assert _ulps(normals.flatten(), philox.normals(torch.tensor([seed]), 4012, row)[0]).max() <= 2


def _ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many float32 lie between a and b."""
    ordered = [torch.where(i < 0, -(i & 0x7FFFFFFF), i) for i in (x.view(torch.int32).long() for x in (a, b))]
    return (ordered[0] - ordered[1]).abs()


def test_counters_past_32_bits(kernel: str) -> None:
    first = 2**32 - 5
    words, _ = stream(kernel, 9, 1, 2, first, 20)
    e = torch.arange(first, first + 20)
    expected = philox.philox(
        (e & 0xFFFFFFFF, e >> 32, torch.tensor(1), torch.tensor(2)), (torch.tensor(9), torch.tensor(0))
    )
    assert torch.equal(words.long() & 0xFFFFFFFF, torch.stack(expected, dim=1))


def test_normals_are_within_2_ulp_over_many(kernel: str) -> None:
    _, normals = stream(kernel, 5, 0, 0, 0, 50_000)
    assert _ulps(normals.flatten(), philox.normals(torch.tensor([5]), 200_000, 0)[0]).max() <= 2


def test_first_normals_by_hand() -> None:
    """The definition, written out once more with Python's own numbers."""

    def float32(value: float) -> float:
        return struct.unpack("f", struct.pack("f", value))[0]

    w = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # of seed 0, row 0
    expected = []
    for a, b in ((w[0], w[1]), (w[2], w[3])):
        u = float32(float32(a) * 2**-32 + 2**-33)
        f = float32(b - 2**32 if b >= 2**31 else b) * 2**-32
        radius = math.sqrt(-2 * math.log(u))
        expected += [radius * math.cos(2 * math.pi * f), radius * math.sin(2 * math.pi * f)]
    torch.testing.assert_close(philox.normals(torch.tensor([0]), 4, 0)[0], torch.tensor(expected), rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (3, 5), (1, 3, 33, 35), (2, 1, 1, 1)], ids=str)
def test_noise_goes_by_the_place_in_the_sample(kernel: str, shape: tuple[int, ...]) -> None:
    """Whatever the layout, the batch and the dtype are."""
    seeds = torch.arange(shape[0]) + 40
    expected = philox.normals(seeds, math.prod(shape[1:]), 3).view(shape).double()
    drawn = noise(shape, seeds)
    rounded_twice = 1.2e-7 * 2 if EMULATED else 0.0  # the scale of the noise, and the result
    torch.testing.assert_close(drawn, expected, rtol=3e-7 + rounded_twice, atol=1e-30)
    assert torch.equal(drawn, noise(shape, 40))
    zero = layout.channels_last(torch.zeros(shape, dtype=WIDEST))
    assert torch.equal(ops.sampler_step(zero, zero, TABLE, 3, seed=40)[0].double() / SCALE[3], drawn)
    for b in range(shape[0]):
        assert torch.equal(noise((1, *shape[1:]), 40 + b), drawn[b : b + 1])
    narrow = noise(shape, seeds, dtype=torch.float32).double()
    torch.testing.assert_close(narrow, expected, rtol=1e-6, atol=1e-7)


def test_backends_agree_to_rounding() -> None:
    with use_backend("eager"):
        eager = noise((2, 3, 16, 16), 7)
    with use_backend("cpu"):
        torch.testing.assert_close(noise((2, 3, 16, 16), 7), eager, rtol=3e-7, atol=1e-30)


def test_integer_seeds_of_any_size_wrap_around(backend: str) -> None:
    top = torch.tensor([2**63 - 1, -(2**63)])
    assert torch.equal(noise((2, 3, 4), 2**63 - 1), noise((2, 3, 4), top))
    assert torch.equal(noise((2, 3, 4), 2**64 - 1), noise((2, 3, 4), torch.tensor([-1, 0])))
    assert torch.equal(noise((2, 3, 4), -(2**64) + 5), noise((2, 3, 4), 5))


def test_a_compiled_step_takes_integer_seeds_of_any_size(backend: str) -> None:
    """The graph's integers are of 64 bits; seeds that have more get graphs of their own."""
    if backend != "cpu":
        pytest.skip("the same for all of them, and plain PyTorch's Philox takes long to compile")
    torch._dynamo.reset()
    zero = torch.zeros(2, 3, 4, 4)

    def step(seed: int) -> Tensor:
        return ops.sampler_step(zero, zero, TABLE, 3, seed=seed)[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for seed in (17, -(2**63), 2**64 - 5):
        assert torch.equal(compiled(seed), step(seed))


def test_noise_is_normal(kernel: str) -> None:
    """Kolmogorov and Smirnov, at a significance of 1e-6; and the first four moments."""
    z = noise((4, 3, 250, 250), 11).flatten()
    n = len(z)
    below = torch.special.ndtr(z.sort().values)
    place = torch.arange(n, dtype=torch.float64)
    statistic = torch.maximum((place + 1) / n - below, below - place / n).max().item() * math.sqrt(n)
    assert statistic < math.sqrt(-0.5 * math.log(1e-6 / 2))
    for power, (mean, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), start=1):
        assert abs((z**power).mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert z.abs().max() > 4.5


def test_noise_is_not_correlated(backend: str) -> None:
    """Across samples, neighbouring places, channels, rows and seeds."""
    first = noise((2, 3, 100, 100), 0, row=1)
    n = first[0].numel()
    others = {
        "sample": (first[0], first[1]),
        "row": (first[0], noise((1, 3, 100, 100), 0, row=2)[0]),
        "seed": (first[0], noise((1, 3, 100, 100), 2**32)[0]),
        "channel": (first[0, 0], first[0, 1]),
        **{f"place + {k}": (first[0].flatten()[k:], first[0].flatten()[:-k]) for k in (1, 2, 3, 4, 100)},
        "squares": (first[0].flatten()[1::2] ** 2 - 1, first[0].flatten()[::2] ** 2 - 1),
    }
    for name, (a, b) in others.items():
        correlation = (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
        assert abs(correlation) < 5 / math.sqrt(a.numel()), f"{name}: {correlation} over {n}"
