"""Attention over two segments of keys, in plain PyTorch; `imagen_fast.ops.attention` explains it.

T5's relative position bias is here too: Raffel et al. 2020 (arXiv:1910.10683), section 2.1; its buckets as Hugging Face
transformers computes them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tracing import transforms_active


class RelativePositionBias(NamedTuple):
    """T5's relative position bias: a learned number per head and bucket of distances, added to the scores.

        bias[h, i, j] = table[bucket(j - i), h]

    for query i and key j, both counted from 0 and without the context, whose keys get 0. (Bidirectional) keys to the
    right use the upper half of the rows. Of the rows for a direction, the first half stand for one distance each, the
    others for logarithmically wider ranges up to `max_distance`, beyond which all share the last row.

    Args:
        table: (buckets, heads): one row per bucket, one column per query head.
        bidirectional: whether keys to the right of a query have buckets of their own, as in an encoder. If not, as in a
            decoder, they are all treated as being at distance 0 (and usually masked).
        max_distance: the distance at which the last bucket begins.

    Source: Raffel et al. 2020 (arXiv:1910.10683), as in transformers' `T5Attention`.

    Example:
        >>> bias = imagen_fast.RelativePositionBias(torch.randn(32, 8))
        >>> h = ops.attention(q, k, v, bias=bias, scale=1.0)  # 8 query heads
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128


def relative_position_bucket(distance: Tensor, num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The row of the table for each signed distance `key position - query position` (integers, any shape).

    With r rows for a direction, r // 2 of them stand for one distance each; r // 2 is at least 1 and less than
    `max_distance`. Returns int64.
    """
    first = torch.zeros_like(distance, dtype=torch.int64)
    rows = num_buckets
    if bidirectional:
        rows //= 2
        first = (distance > 0).to(torch.int64) * rows
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = rows // 2
    # The order of these operations is transformers', so that a distance at a boundary is rounded to the same side.
    octave = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = exact + (octave * (rows - exact)).to(torch.int64)
    return first + torch.where(distance < exact, distance, far.clamp(max=rows - 1))


def materialized(bias: RelativePositionBias, queries: int, keys: int) -> Tensor:
    """The bias of every query and key, (1, heads, queries, keys), in the table's dtype."""
    position = torch.arange(max(queries, keys), device=bias.table.device)
    distance = position[None, :keys] - position[:queries, None]
    bucket = relative_position_bucket(distance, bias.table.shape[0], bias.bidirectional, bias.max_distance)
    return F.embedding(bucket, bias.table).permute(2, 0, 1)[None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    bias: Tensor | RelativePositionBias | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """`softmax(q k^T * scale + bias) v` over the keys [context; k]; see `imagen_fast.ops.attention`.

    It is what a model written in PyTorch does: segments are joined by `torch.cat`, the relative position bias is
    materialised, and `F.scaled_dot_product_attention` does the rest.
    """
    context_keys = 0 if context_k is None else context_k.shape[2]
    queries, own_keys = q.shape[2], k.shape[2]
    outer = 2 if heads_are_inner(q) else 1  # in memory, of heads and positions
    if context_k is not None and context_v is not None:
        k, v = torch.cat((context_k, k), dim=2), torch.cat((context_v, v), dim=2)
    if q_scale is not None and k_scale is not None:
        q, k = normalized(q, q_scale), normalized(k, k_scale)
    if isinstance(bias, RelativePositionBias):
        bias = F.pad(materialized(bias, queries, own_keys), (context_keys, 0))
    mask = _joint_mask(bias, key_mask, q, k)
    out = _without_scores(q, k, v, mask) if 0 in (*q.shape[:3], k.shape[2]) else _attended(q, k, v, mask, scale)
    return out.transpose(1, outer).contiguous().transpose(1, outer)


def _joint_mask(bias: Tensor | None, key_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Bias and mask of all keys, as `F.scaled_dot_product_attention` takes them."""
    attended = None if key_mask is None else key_mask[:, None, None, :]
    if bias is None:
        return attended
    mask = bias if bias.dtype in (q.dtype, torch.float32) else bias.float()
    if attended is not None:
        mask = mask.masked_fill(~attended, -math.inf)
    return mask.expand(*q.shape[:3], k.shape[2])


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`F.scaled_dot_product_attention`, which under autocast would round the mask as well."""
    device = q.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and q.dtype == torch.get_autocast_dtype(device):  # so are k and v
        with torch.autocast(device, enabled=False):
            return _attended(q, k, v, mask, scale)
    grouped = bool(q.shape[1] != k.shape[1])
    if transforms_active():  # its kernels have no forward-mode derivative, and do not see that a mask needs a gradient
        return torch._scaled_dot_product_attention_math(q, k, v, mask, scale=scale, enable_gqa=grouped)[0]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)


def _without_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The result where there are no queries or no keys: step by step, so that all tensors have gradients.

    (`F.scaled_dot_product_attention` then leaves the mask out of the graph.)
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    return scores.softmax(-1).to(q.dtype) @ v


def heads_are_inner(x: Tensor) -> bool:
    """Whether x (B, H, L, D) lies in memory as (B, L, H, D), as it comes out of a projection, or as (B, H, L, D)."""
    return x.stride(1) < x.stride(2)


def normalized(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., D) l2-normalised over D and multiplied by scale (D,): in float32 or wider, rounded once to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.normalize(x.to(wide), dim=-1) * scale.to(wide)).to(x.dtype)
