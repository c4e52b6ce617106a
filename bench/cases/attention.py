"""Cases of `ops.attention`: pixels to text and pixels (Imagen, DeepFloyd IF), T5's bias, imagen-pytorch's heads.

Peers: softmax written out ("eager"), `F.scaled_dot_product_attention` over joined segments ("sdpa"), `torch.compile` of
either, and FlexAttention over joined segments ("flex"). Where there is a position bias, the forward cases give eager
and sdpa one that was materialised before the clock started, as a T5 does once for all its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import RelativePositionBias, ops
from ...ops._attention_buckets import diagonal_buckets
from ...reference.attention import attention as reference
from ...reference.attention import materialized, normalized
from ..peers import compiled
from ..registry import Case, Direction, Function, Peer, dtype_name, random_normal

OP = "attention"
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FORWARD: tuple[Direction, ...] = ("forward",)
BOTH: tuple[Direction, ...] = ("forward", "backward")

# Matrix products of the score matrix's size and the head width: q k^T and p v; the backward pass of two halves, which
# write dq, and dk and dv, without atomics, takes q k^T and dout v^T twice.
_PRODUCTS = {"forward": 2, "backward": 7, "forward_backward": 9}


class _Sizes(NamedTuple):
    batch: int
    heads: int
    queries: int
    context: int
    keys: int
    width: int = 64
    kv_heads: int | None = None
    form: str = "plain"  # "t5": a position bias and scale 1; "normalized": l2-normalised q and k, scale 8

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.kv_heads is None else f"{self.heads}on{self.kv_heads}"
        keys = f"{self.context}+{self.keys}" if self.context else f"{self.keys}"
        return f"{self.batch}x{heads}x{self.queries}x{keys}x{self.width}-{self.form}"


def cases() -> Iterator[Case]:
    """All of them; the name is batch x heads x queries x keys x width-form-dtype-direction."""
    common = (FP32, BF16)
    yield from _grid(_Sizes(2, 8, 1024, 77, 1024), common, BOTH, tags={"headline"})
    yield from _grid(_Sizes(2, 8, 1024, 77, 1024), (FP16,), FORWARD)
    yield from _grid(_Sizes(2, 12, 128, 0, 128, form="t5"), common, BOTH, tags={"headline"})
    yield from _grid(_Sizes(8, 8, 1024, 256, 1024), (BF16,), BOTH)
    yield from _grid(_Sizes(8, 8, 256, 256, 256), (BF16,), BOTH)
    yield from _grid(_Sizes(4, 64, 256, 0, 256, form="t5"), common, FORWARD)
    yield from _grid(_Sizes(4, 64, 256, 0, 256, form="t5"), (BF16,), ("backward",))
    # DeepFloyd IF: 77 tokens of text, 32x32, 16x16 and 8x8 pixels.
    yield from _grid(_Sizes(2, 22, 1024, 77, 1024), (BF16,), FORWARD)
    yield from _grid(_Sizes(2, 33, 256, 77, 256), (BF16,), FORWARD)
    yield from _grid(_Sizes(2, 44, 64, 77, 64), common, FORWARD)
    yield from _grid(_Sizes(2, 8, 1024, 2, 1024, kv_heads=1, form="normalized"), common, FORWARD)
    yield from _grid(_Sizes(2, 8, 256, 77, 256, width=128), (BF16,), FORWARD)
    yield from _grid(_Sizes(1, 4, 16, 7, 16), common, BOTH, tags={"overhead"})


def _grid(
    sizes: _Sizes, dtypes: Iterable[torch.dtype], directions: Iterable[Direction], tags: Iterable[str] = ()
) -> Iterator[Case]:
    directions = tuple(directions)
    for dtype in dtypes:
        for direction in directions:
            yield _case(sizes, dtype, direction, frozenset(tags))


def _inputs(
    sizes: _Sizes, dtype: torch.dtype, direction: Direction
) -> Callable[[torch.Generator, str], dict[str, Any]]:
    def inputs(generator: torch.Generator, device: str) -> dict[str, Any]:
        kv_heads = sizes.kv_heads or sizes.heads

        def packed(length: int, *heads: int) -> list[Tensor]:
            """(B, heads, L, D) each, parts of one projection."""
            shape = (sizes.batch, length, sum(heads), sizes.width)
            parts = random_normal(generator, shape, dtype).to(device).split(list(heads), dim=2)
            return [part.transpose(1, 2) for part in parts]

        values: dict[str, Any] = {}
        if sizes.queries == sizes.keys:
            values["q"], values["k"], values["v"] = packed(sizes.keys, sizes.heads, kv_heads, kv_heads)
        else:
            (values["q"],) = packed(sizes.queries, sizes.heads)
            values["k"], values["v"] = packed(sizes.keys, kv_heads, kv_heads)
        if sizes.context:
            values["context_k"], values["context_v"] = packed(sizes.context, kv_heads, kv_heads)
        if sizes.form == "t5":
            values["q"] = values["q"] * sizes.width**-0.5  # a trained T5's scores
            values["table"] = random_normal(generator, (32, sizes.heads), dtype).to(device)
            if direction == "forward":
                bias = RelativePositionBias(values["table"])
                values["bias"] = materialized(bias, sizes.queries, sizes.keys).contiguous()
        elif sizes.form == "normalized":
            for name in ("q_scale", "k_scale"):
                values[name] = random_normal(generator, (sizes.width,), dtype, mean=1.0, std=0.1).to(device)
        return values

    return inputs


def _arguments(sizes: _Sizes, values: dict[str, Any]) -> dict[str, Any]:
    """Of the op, for a case's inputs."""
    arguments = {name: value for name, value in values.items() if name not in ("table", "bias")}
    if sizes.form == "t5":
        arguments |= {"bias": RelativePositionBias(values["table"]), "scale": 1.0}
    elif sizes.form == "normalized":
        arguments["scale"] = 8.0
    return arguments


