"""What the step promises besides its numbers: indices on the device, what is returned, errors, compilation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import imagen_fast
from imagen_fast import layout, ops
from imagen_fast.diffusion import DynamicThreshold, Guidance, StepTable, squaredcos_cap_v2

ALPHAS = squaredcos_cap_v2(1000)
LEARNED = StepTable.ddpm(ALPHAS, steps=6, variance="learned_range")
DDIM = StepTable.ddim(ALPHAS, steps=6)
MULTISTEP = StepTable.dpm_solver_pp(ALPHAS, steps=6)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(*channels: int, batch: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, c, 6, 5) for c in channels)


class Spy(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("table", [LEARNED, DDIM, MULTISTEP], ids=["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_an_index_on_the_device_does_the_same(backend: str, table: StepTable, dtype: torch.dtype) -> None:
    sample, output, previous = images(3, 6, 3)
    for i in range(len(table)):
        given = {"previous_x0": previous, "seed": 5, "threshold": DynamicThreshold(0.9), "return_x0": True}
        expected = ops.sampler_step(sample, output, table, i, **given)
        result = ops.sampler_step(sample, output, table, torch.tensor(i, dtype=dtype), **given)
        for y, e in zip(result, expected, strict=True):
            torch.testing.assert_close(y, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [-1, 6, 2**40])
def test_an_index_on_the_device_out_of_range_gives_nan(backend: str, index: int) -> None:
    sample, output = images(3, 6)
    for y in ops.sampler_step(sample, output, LEARNED, torch.tensor(index), seed=0, return_x0=True):
        assert y.isnan().all()


@pytest.mark.parametrize("index", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_nothing_is_read_back(backend: str, index: int | Tensor) -> None:
    sample, output, unconditional = images(3, 6, 6)
    threshold = DynamicThreshold(0.9)
    given = {"unconditional_output": unconditional, "guidance": Guidance(3.0, 0.5, True), "threshold": threshold}
    seed = torch.arange(2)
    LEARNED.index(0, sample.device)  # which the table keeps from its first use on
    with Spy() as spy:
        ops.sampler_step(sample, output, LEARNED, index, seed=seed, **given)
    assert not [name for name in spy.names if "local_scalar" in name or "nonzero" in name]
    if backend == "cpu":
        assert spy.names == ["imagen_fast::sampler_step_cpu"]


@pytest.mark.parametrize("seed", [np.int64(-3), np.uint64(2**64 - 3)], ids=repr)
def test_numbers_of_numpy_are_numbers(backend: str, seed: Any) -> None:
    sample, output, unconditional = images(3, 6, 6)
    given: dict[str, Any] = {"table": LEARNED, "unconditional_output": unconditional}
    expected = ops.sampler_step(
        sample, output, index=1, guidance=1.3, threshold=DynamicThreshold(0.37), seed=-3, **given
    )
    for guidance in (np.float64(1.3), Guidance(np.float64(1.3))):
        threshold = DynamicThreshold(np.float64(0.37), np.int64(1))
        result = ops.sampler_step(
            sample, output, index=np.int64(1), guidance=guidance, threshold=threshold, seed=seed, **given
        )
        assert torch.equal(result[0], expected[0])


def test_a_plain_number_and_a_guidance_compile(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.sampler_step, fullgraph=True, backend="aot_eager")
    sample, output, unconditional, noise = images(3, 6, 6, 3)
    for index, guidance in enumerate((2, 3.5, 4.5, Guidance(2.5))):
        given = {"unconditional_output": unconditional, "guidance": guidance, "noise": noise}
        expected = ops.sampler_step(sample, output, LEARNED, index, **given)
        result = compiled(sample, output, LEARNED, index, **given)
        torch.testing.assert_close(result[0], expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("table", [LEARNED, MULTISTEP], ids=["ddpm", "dpm"])
def test_a_loop_that_counts_on_the_device_reads_nothing_back(backend: str, table: StepTable) -> None:
    """As a graph captures it: the row is a tensor, and the steps are queued without looking at it."""
    (start,) = images(3)
    seed = torch.arange(2)

    def sample(index: int | Tensor, x: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        output = torch.cat([0.9 * x, -x], dim=1)
        threshold = DynamicThreshold(0.9, max_value=1.5)
        return ops.sampler_step(x, output, table, index, previous_x0=x0, seed=seed, threshold=threshold)

    expected, x0 = start, start
    for i in range(len(table)):
        expected, x0 = sample(i, expected, x0)
        x0 = expected if x0 is None else x0
    x, x0, index = start, start, torch.zeros((), dtype=torch.int64)
    with Spy() as spy:
        for _ in range(len(table)):
            x, x0 = sample(index, x, x0)
            x0 = x if x0 is None else x0
            index += 1
    assert not [name for name in spy.names if "local_scalar" in name or "nonzero" in name]
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def made_while(what: str, table: StepTable) -> None:
    """Has the table put its indices on the device for the first time while it is traced, or in inference mode."""
    sample, output = images(3, 3)
    if what == "inference":
        with torch.inference_mode():
            ops.sampler_step(sample, output, table, 1)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ops.sampler_step(mode.from_tensor(sample), mode.from_tensor(output), table, 1)


@pytest.mark.parametrize("what", ["fake", "inference"])
def test_a_table_keeps_no_tensors_that_cannot_be_used_later(what: str) -> None:
    table, (sample, output) = StepTable.ddim(ALPHAS, steps=6), images(3, 3)
    made_while(what, table)
    index = table.index(1, sample.device)
    assert type(index) is Tensor
    assert not index.is_inference()
    following, _ = ops.sampler_step(sample, output, table, 1)
    assert torch.equal(following, ops.sampler_step(sample, output, DDIM, 1)[0])


def test_what_a_table_keeps_is_used_while_tracing() -> None:
    table = StepTable.ddim(ALPHAS, steps=6)
    index = table.index(1, torch.device("cpu"))
    with Spy() as spy:
        assert table.index(1, torch.device("cpu")) is index
    assert spy.names == []


def test_x0_is_returned_where_the_next_row_needs_it(backend: str) -> None:
    sample, output, previous = images(3, 3, 3)

    def x0(table: StepTable, index: int | Tensor, **given: Any) -> Tensor | None:
        return ops.sampler_step(sample, output, table, index, previous_x0=previous, seed=1, **given)[1]

    assert x0(DDIM, 0) is None
    assert x0(DDIM, torch.tensor(0)) is None
    assert x0(DDIM, 0, return_x0=True) is not None
    assert x0(MULTISTEP, 0) is not None
    assert x0(MULTISTEP, torch.tensor(5)) is not None
    assert x0(MULTISTEP, 5) is None
    assert x0(MULTISTEP, 0, return_x0=False) is None


@pytest.mark.parametrize("kind", ["nchw", "nhwc", "cropped", "cropped-nhwc"])
def test_results_have_the_layout_of_the_sample(backend: str, kind: str) -> None:
    sample, output = torch.randn(2, 3, 8, 7), torch.randn(2, 3, 8, 7)
    sample = layout.channels_last(sample) if "nhwc" in kind else sample
    if "cropped" in kind:
        sample, output = sample[:, :, 1:-1, 1:-1], output[:, :, 1:-1, 1:-1]
    for y in ops.sampler_step(sample, output, DDIM, 1, return_x0=True):
        assert layout.is_dense(y)
        assert layout.is_channels_last(y) == ("nhwc" in kind)
    notes = imagen_fast.explain("sampler_step", sample, output, DDIM, 1).notes
    assert [note.split()[0] for note in notes] == (["sample", "output"] if "cropped" in kind else [])


def test_halves_of_a_guidance_batch_are_read_in_place() -> None:
    both = layout.channels_last(torch.randn(4, 6, 8, 7))
    unconditional, conditional = both.chunk(2)
    explained = imagen_fast.explain(
        "sampler_step", both[:2, :3].contiguous(), conditional, LEARNED, 1, unconditional_output=unconditional, seed=0
    )
    assert explained.notes == ()
    assert explained.backend == "cpu"


def test_gradients_are_those_of_eager() -> None:
    sample, output = (torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise = torch.randn(2, 3, 3, 2, dtype=torch.float64)
    table = StepTable.ddim(ALPHAS, steps=6, eta=0.5)

    def step(sample: Tensor, output: Tensor) -> Tensor:
        return ops.sampler_step(sample, output, table, 1, noise=noise, threshold="static")[0]

    assert torch.autograd.gradcheck(step, (sample, output))
    explained = imagen_fast.explain("sampler_step", sample, output, DDIM, 1)
    assert "no backward pass" in (explained.reasons["cpu"] or "")


def operator_arguments(dtype: torch.dtype, write_x0: bool) -> tuple[Any, ...]:
    sample, output, unconditional, previous = (x.to(dtype) for x in images(3, 6, 6, 3))
    rows, index = LEARNED.rows, torch.tensor(2)
    flags = (True, 3.0, 0.0, False, 2, 0.9, 1.0, 1.5, write_x0)
    return (sample, output, unconditional, previous, None, torch.arange(2), rows, index, *flags)


@pytest.mark.parametrize("write_x0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, write_x0: bool) -> None:
    torch.library.opcheck(torch.ops.imagen_fast.sampler_step_cpu, operator_arguments(dtype, write_x0))


def test_fake_tensors_have_the_layout_of_real_ones() -> None:
    sample, output = layout.channels_last(torch.randn(2, 3, 6, 5)), torch.randn(2, 3, 6, 5)
    real, _ = ops.sampler_step(sample, output, DDIM, 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, _ = ops.sampler_step(mode.from_tensor(sample), mode.from_tensor(output), DDIM, 1)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("backend_name", ["cpu", "eager"])
def test_compiles_into_one_graph(backend_name: str) -> None:
    """With the noise from a seed on the kernel; eager is spared the tracing of Philox, which takes long."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(sample: Tensor, output: Tensor, unconditional: Tensor, index: Tensor, source: Tensor) -> Tensor:
        return guided(sample, output, unconditional, index, source)

    def guided(sample: Tensor, output: Tensor, unconditional: Tensor, index: int | Tensor, source: Tensor) -> Tensor:
        given = {"unconditional_output": unconditional, "guidance": 3.0, "threshold": DynamicThreshold(0.9)}
        given |= {"seed": source} if source.dtype == torch.int64 else {"noise": source}
        return ops.sampler_step(sample, output, LEARNED, index, **given)[0]

    with imagen_fast.use_backend(backend_name):
        for batch in (2, 3):
            source = torch.arange(batch) if backend_name == "cpu" else torch.randn(batch, 3, 6, 5)
            tensors = images(3, 6, 6, batch=batch)
            expected = guided(*tensors, 2, source)
            torch.testing.assert_close(step(*tensors, torch.tensor(2), source), expected, rtol=1e-6, atol=1e-6)


