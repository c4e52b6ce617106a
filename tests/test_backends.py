from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import imagen_fast
from imagen_fast import _cuda, backends, ops
from imagen_fast.backends import Backend, BackendError, Op, dtypes, no_gradient


class Call(NamedTuple):
    x: Tensor


class Toy:
    """An op "toy" that returns the name of the backend it ran on; its kernels need what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("cpu", "triton", "cuda"):
            monkeypatch.setitem(backends._reasons, name, None)
        monkeypatch.setattr(backends, "_logged", set())
        self.op: Op[Call]
        self.serve(eager=(), cpu=())

    def serve(self, **requirements: tuple[backends.Requirement, ...]) -> None:
        kernels = [Backend(name, lambda call, name=name: name, needs) for name, needs in requirements.items()]
        self.op = Op("toy", self.check, kernels, notes=lambda call: ["a note"])

    def check(self, x: Tensor) -> Call:
        if x.dim() != 1:
            raise ValueError(f"x must have one dimension, got {x.dim()}")
        return Call(x)

    def __call__(self, x: Tensor) -> str:
        return self.op.run(self.check(x))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    yield Toy(monkeypatch)
    del backends._OPS["toy"]


X = torch.randn(3)
ON_META = torch.empty(3, device="meta")


class TestAuto:
    def test_takes_the_fastest_backend(self, toy: Toy) -> None:
        assert toy(X) == "cpu"

    @pytest.mark.parametrize("order", [("eager", "cpu"), ("cpu", "eager")])
    def test_follows_the_order_of_the_device_not_of_the_table(self, toy: Toy, order: tuple[str, ...]) -> None:
        toy.serve(**dict.fromkeys(order, ()))
        assert toy(X) == "cpu"

    def test_takes_eager_where_a_requirement_is_not_met(self, toy: Toy) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.bfloat16, torch.float32),))
        assert toy(X) == "cpu"
        assert toy(X.double()) == "eager"

    def test_takes_eager_where_the_library_is_missing(self, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(backends._reasons, "cpu", "it is not built")
        assert toy(X) == "eager"

    def test_takes_eager_where_a_gradient_is_needed_and_there_is_none(self, toy: Toy) -> None:
        toy.serve(eager=(), cpu=(no_gradient("x"),))
        x = X.clone().requires_grad_()
        assert toy(x) == "eager"
        with torch.no_grad():
            assert toy(x) == "cpu"

    def test_logs_each_reason_once(self, toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),))
        with caplog.at_level(logging.WARNING, "imagen_fast"):
            for x in (X.double(), X.double(), X, X.half(), X.half()):
                toy(x)
        messages = [record.getMessage() for record in caplog.records]
        assert messages == [
            "toy falls back to eager PyTorch (cpu: x is float64; it needs float32)",
            "toy falls back to eager PyTorch (cpu: x is float16; it needs float32)",
        ]

    def test_is_silent_on_a_device_without_kernels(self, toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
        with imagen_fast.use_backend("auto", strict=True):
            assert toy(ON_META) == "eager"
        assert not caplog.records

    def test_is_silent_for_an_op_without_kernels(self, toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
        toy.serve(eager=())
        with imagen_fast.use_backend("auto", strict=True):
            assert toy(X) == "eager"
        assert not caplog.records


class TestStrict:
    def test_raises_instead_of_falling_back(self, toy: Toy) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),))
        with imagen_fast.use_backend("auto", strict=True):
            assert toy(X) == "cpu"
            with pytest.raises(BackendError, match=r"toy falls back.*forbids.*x is float64; it needs float32"):
                toy(X.double())
        assert toy(X.double()) == "eager"

    def test_leaves_a_forced_eager_alone(self, toy: Toy) -> None:
        with imagen_fast.use_backend("eager", strict=True):
            assert toy(X) == "eager"

    def test_is_inherited_by_inner_blocks(self, toy: Toy) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),))
        with imagen_fast.use_backend("eager", strict=True), imagen_fast.use_backend("auto"):
            with pytest.raises(BackendError):
                toy(X.double())
            with imagen_fast.use_backend("auto", strict=False):
                assert toy(X.double()) == "eager"


class TestUseBackend:
    def test_forces(self, toy: Toy) -> None:
        with imagen_fast.use_backend("eager"):
            assert toy(X) == "eager"
        assert toy(X) == "cpu"

    def test_nests(self, toy: Toy) -> None:
        with imagen_fast.use_backend("eager"):
            with imagen_fast.use_backend("cpu"):
                assert toy(X) == "cpu"
            assert toy(X) == "eager"

    def test_one_instance_can_be_entered_again(self, toy: Toy) -> None:
        eager, auto = imagen_fast.use_backend("eager"), imagen_fast.use_backend("auto")
        with eager, auto, eager:
            assert toy(X) == "eager"
        assert toy(X) == "cpu"

    def test_is_undone_by_an_exception(self, toy: Toy) -> None:
        with pytest.raises(ZeroDivisionError), imagen_fast.use_backend("eager"):
            _ = 1 / 0
        assert toy(X) == "cpu"

    def test_decorates(self, toy: Toy) -> None:
        @imagen_fast.use_backend("eager")
        def run(depth: int) -> list[str]:
            return [toy(X)] + (run(depth - 1) if depth else [])

        assert run(2) == ["eager"] * 3
        assert toy(X) == "cpu"

    def test_holds_for_its_thread_alone(self, toy: Toy) -> None:
        seen: list[str] = []
        with imagen_fast.use_backend("eager"):
            thread = threading.Thread(target=lambda: seen.append(toy(X)))
            thread.start()
            thread.join()
            assert toy(X) == "eager"
        assert seen == ["cpu"]

    @pytest.mark.parametrize(("name", "hint"), [("tritom", "did you mean 'triton'"), ("x", "known: 'auto', 'eager'")])
    def test_rejects_an_unknown_name(self, name: str, hint: str) -> None:
        with pytest.raises(BackendError, match=f"unknown backend '{name}'; {hint}"):
            imagen_fast.use_backend(name)

    def test_says_why_a_forced_backend_cannot_serve(self, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),), cuda=())
        for name, x, reason in [
            ("triton", X, "it is not implemented there"),
            ("cuda", X, "the tensors are on cpu"),
            ("cpu", ON_META, "the tensors are on meta"),
            ("cpu", X.double(), "x is float64; it needs float32"),
        ]:
            with (
                imagen_fast.use_backend(name),
                pytest.raises(BackendError, match=rf"toy cannot run.*'{name}': {reason}"),
            ):
                toy(x)
        monkeypatch.setitem(backends._reasons, "cpu", "no compiler")
        with imagen_fast.use_backend("cpu"), pytest.raises(BackendError, match="no compiler"):
            toy(X)


class TestTransforms:
    """Kernels would be silently wrong under torch.func; eager is not."""

    def test_vmap_and_grad_run_on_eager(self, toy: Toy) -> None:
        seen: list[str] = []

        def run(x: Tensor) -> Tensor:
            seen.append(toy(x))
            return x.sum()

        torch.vmap(run)(torch.randn(2, 3))
        torch.func.grad(run)(X)
        torch.func.jvp(run, (X,), (X,))
        with torch.autograd.forward_ad.dual_level():
            run(torch.autograd.forward_ad.make_dual(X, X))
        assert seen == ["eager"] * 4
        run(X)
        assert seen[4:] == ["cpu"]


class TestExplain:
    def test_gives_the_choice_and_every_reason(self, toy: Toy) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),), triton=())
        explanation = imagen_fast.explain("toy", X)
        assert explanation.backend == "cpu"
        assert explanation.reasons == {
            "cpu": None,
            "eager": None,
            "triton": "the tensors are on cpu",
            "cuda": "it is not implemented there (it is on: eager, cpu, triton)",
        }
        assert list(explanation.reasons)[:2] == ["cpu", "eager"]  # fastest first
        assert explanation.notes == ("a note",)
        assert imagen_fast.explain("toy", X.double()).backend == "eager"

    def test_tells_what_would_raise(self, toy: Toy) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),))
        with imagen_fast.use_backend("cpu"):
            explanation = imagen_fast.explain("toy", X.double())
        assert explanation.backend is None
        assert explanation.error is not None
        assert "cannot run on backend 'cpu'" in explanation.error
        with imagen_fast.use_backend("auto", strict=True):
            assert "strict" in (imagen_fast.explain("toy", X.double()).error or "")

    def test_does_not_log(self, toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
        toy.serve(eager=(), cpu=(dtypes("x", torch.float32),))
        imagen_fast.explain("toy", X.double())
        assert not caplog.records
        toy(X.double())
        assert len(caplog.records) == 1

    def test_prints_as_a_table(self, toy: Toy) -> None:
        text = str(imagen_fast.explain("toy", X))
        assert text.splitlines() == [
            "toy: runs on cpu (auto)",
            "  cpu     chosen",
            "  eager   could serve this call",
            "  triton  it is not implemented there (it is on: eager, cpu)",
            "  cuda    it is not implemented there (it is on: eager, cpu)",
            "  note: a note",
        ]

    def test_becomes_json(self, toy: Toy) -> None:
        explanation = imagen_fast.explain("toy", X)
        assert json.loads(json.dumps(explanation.to_dict()))["reasons"]["cpu"] is None

    def test_raises_what_the_op_raises(self, toy: Toy) -> None:
        with pytest.raises(ValueError, match="one dimension"):
            imagen_fast.explain("toy", torch.zeros(2, 2))
        with pytest.raises(TypeError, match="y"):
            imagen_fast.explain("toy", X, y=1)

    def test_rejects_an_unknown_op(self) -> None:
        with pytest.raises(ValueError, match="unknown op 'group_norm'; did you mean 'group_norm_act'"):
            imagen_fast.explain("group_norm", X)

    def test_takes_the_op_itself(self) -> None:
        assert imagen_fast.explain(ops.group_norm_act, torch.randn(2, 4), 2).op == "group_norm_act"


class TestCompile:
    def compiled(self) -> tuple[Any, Any]:
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        return torch.compile(lambda x: ops.group_norm_act(x * 2, 4), fullgraph=True, backend=counter), counter

    def graph(self, counter: Any) -> str:
        return counter.graphs[-1].code

    def test_a_changed_selection_is_traced_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(backends._reasons, "cpu", None)
        x = torch.randn(2, 8, 3)
        run, counter = self.compiled()
        with imagen_fast.use_backend("eager"):
            run(x)
            assert "group_norm_act_cpu" not in self.graph(counter)
            run(x)
        assert counter.frame_count == 1
        if not torch._C._dispatch_has_kernel_for_dispatch_key("imagen_fast::group_norm_act_cpu", "CPU"):
            pytest.skip("the C++ library is not built")
        run(x)
        assert counter.frame_count == 2
        assert "group_norm_act_cpu" in self.graph(counter)
        with imagen_fast.use_backend("eager"):
            run(x)
        run(x)
        assert counter.frame_count == 2  # both are kept

    def test_a_block_inside_of_the_graph(self) -> None:
        def run(x: Tensor) -> Tensor:
            with imagen_fast.use_backend("eager"):
                y = ops.group_norm_act(x, 4)
            return ops.group_norm_act(y, 4)

        x = torch.randn(2, 8, 3)
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))

    def test_the_log_line_does_not_break_the_graph(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(backends._reasons, "cpu", "it is not built")
        monkeypatch.setattr(backends, "_logged", set())
        run, counter = self.compiled()
        run(torch.randn(2, 8, 3))
        assert counter.frame_count == 1
        assert "it is not built" in caplog.text

    def test_errors_keep_their_message(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(backends._reasons, "cpu", "it is not built")
        run, _ = self.compiled()
        with imagen_fast.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu': it is not built"):
            run(torch.randn(2, 8, 3))

    def test_functional_transforms_inside_of_the_graph(self) -> None:
        x = torch.randn(2, 8, 3)

        def run(x: Tensor) -> Tensor:
            return torch.func.grad(lambda x: ops.group_norm_act(x, 4).sin().sum())(x)

        torch.testing.assert_close(torch.compile(run, backend="eager")(x), run(x))


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


EXPLAIN = "import torch, imagen_fast; print(imagen_fast.explain('group_norm_act', torch.randn(2, 4), 2))"


def test_environment_chooses_the_backend() -> None:
    result = in_new_process(EXPLAIN, IMAGEN_FAST_BACKEND="eager")
    assert "group_norm_act: runs on eager (eager)" in result.stdout


def test_environment_with_an_unknown_backend_fails_at_the_first_call() -> None:
    code = "import torch\nfrom imagen_fast import ops\nprint('imported')\nops.group_norm_act(torch.randn(2, 4), 2)"
    result = in_new_process(code, IMAGEN_FAST_BACKEND="tritn")
    assert "imported" in result.stdout
    assert "BackendError" in result.stderr
    assert "IMAGEN_FAST_BACKEND" in result.stderr


def test_environment_makes_strict() -> None:
    code = """
