"""Every op on the device, on each of its GPU backends: accuracy, determinism, CUDA graphs, streams, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast.testing import assert_as_accurate, assert_op_as_accurate

from .calls import CALLS, Call, op

LAYOUTS = ("nchw", "nhwc")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with imagen_fast.use_backend(request.param):
        yield request.param


def tensors(result: Any) -> list[Tensor]:
    return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def runner(name: str, call: Call) -> Callable[[], list[Tensor]]:
    return lambda: tensors(op(name)(*call.args, **call.kwargs))


def in_float64(call: Call) -> Call:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Call(tuple(map(widen, call.args)), {name: widen(value) for name, value in call.kwargs.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_accurate(name: str, dtype: torch.dtype, layout: str, backend: str) -> None:
    call = CALLS[name](dtype, layout)
    if call.differentiable:
        assert_op_as_accurate(op(name), *call.args, **call.kwargs)
        return
    ours = runner(name, call)()
    with imagen_fast.use_backend("eager"):
        eager, truth = runner(name, call)(), runner(name, in_float64(call))()
    for found, expected, exact in zip(ours, eager, truth, strict=True):
        assert_as_accurate(found, expected, exact)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same_bits(name: str, backend: str) -> None:
    run = runner(name, CALLS[name](torch.bfloat16, "nchw"))
    first = run()
    for _ in range(5):
        for again, before in zip(run(), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_a_cuda_graph_replays_it_on_new_values(name: str, layout: str, backend: str) -> None:
    call = CALLS[name](torch.bfloat16, layout)
    run = runner(name, call)
    with torch.no_grad():
        run()  # loads the kernels, outside of the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        call.args[0].mul_(0.5).add_(0.25)
        graph.replay()
        for replayed, direct in zip(captured, run(), strict=True):
            assert torch.equal(replayed, direct)


@pytest.mark.parametrize("name", CALLS)
def test_it_runs_on_the_current_stream(name: str, backend: str) -> None:
    call = CALLS[name](torch.float32, "nchw")
    expected = runner(name, call)()
    first = call.args[0]
    late = torch.full_like(first, float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on any other stream, the kernel would read what is not written yet
        late.copy_(first)
        found = tensors(op(name)(late, *call.args[1:], **call.kwargs))
    stream.synchronize()
    for ours, direct in zip(found, expected, strict=True):
        assert torch.equal(ours, direct)


@pytest.mark.parametrize("name", CALLS)
def test_it_compiles_to_one_graph(name: str, backend: str) -> None:
    call = CALLS[name](torch.bfloat16, "nchw")
    compiled = torch.compile(op(name), fullgraph=True)
    for ours, direct in zip(tensors(compiled(*call.args, **call.kwargs)), runner(name, call)(), strict=True):
        torch.testing.assert_close(ours, direct)
