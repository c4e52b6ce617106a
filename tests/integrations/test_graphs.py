"""Graphs of functions and of models: when they are recorded, what they see, and that nothing stale is replayed."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_fast
from imagen_fast.integrations._calls import settings
from imagen_fast.integrations._graphed import GraphedForward, Prepared, bucket, prepared_step
from imagen_fast.integrations._graphs import GraphPool
from imagen_fast.integrations._recorders import CudaRecorder
from imagen_fast.models import UNet, UNetConfig

from .recorder import OperatorRecorder, recording_here


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> OperatorRecorder:
    return recording_here(monkeypatch)


@pytest.fixture
def pool(recorder: OperatorRecorder) -> GraphPool:
    return GraphPool("f", recorder, limit=2)


def scaled(x: Tensor, factor: float = 2.0, *, shift: Tensor | None = None) -> dict[str, Any]:
    y = x * factor
    return {"y": y if shift is None else y + shift, "n": 3}


def call(pool: GraphPool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return pool.run(function, args, kwargs)


# ---- The pool


def test_the_second_call_of_a_kind_is_recorded_and_the_third_replayed(pool: GraphPool) -> None:
    results = []
    for seed in range(4):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        results.append((call(pool, scaled, x), x))
        assert (pool.recorded, pool.replayed) == (min(seed, 1), seed)
    for result, x in results:  # results are copied out, so that no later replay changes them
        assert torch.equal(result["y"], x * 2)
        assert result["n"] == 3


@pytest.mark.parametrize(
    "other",
    [
        ((torch.ones(5, 3),), {}),
        ((torch.ones(3, 5, dtype=torch.bfloat16),), {}),
        ((torch.ones(5, 3).t(),), {}),
        ((torch.ones(3, 5), 3.0), {}),
        ((torch.ones(3, 5),), {"factor": 2}),
        ((torch.ones(3, 5),), {"shift": torch.ones(5)}),
    ],
    ids=["shape", "dtype", "strides", "argument", "type", "optional"],
)
def test_a_kind_is_all_that_launches_depend_on(pool: GraphPool, other: Any) -> None:
    args, kwargs = other
    for _ in range(3):
        call(pool, scaled, torch.ones(3, 5))
        found = call(pool, scaled, *args, **kwargs)
        assert torch.equal(found["y"], scaled(*args, **kwargs)["y"])
    assert pool.recorded == 2


def test_settings_are_of_the_kind(pool: GraphPool) -> None:
    for _ in range(2):
        call(pool, scaled, torch.ones(3))
    with imagen_fast.use_backend("cpu"):
        call(pool, scaled, torch.ones(3))
    assert (pool.recorded, pool.replayed) == (1, 1)


def test_the_least_recently_used_graph_goes(pool: GraphPool) -> None:
    for size in (1, 2, 1, 3, 1):  # 1 is used again before 3 comes
        for _ in range(2):
            call(pool, scaled, torch.ones(size))
    assert (len(pool), pool.recorded) == (2, 3)
    call(pool, scaled, torch.ones(2))
    assert pool.recorded == 4


def test_graphs_that_are_never_used_again_are_given_up(pool: GraphPool, caplog: pytest.LogCaptureFixture) -> None:
    for size in range(1, 8):
        for _ in range(2):
            assert torch.equal(call(pool, scaled, torch.ones(size))["y"], torch.full((size,), 2.0))
    assert pool.recorded == 4  # twice the limit
    assert any("none was used again" in reason for reason in pool.reasons)
    assert len(caplog.records) == 1


def _random(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def _writing(x: Tensor) -> Tensor:
    return x.mul_(2)


def _waiting(x: Tensor) -> Tensor:
    return x * x.sum().item()


def _object(x: Tensor) -> Any:
    return threading.Event()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_random, "draws random numbers"),
        (_writing, "writes to its arguments"),
        (_waiting, "not permitted"),
        (_object, "its result holds a Event"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(
    pool: GraphPool, function: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain, ours = torch.ones(3), torch.ones(3)
    torch.manual_seed(0)
    expected = [function(plain) for _ in range(4)]
    torch.manual_seed(0)
    found = [call(pool, function, ours) for _ in range(4)]
    if function is not _object:
        assert all(map(torch.equal, found, expected))
    assert torch.equal(ours, plain)
    assert pool.recorded == 0
    assert [reason in known for known in pool.reasons] == [True]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("argument", [nn.Parameter(torch.ones(2)), {"x": {1, 2}}, torch.ones(2).to_sparse()])
def test_arguments_that_no_graph_can_have(pool: GraphPool, argument: Any) -> None:
    for _ in range(3):
        call(pool, lambda x, other: scaled(x), torch.ones(2), argument)
    assert pool.recorded == 0
    assert "an argument is a" in pool.reasons[0]


def test_threads_take_turns(pool: GraphPool) -> None:
    wrong: list[float] = []

    def work(value: float) -> None:
        for step in range(60):
            x = torch.full((300,), value + step)
            if not torch.equal(call(pool, scaled, x)["y"], x * 2):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(1000.0 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.recorded == 1


# ---- Models


SIZES: Any = {
    "channels": 16,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (1,),
    "head_width": 8,
    "groups": 8,
}


def build() -> UNet:
    torch.manual_seed(0)
    model = UNet(UNetConfig(text_dim=12, **SIZES)).eval()
    for parameter in model.parameters():  # no branch that begins at zero
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(seed: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 3, 8, 8, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator),
        "text": torch.randn(batch, 5, 12, generator=generator),
        "text_mask": torch.arange(5).expand(batch, 5) < 3,
    }


def graphed(model: nn.Module, **options: Any) -> GraphPool:
    imagen_fast.accelerate(model, **options)
    forward = vars(model)["forward"]
    assert isinstance(forward, GraphedForward)
    assert forward.pool is not None
    return forward.pool


def run(model: nn.Module, seed: int) -> Tensor:
    with torch.no_grad():
        return model(**inputs(seed))


def expected(model: nn.Module, seed: int) -> Tensor:
    """What the accelerated model computes without a graph."""
    with torch.no_grad():
        return type(model).forward(model, **inputs(seed))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16, "memory_format": torch.channels_last}], ids=["own", "bf16-nhwc"]
)
def test_replays_are_the_model(recorder: OperatorRecorder, options: dict[str, Any]) -> None:
    model, plain = build(), build()
    pool = graphed(model, **options)
    imagen_fast.accelerate(plain, graphs="off", **options)
    for seed in range(5):
        assert torch.equal(run(model, seed), run(plain, seed))
    assert (pool.recorded, pool.replayed) == (1, 4)
    with torch.inference_mode():  # tensors of which no writes are counted: another kind
        for seed in range(5, 8):
            assert torch.equal(model(**inputs(seed)), plain(**inputs(seed)))
    assert (pool.recorded, pool.replayed) == (2, 6)


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)


def _state(model: Any) -> None:
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def _assigned(model: Any) -> None:
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()}, assign=True)


def _optimizer(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _child(model: Any) -> None:
    model.conv_out = nn.Conv2d(16, 3, 3, padding=1)
    nn.init.normal_(model.conv_out.weight)


def _attribute(model: Any) -> None:
    model.norm_out.eps = 0.5


def _invalidate(model: Any) -> None:
    model.conv_in.weight.data[0, 0, 0, 1] += 1  # of which nothing is compared
    imagen_fast.invalidate(model)


CHANGES = [_in_place, _state, _assigned, _optimizer, _child, _attribute, _invalidate]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_nothing_stale_is_replayed(recorder: OperatorRecorder, change: Callable[[Any], None]) -> None:
    model, plain = build(), build()
    pool = graphed(model, dtype=torch.bfloat16)
    imagen_fast.accelerate(plain, dtype=torch.bfloat16, graphs="off")
    for seed in range(3):
        run(model, seed)
    before = run(model, 3)
    for each in (model, plain):
        torch.manual_seed(1)
        change(each)
    changed = run(model, 3)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, run(plain, 3))
    for seed in (4, 5):
        assert torch.equal(run(model, seed), run(plain, seed))
    assert pool.recorded == 2


@pytest.mark.parametrize("how", ["hook", "global", "forward", "gradients", "eager", "busy", "training", "inference"])
def test_when_no_graph_is_used(recorder: OperatorRecorder, how: str) -> None:
    model = build()
    pool = graphed(model)
    for seed in range(2):
        run(model, seed)
    assert pool.replayed == 1
    seen: list[int] = []
    inner: Any = model.middle1.resnet
    if how == "hook":
        inner.register_forward_hook(lambda *args: seen.append(1))
    elif how == "forward":
        forward = inner.forward
        inner.forward = lambda *args: seen.append(1) or forward(*args)
    elif how == "busy":
        recorder.busy = True
    elif how == "training":
        model.train()
        next(m for m in model.modules() if isinstance(m, nn.Dropout)).p = 0.5
    elif how == "inference":
        with torch.inference_mode():
            model.conv_in.weight = nn.Parameter(torch.ones_like(model.conv_in.weight), requires_grad=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: seen.append(1)) if how == "global" else None
    try:
        for seed in (2, 3):
            if how == "gradients":
                assert model(**inputs(seed)).requires_grad
            elif how == "eager":
                with imagen_fast.use_backend("eager"):
                    run(model, seed)
            else:
                run(model, seed)
    finally:
        if handle is not None:
            handle.remove()
    assert pool.replayed == 1
    reasons = {
        "hook": "FusedResnetBlock in it has hooks",
        "forward": "forward of a FusedResnetBlock in it is replaced",
        "global": "hooks on all modules",
        "training": "draws random numbers",
        "inference": "made in inference mode",
    }
    assert len(seen) >= 2 if how in ("hook", "global", "forward") else not seen
    assert [reasons[how] in reason for reason in pool.reasons] == [True] if how in reasons else not pool.reasons
    if how in reasons and how != "global":
        assert reasons[how] in imagen_fast.accelerate(model).graphs


def test_hooks_on_the_whole_model_run_around_its_graph(recorder: OperatorRecorder) -> None:
    model = build()
    pool = graphed(model)
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output) or output + 1)
    results = [run(model, seed) for seed in range(3)]
    assert pool.replayed == 2
    assert all(torch.equal(result, output + 1) for result, output in zip(results, outputs, strict=True))


def test_a_failure_is_logged_once(recorder: OperatorRecorder, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    pool = graphed(model)
    recorder.fails = RuntimeError("CUDA error: out of luck")
    for seed in range(4):
        assert torch.equal(run(model, seed), expected(model, seed))
    assert [(r.levelname, "out of luck" in r.getMessage()) for r in caplog.records] == [("WARNING", True)]
    assert pool.recorded == 0
    assert "out of luck" in imagen_fast.accelerate(model).graphs


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_graphs_of_their_own(recorder: OperatorRecorder, copied: Callable[[Any], Any]) -> None:
    model = build()
    pool = graphed(model)
    for seed in range(3):
        run(model, seed)
    twin = copied(model)
    mine = vars(twin)["forward"].pool
    assert (len(mine), len(pool)) == (0, 1)
    with torch.no_grad():
        twin.conv_in.weight.mul_(2)
    for seed in range(3):
        assert torch.equal(run(twin, seed), expected(twin, seed))
        assert torch.equal(run(model, seed), expected(model, seed))
    assert (mine.recorded, pool.recorded) == (1, 1)


def test_restored_models_are_what_they_were(recorder: OperatorRecorder) -> None:
    model = build()
    before, state = run(model, 0), list(vars(model))
    graphed(model)
    for seed in range(3):
        run(model, seed)
    imagen_fast.restore(model)
    assert list(vars(model)) == state
    assert torch.equal(run(model, 0), before)


def test_options_switch_graphs_off(recorder: OperatorRecorder) -> None:
    model = build()
    graphed(model)
    for options, told in (({"graphs": "off"}, "off"), ({"inference": False}, "none; they are for inference")):
        assert imagen_fast.accelerate(model, **options).graphs == told
        assert "forward" not in vars(model)
        graphed(model)
    assert "of the model: each kind recorded at its second call" in imagen_fast.accelerate(model).graphs


# ---- Arguments


@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(7), torch.tensor([7, 8])], ids=str)
def test_a_time_step_is_a_tensor(timestep: Any) -> None:
    for args, kwargs in (((torch.ones(2), timestep), {}), ((torch.ones(2),), {"timestep": timestep})):
        prepared = prepared_step(nn.Identity(), args, kwargs)
        assert isinstance(prepared, Prepared)
        found = prepared.args[1] if len(args) > 1 else prepared.kwargs["timestep"]
        wanted = torch.as_tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else None)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_buckets() -> None:
    assert [*map(bucket, (1, 32, 33, 77, 128, 129, 256, 500))] == [32, 32, 64, 96, 128, 192, 256, 512]


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_a_precision_of_float32_that_older_functions_do_not_know(backend: str) -> None:
    before, precision = settings(), getattr(torch.backends, backend).matmul
    kept = precision.fp32_precision
    try:
        precision.fp32_precision = "tf32"
        assert settings() != before
    finally:
        precision.fp32_precision = kept
    assert settings() == before


def test_a_recording_that_fails_leaves_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended device: the end of an invalid capture raises, and torch.cuda.graph stays on its stream then."""
    current = ["the caller's"]

    class InvalidCapture:
        def __init__(self, graph: Any, pool: Any, stream: Any, **_: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current[0] = self.stream

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("capture failed")

    for name, value in {
        "CUDAGraph": object,
        "graph": InvalidCapture,
        "device": nullcontext,
        "Stream": lambda _: "the recorder's",
        "current_stream": lambda _: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="capture failed"):
        CudaRecorder().record(lambda: None, torch.device("cuda", 0), None)
    assert current == ["the caller's"]