SAMPLE, OUTPUT, TWICE = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
GOOD: dict[str, Any] = {"sample": SAMPLE, "output": TWICE, "table": LEARNED, "index": 1, "seed": 0}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sample": 1.0}, TypeError, "sample must be a tensor"),
        ({"sample": torch.ones(2, 3, 4, 4).int()}, TypeError, "sample must be float16"),
        ({"sample": torch.ones(3)}, ValueError, "sample must have 2 to 5 dimensions"),
        ({"output": torch.ones(2, 4, 4, 4)}, ValueError, r"output must have shape .*got \(2, 4, 4, 4\)"),
        ({"output": torch.ones(2, 6, 4, 5)}, ValueError, "output must have shape"),
        ({"output": None}, TypeError, "output must be a tensor, got NoneType"),
        ({"output": torch.ones(2)}, ValueError, r"output must have shape .*got \(2,\)"),
        ({"output": torch.tensor(1.0)}, ValueError, r"output must have shape .*got \(\)"),
        ({"output": torch.ones(2, 6, 4)}, ValueError, r"output must have shape .*got \(2, 6, 4\)"),
        ({"output": torch.ones(2, 7, 4, 4)}, ValueError, "output must have shape .*or twice the channels"),
        ({"output": torch.ones(2, 2, 4, 4), "table": DDIM}, ValueError, "output must have shape .*or more channels"),
        ({"output": torch.ones(1, 6, 4, 4)}, ValueError, "output must have shape"),
        ({"output": OUTPUT}, ValueError, "output must have 6 channels.*learned variance, got 3"),
        ({"output": TWICE.double()}, TypeError, "output must be float16, bfloat16 or float32"),
        ({"output": TWICE.to("meta")}, ValueError, "output must be on cpu, where sample is"),
        ({"unconditional_output": TWICE[:1]}, ValueError, "unconditional_output must have shape"),
        ({"unconditional_output": 2.0}, TypeError, "unconditional_output must be a tensor or None"),
        ({"unconditional_output": torch.ones(2, 7, 4, 4)}, ValueError, "unconditional_output must have shape"),
        ({"table": LEARNED.rows}, TypeError, "table must be a StepTable, got Tensor"),
        ({"index": 6}, IndexError, "index must be between 0 and 5, .*got 6"),
        ({"index": -1}, IndexError, "index must be between 0 and 5"),
        ({"index": 1.0}, TypeError, "index must be an int or a 0-d tensor"),
        ({"index": True}, TypeError, "index must be an int"),
        ({"index": torch.tensor([1])}, ValueError, r"index must be an int or a 0-d tensor, got shape \(1,\)"),
        ({"index": torch.tensor(1.0)}, TypeError, "index must be int64 or int32"),
        ({"index": torch.tensor(1, device="meta")}, ValueError, "index must be on cpu"),
        ({"guidance": "strong"}, TypeError, "guidance must be a number or a Guidance, got 'strong'"),
        ({"guidance": torch.tensor([1.0, 2.0])}, TypeError, "guidance must be a number or a Guidance, got tensor"),
        ({"guidance": torch.tensor(1.0)}, TypeError, "guidance must be a number or a Guidance, got tensor"),
        ({"guidance": True}, TypeError, "guidance must be a number or a Guidance, got True"),
        ({"guidance": None}, TypeError, "guidance must be a number or a Guidance, got None"),
        ({"return_x0": "yes"}, TypeError, "return_x0 must be True, False or None, got 'yes'"),
        ({"threshold": np.array([0.9, 0.5])}, ValueError, "threshold must be None, 'static' or a DynamicThreshold"),
        ({"index": np.int64(6)}, IndexError, "index must be between 0 and 5, .*got 6"),
        ({"index": np.float32(1)}, TypeError, "index must be an int or a 0-d tensor"),
        ({"threshold": 0.95}, ValueError, "threshold must be None, 'static' or a DynamicThreshold"),
        ({"threshold": "dynamic"}, ValueError, "threshold must be None, 'static' or a DynamicThreshold"),
        ({"table": MULTISTEP}, ValueError, "previous_x0 is needed"),
        ({"previous_x0": TWICE}, ValueError, "previous_x0 must have shape"),
        ({"seed": None}, ValueError, "noise is needed, or a seed"),
        ({"noise": OUTPUT}, ValueError, "noise and seed exclude each other"),
        ({"seed": None, "noise": TWICE}, ValueError, "noise must have shape"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": torch.tensor([1, 2, 3])}, ValueError, r"seed must have shape \(2,\).*got \(3,\)"),
        ({"seed": torch.tensor(1)}, ValueError, r"seed must have shape \(2,\)"),
        ({"seed": torch.tensor([1.0, 2.0])}, TypeError, "seed must be an int or an int64 tensor"),
    ],
)
def test_wrong_arguments_are_named(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.sampler_step(**(GOOD | wrong))


def test_direct_calls_of_the_operator_are_checked() -> None:
    """What the public op never does, but would read out of bounds."""
    good = operator_arguments(torch.float32, True)
    for place, wrong in ((1, good[1][:, :3]), (3, good[3][:1]), (5, torch.arange(3)), (6, LEARNED.rows.float())):
        with pytest.raises(RuntimeError, match="sampler_step"):
            torch.ops.imagen_fast.sampler_step_cpu(*good[:place], wrong, *good[place + 1 :])
