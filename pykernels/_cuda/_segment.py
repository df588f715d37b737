"""Positions sorted by id, as the kernels of csrc/cuda/embedding_segment.h take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Positions sorted by id.

    Attributes:
        keys: the ids, ascending; `rows` for entries that add to no row.
        source: the row of dy of each entry; factor: what it is multiplied by; place: its place in its bag.
        ranks: how many different ids come before each entry's, where the rows are to be adjacent.
    """

    rows: int
    keys: Tensor
    source: Tensor
    factor: Tensor | None = None
    place: Tensor | None = None
    ranks: Tensor | None = None


def key_dtype(rows: int) -> torch.dtype:
    """The narrowest that holds `rows`: half the sort's passes."""
    return torch.int32 if rows < 2**31 else torch.int64


def either(keys: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (keys, None) if keys.dtype == torch.int32 else (None, keys)


def adjacent(segments: Segments) -> tuple[Segments, Tensor]:
    """With ranks, and the different ids, ascending. Their number is a shape of the result, so it is read here."""
    keys = segments.keys
    begins = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=begins[1:])
    unique = keys[begins & (keys < segments.rows)].long()
    return segments._replace(ranks=begins.cumsum(0, dtype=torch.int32).sub_(1)), unique


def _chunk_length(n: int) -> int:
    """Entries of a chunk: some 2000 chunks to fill a GPU, and of the longest run so few partial sums to add.

    It must not depend on the device: the sums are grouped by it.
    """
    length = 32
    while length < 1024 and length * 2048 < n:
        length *= 2
    return length


def partial(segments: Segments, cols: int) -> tuple[int, Tensor | None]:
    """The length of a chunk, and room for what its runs leave to its neighbours."""
    n = segments.keys.numel()
    length = _chunk_length(n)
    chunks = -(-n // length)
    device = segments.keys.device
    return length, torch.empty((chunks, 2, cols), dtype=torch.float32, device=device) if chunks > 1 else None
