"""Entries sorted by the row that they add to, as the kernels of both GPU floors take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Entries sorted by row.

    Attributes:
        keys: the rows, ascending; `rows` for entries that add to none.
        source: the row of values of each entry; factor: what it is multiplied by; place: its place in its bag.
        ranks: how many different rows come before each entry's, where the sums are to be adjacent.
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


def by_row(ids: Tensor, source: Tensor, factor: Tensor | None, rows: int) -> Segments:
    """Entries sorted stably by id: each adds factor * values[source] to that row; ids outside add to none."""
    keys = torch.where((ids >= 0) & (ids < rows), ids, rows).to(key_dtype(rows))
    keys, order = torch.sort(keys, stable=True)
    return Segments(rows, keys, source[order], None if factor is None else factor[order])


def adjacent(segments: Segments) -> tuple[Segments, Tensor]:
    """With ranks, and the different rows, ascending. Their number is a shape of the result, so it is read here."""
    with_ranks, begins = ranked(segments)
    unique = segments.keys[begins & (segments.keys < segments.rows)].long()
    return with_ranks, unique


def ranked(segments: Segments) -> tuple[Segments, Tensor]:
    """With ranks, and which entries are the first of their row: nothing is read here."""
    keys = segments.keys
    begins = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=begins[1:])
    return segments._replace(ranks=begins.cumsum(0, dtype=torch.int32).sub_(1)), begins