class _Joined(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None


def _joined(sizes: _Sizes, values: dict[str, Any]) -> _Joined:
    """One segment of keys and a materialised bias, as PyTorch's own functions need them."""
    q, k, v = values["q"], values["k"], values["v"]
    if sizes.context:
        k, v = torch.cat((values["context_k"], k), dim=2), torch.cat((values["context_v"], v), dim=2)
    if sizes.form == "normalized":
        return _Joined(normalized(q, values["q_scale"]), normalized(k, values["k_scale"]), v, 8.0, None)
    if sizes.form == "t5":
        bias = values.get("bias")
        if bias is None:
            bias = materialized(RelativePositionBias(values["table"]), sizes.queries, sizes.keys)
        return _Joined(q, k, v, 1.0, bias)
    return _Joined(q, k, v, sizes.width**-0.5, None)


def _flex(sizes: _Sizes) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        from torch.nn.attention.flex_attention import flex_attention

        run = torch.compile(flex_attention, dynamic=False)

        def flex(**values: Any) -> Any:
            q, k, v, scale, _ = _joined(sizes, values)
            score = None
            if sizes.form == "t5":
                table = values["table"]
                buckets = diagonal_buckets(RelativePositionBias(table), sizes.queries, sizes.keys)
                first = sizes.queries - 1

                def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                    return s + table[buckets[j - i + first], h]

            return run(q, k, v, score_mod=score, scale=scale, enable_gqa=sizes.kv_heads is not None)

        return flex

    return build


def _case(sizes: _Sizes, dtype: torch.dtype, direction: Direction, tags: frozenset[str]) -> Case:
    def ours(**values: Any) -> Tensor:
        return ops.attention(**_arguments(sizes, values))

    def truth(**values: Any) -> Tensor:
        return reference(**_arguments(sizes, values))

    def eager(**values: Any) -> Tensor:
        q, k, v, scale, bias = _joined(sizes, values)
        if sizes.kv_heads is not None:
            k, v = (x.expand(-1, sizes.heads // sizes.kv_heads, -1, -1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scale
        return (scores if bias is None else scores + bias).float().softmax(-1).to(q.dtype) @ v

    def sdpa(**values: Any) -> Tensor:
        q, k, v, scale, bias = _joined(sizes, values)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=sizes.kv_heads is not None)

    peers = [
        Peer("eager", {"eager": lambda case: eager}),
        Peer("sdpa", {"sdpa": lambda case: sdpa}),
        compiled(eager if sizes.form == "t5" else sdpa, modes=("default",)),
    ]
    if direction == "forward":  # on the CPU it has no backward pass
        compile_peer = peers[2]
        peers.append(Peer("flex", {"flex": _flex(sizes)}, load=compile_peer.load, preparing=compile_peer.preparing))
    kv_heads, all_keys = sizes.kv_heads or sizes.heads, sizes.context + sizes.keys
    moved = sizes.batch * sizes.width * (2 * sizes.heads * sizes.queries + 2 * kv_heads * all_keys)  # q, out, k, v
    names = ["q", "k", "v", *(["context_k", "context_v"] if sizes.context else [])]
    names += {"t5": ["table"], "normalized": ["q_scale", "k_scale"]}.get(sizes.form, [])
    return Case(
        op=OP,
        name=f"{sizes.name}-{dtype_name(dtype)}-{direction}",
        title=f"{sizes.name.replace('x', '×')}",
        shape=(sizes.batch, sizes.heads, sizes.queries, sizes.width),
        dtype=dtype,
        layout="blhd",
        direction=direction,
        inputs=_inputs(sizes, dtype, direction),
        ours=ours,
        eager=truth,
        truth=truth,
        peers=tuple(peers),
        bytes=moved * dtype.itemsize * (1 if direction == "forward" else 2),
        flops=2 * _PRODUCTS[direction] * sizes.batch * sizes.heads * sizes.queries * all_keys * sizes.width,
        differentiable=tuple(names),
        tags=tags,
    )
