"""The sampler on the device: model and solver in one CUDA graph, and the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast import _cuda, _native, ops
from imagen_fast.diffusion import DynamicThreshold, StepTable, squaredcos_cap_v2

ALPHAS = squaredcos_cap_v2(1000)
TABLES = {
    "ddpm-learned": StepTable.ddpm(ALPHAS, steps=6, variance="learned_range"),
    "dpm-2m-sde": StepTable.dpm_solver_pp(ALPHAS, steps=6, sde=True),
}
SIDES = (64, 256, 1024)  # x0 is kept by a block, a cluster, the whole grid


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with imagen_fast.use_backend(request.param):
        yield request.param


class Loop:
    """A small model under guidance, and a step of the table. What a step changes stays where it is, the row among it:
    a tensor, so that nothing waits for the host."""

    def __init__(self, table: StepTable, side: int) -> None:
        self.table = table
        channels = 6 if table.learned_variance else 3
        self.model = torch.nn.Conv2d(3, channels, 3, padding=1, device="cuda").requires_grad_(False)
        self.start = torch.zeros(1, 3, side, side, device="cuda")
        self.sample, self.x0 = self.start.clone(), self.start.clone()
        self.index = torch.zeros((), dtype=torch.int64, device="cuda")
        self.seed = torch.zeros(1, dtype=torch.int64, device="cuda")

    def begin(self) -> None:
        self.sample.copy_(self.start)
        self.x0.zero_()
        self.index.zero_()

    def step(self) -> None:
        following, x0 = ops.sampler_step(
            self.sample,
            self.model(self.sample),
            self.table,
            self.index,
            unconditional_output=self.model(0.5 * self.sample),
            guidance=3.0,
            threshold=DynamicThreshold(0.95, max_value=1.5),
            previous_x0=self.x0,
            seed=self.seed,
        )
        self.sample.copy_(following)
        if x0 is not None:
            self.x0.copy_(x0)
        self.index += 1

    def run(self, step: Callable[[], object]) -> Tensor:
        self.begin()
        for _ in range(len(self.table)):
            step()
        return self.sample.clone()


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()  # loads the kernels, outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TABLES)
def test_a_loop_is_one_graph(name: str, side: int, backend: str) -> None:
    loop = Loop(TABLES[name], side)
    with torch.no_grad():
        whole, one = captured(lambda: loop.run(loop.step)), captured(loop.step)
        for seed in range(2):
            loop.start.normal_()
            loop.seed.fill_(seed)
            expected = loop.run(loop.step)
            assert expected.isfinite().all()
            assert torch.equal(loop.run(one.replay), expected)
            whole.replay()
            assert torch.equal(loop.sample, expected)


def test_words_are_the_same_bits_as_on_the_cpu() -> None:
    assert _native.unavailable_reason() is None
    assert _cuda.unavailable_reason() is None
    words, normals = torch.ops.imagen_fast._philox_cuda(
        torch.tensor([2**63 - 5], device="cuda"), 7, 0, 2**32 - 500, 1000
    )
    expected, on_cpu = torch.ops.imagen_fast._philox_cpu(2**63 - 5, 7, 0, 2**32 - 500, 1000)
    assert torch.equal(words.cpu(), expected)
    torch.testing.assert_close(normals.cpu(), on_cpu, rtol=4e-7, atol=0)  # each within 2 ulp of the formula