import torch, imagen_fast
from imagen_fast import backends
backends._reasons["cpu"] = "it is not built"
imagen_fast.ops.group_norm_act(torch.randn(2, 4), 2)
"""
    assert "strict mode forbids (cpu: it is not built)" in in_new_process(code, IMAGEN_FAST_STRICT="1").stderr
    assert in_new_process(code, IMAGEN_FAST_STRICT="0").returncode == 0


def test_importing_the_ops_loads_neither_dynamo_nor_triton() -> None:
    code = """
import sys, torch
import imagen_fast; imagen_fast.ops, imagen_fast.nn, imagen_fast.testing, imagen_fast.explain
print([name for name in ("torch._dynamo", "triton", "transformers", "diffusers", "matplotlib") if name in sys.modules])
"""
    assert in_new_process(code).stdout.strip() == "[]"


def test_every_op_is_found_and_seen_by_type_checkers() -> None:
    source = Path(ops.__file__).read_text()
    assert "group_norm_act" in ops.__all__
    for name in ops.__all__:
        assert callable(getattr(ops, name))
        assert f"from .{name} import {name} as {name}" in source, f"add {name} under TYPE_CHECKING in {ops.__file__}"


@pytest.mark.parametrize(
    ("built", "capability", "fits"),
    [
        ("CUDA 8.0 9.0 10.0 12.0+PTX", (9, 0), True),
        ("CUDA 8.0 9.0 10.0 12.0+PTX", (8, 9), True),
        ("CUDA 8.0 9.0 10.0 12.0+PTX", (11, 0), True),  # by the PTX of 9.0
        ("CUDA 8.0 9.0 10.0 12.0+PTX", (7, 5), False),
        ("CUDA 8.0 9.0 10.0", (12, 0), False),
        ("CUDA 9.0a", (9, 0), True),
        ("CUDA 9.0a", (10, 0), False),
        ("CUDA 10.0f", (10, 3), True),
        ("CUDA 8.6", (8, 0), False),
        ("CUDA 8.0+PTX", (12, 0), True),
    ],
)
def test_the_cuda_library_serves_devices_that_it_has_code_for(
    built: str, capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _cuda.has_code_for(built, capability) == fits
    monkeypatch.setattr(_cuda, "_device_reasons", {})
    monkeypatch.setattr(_cuda, "library", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert (_cuda.device_reason(0) is None) == fits
