"""The operators of the op, and what traces them: opcheck, torch.compile, make_fx, meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from imagen_fast import RelativePositionBias, ops
from imagen_fast.ops._attention_buckets import diagonal_buckets

from .test_attention_contract import _seed as _seed
from .test_attention_contract import _served as _served
from .test_attention_contract import packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["plain", "bias", "table"])
class TestOpcheck:
    def arguments(self, dtype: torch.dtype, form: str, requires_grad: bool) -> list[Any]:
        q, *kv = (x.to(dtype) for x in packed(5, 3))
        context = [x.to(dtype) for x in packed(3, 2)] if form != "plain" else [None, None]
        bias = torch.randn(1, 4, 1, 8).to(dtype) if form == "bias" else None
        table = torch.randn(8, 4).to(dtype) if form == "table" else None
        buckets = None if table is None else diagonal_buckets(RelativePositionBias(table), 5, 5).clone()
        mask = torch.rand(2, 8) > 0.2 if form == "bias" else None
        scales = [torch.randn(16).to(dtype) for _ in range(2)] if form == "table" else [None, None]
        tensors = [q.contiguous(), *kv, *context, bias, table, buckets, mask, *scales]
        for x in tensors:
            if x is not None and x.is_floating_point():
                x.requires_grad_(requires_grad)
        return [*tensors, 0.3]

    @pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
    def test_forward(self, backend: str, dtype: torch.dtype, form: str, requires_grad: bool) -> None:
        if backend == "eager":
            pytest.skip("it has no operator")
        operator = getattr(torch.ops.imagen_fast, f"attention_{backend}").default
        torch.library.opcheck(operator, self.arguments(dtype, form, requires_grad))

    @pytest.mark.parametrize("needs", [0b111111111, 0b000000110, 0b001100001], ids=bin)
    def test_backward(self, backend: str, dtype: torch.dtype, form: str, needs: int) -> None:
        if backend == "eager":
            pytest.skip("it has no operator")
        arguments = self.arguments(dtype, form, False)
        out, lse = getattr(torch.ops.imagen_fast, f"attention_{backend}")(*arguments)
        operator = getattr(torch.ops.imagen_fast, f"attention_backward_{backend}").default
        torch.library.opcheck(operator, (torch.randn_like(out), out, lse, *arguments, needs))


def test_log_of_the_sum_of_exponentials(kernel: str) -> None:
    q, k, v = packed(5, 3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    operator = getattr(torch.ops.imagen_fast, f"attention_{kernel.partition('-')[0]}")
    _, lse = operator(q, k, v, None, None, None, None, None, mask, None, None, 0.3)
    torch.testing.assert_close(lse[0], (0.3 * q[0] @ k[0].transpose(1, 2)).logsumexp(-1))
    assert (lse[1] == -torch.inf).all()


# ---- torch.compile


@pytest.mark.parametrize("form", ["bias", "table"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend: str, compiler: str, form: str) -> None:
    if compiler == "inductor" and (backend == "eager" or form == "bias"):
        pytest.skip("plain PyTorch: a test of Inductor, and a slow one")
    torch._dynamo.reset()
    table = torch.randn(32, 4, requires_grad=True)

    def block(qkv: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (2 * qkv).unflatten(-1, (3, 4, 8)).unbind(2))
        context_k, context_v = (x.transpose(1, 2) for x in context.unflatten(-1, (2, 4, 8)).unbind(2))
        bias = RelativePositionBias(table) if form == "table" else table[0, :, None, None]
        h = ops.attention(q, k, v, context_k=context_k, context_v=context_v, bias=bias, key_mask=mask)
        return h.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    for batch, length, text in ((2, 12, 5), (3, 20, 7), (3, 9, 7)):
        leaves = [torch.randn(batch, length, 96, requires_grad=True), torch.randn(batch, text, 64, requires_grad=True)]
        mask = torch.rand(batch, length + text) > 0.3
        results = []
        for run in (block, compiled):
            y = run(*leaves, mask)
            results.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, table])])
        assert results[0][0].stride() == results[1][0].stride()
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_compiles_under_autocast(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    q, k, v = packed(9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(q, k, v), ops.attention(q, k, v))


def test_traces_with_symbolic_shapes(backend: str) -> None:
    """Where no Dynamo stands between: in `make_fx` and in `torch.export` with strict=False."""

    def run(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        return ops.attention(q, k, k, bias=RelativePositionBias(table))

    arguments = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8), torch.randn(32, 4)
    traced = make_fx(run, tracing_mode="symbolic")(*arguments)
    torch.testing.assert_close(traced(*arguments), run(*arguments))


def test_meta_tensors() -> None:
    q = torch.empty(2, 4, 9, 16, device="meta", dtype=torch.bfloat16)
    out = ops.attention(q, q, q)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")


def test_a_scale_may_be_an_argument_of_a_compiled_function() -> None:
    x = torch.randn(1, 2, 5, 16)
    attend = torch.compile(lambda x, scale: ops.attention(x, x, x, scale=scale), fullgraph=True, backend="aot_eager")
    for scale in (0.25, 0.5, 0.75):
        assert torch.equal(attend(x, scale), ops.attention(x, x, x, scale=scale))
