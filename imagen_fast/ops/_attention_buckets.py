"""The bucket of each diagonal of a score matrix, which is all that T5's relative position bias depends on."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tracing import is_traced, makes_tensors_to_keep
from ..reference.attention import RelativePositionBias, relative_position_bucket

# For each device and kind of bias, and each power of two n: the buckets of the distances 1 - n to n - 1. Queries and
# keys up to n are served by a slice, so a few kilobytes a kind are the most that gathers here, and nothing that is
# handed out is ever freed, which a captured CUDA graph would not survive.
_buckets: dict[tuple[torch.device, int, bool, int, int], Tensor] = {}


def diagonal_buckets(bias: RelativePositionBias, queries: int, keys: int) -> Tensor:
    """(max(queries + keys - 1, 0),) int32; element j - i + queries - 1 is the row of the table for query i, key j."""
    table = bias.table
    kind = (table.shape[0], bool(bias.bidirectional), bias.max_distance)
    if is_traced():
        return _computed(1 - queries, queries + keys - 1, kind, table.device)
    queries, keys = int(queries), int(keys)  # `torch.jit.trace` makes tensors of sizes
    n = 1 << max(queries - 1, keys - 1, 1).bit_length()
    key = (table.device, *kind, n)
    found = _buckets.get(key)
    if found is None:
        if not makes_tensors_to_keep(table.device):
            return _computed(1 - queries, queries + keys - 1, kind, table.device)
        with torch.inference_mode(False):  # autograd cannot save what was made in inference mode
            found = _computed(1 - n, 2 * n - 1, kind, table.device)
        if table.device.type == "cuda":  # another stream may be the next to read it
            torch.cuda.current_stream(table.device).synchronize()
        _buckets[key] = found
    return found[n - queries : max(n + keys - 1, n - queries)]


def _computed(first: int, count: int, kind: tuple[int, bool, int], device: torch.device) -> Tensor:
    distance = torch.arange(max(count, 0), device=device) + first
    return relative_position_bucket(distance, *kind).to(torch.int32)
