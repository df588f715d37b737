"""Brings padded, ragged, packed and cut sequences into the order of the operators, and results back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake

from ..._backends import is_compiling
from .._library import LIBRARY


class Order(NamedTuple):
    """Tokens of sequences of any length, sorted by time and by falling length.

    `resets` cut a sequence into segments that know nothing of each other, which here become sequences of their own:
    fewer steps with more rows, which is what the operators are fast at, and none of them needs to know about resets.
    """

    tokens: Tensor  #: (N,) where the operators' tokens are in the layout given
    batch_sizes: Tensor  #: rows of each step, on the CPU
    owner: Tensor  #: (R,) sequence of a row
    last: Tensor  #: (2, B) by direction: the row in which a sequence ends
    begins: Tensor | None  #: (2, R) by direction: rows that begin with the state given; None: all

    def initial(self, state: Tensor) -> Tensor:
        """A state (B, H), or (2, B, H) of both directions, for the rows; zero for those that a reset begins."""
        rows = state.index_select(-2, self.owner)
        if self.begins is None:
            return rows
        begins = self.begins[0] if state.dim() == 2 else self.begins
        return torch.where(begins.unsqueeze(-1), rows, 0)

    def final(self, state: Tensor) -> Tensor:
        """The sequences' final state (B, H) or (2, B, H) from the rows'."""
        if state.dim() == 2 or self.begins is None:
            return state.index_select(-2, self.last[0])
        return torch.stack([s.index_select(0, last) for s, last in zip(state.unbind(0), self.last, strict=True)])


def order_of(
    lengths: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, steps: int, batch: int, like: Tensor
) -> Order:
    """The order of a padded batch of `lengths` (B) and `resets` (T, B), or of a packed one of `resets` (N,).

    How many tokens, rows and steps there are is data; a graph has room for all that there may be (`_padded_order`).
    """
    if not is_compiling():
        return _order_of(lengths, resets, batch_sizes, steps, batch, like)
    tokens, sizes, owner, last, begins = _padded_order(lengths, resets, batch_sizes, steps, batch, like)
    return Order(tokens, sizes, owner, last, None if resets is None else begins)


def _order_of(
    lengths: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, steps: int, batch: int, like: Tensor
) -> Order:
    if batch_sizes is not None:
        assert resets is not None
        sizes = batch_sizes.to(like.device).unsqueeze(1)
        row = torch.arange(batch, device=like.device)
        exists = row < sizes
        index = (sizes.cumsum(0) - sizes + row) * exists
        return _order(exists.sum(0), steps, index, resets[index] & exists)
    if lengths is None:
        lengths = torch.full((batch,), steps, device=like.device)
    time = torch.arange(steps, device=like.device).unsqueeze(1)
    return _order(lengths, steps, time * batch + torch.arange(batch, device=like.device), resets)


def _order(lengths: Tensor, steps: int, places: Tensor, resets: Tensor | None) -> Order:
    """lengths (B); places (T, B): where each token is; resets (T, B)."""
    batch, device = lengths.shape[0], lengths.device
    time, lengths = torch.arange(steps, device=device).unsqueeze(1), lengths.long()
    owner = torch.arange(batch, device=device)
    first = last = owner  # rows of a sequence
    exists, row, position, begins = time < lengths, owner.expand(steps, batch), time.expand(steps, batch), None
    if resets is not None:
        cut = resets & exists
        inner = cut & (time > 0)
        counts = inner.sum(0) + 1
        ends = counts.cumsum(0)
        first, last = ends - counts, ends - 1
        row = first + inner.cumsum(0)
        position = time - torch.where(inner, time, 0).cummax(0)[0] if steps else position
        owner = torch.repeat_interleave(owner, counts)
        whole = torch.zeros_like(owner, dtype=torch.bool)
        kept = ~cut[0] if steps else torch.ones_like(first, dtype=torch.bool)
        begins = torch.stack((whole.index_copy(0, first, kept), whole.index_fill(0, last, True)))
        lengths = torch.bincount(row[exists], minlength=owner.shape[0])
    # Rows by falling length, tokens by position and then by row.
    order = torch.argsort(lengths, descending=True, stable=True)
    rank = torch.argsort(order)
    place = (position * order.shape[0] + rank[row])[exists]
    tokens = places[exists][torch.argsort(place)]
    sizes = torch.bincount(position[exists], minlength=1)
    ending = rank[torch.stack((last, first))]
    return Order(tokens, sizes[sizes > 0].cpu(), owner[order], ending, None if begins is None else begins[:, order])


def _padded(
    lengths: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, steps: int, batch: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An order whose sizes are not data. Behind the tokens come those that no sequence has; further steps have no rows,
    further rows no steps and a state of zeros. Lengths are those that `_ids.checked` gives."""
    order = _order_of(lengths, resets, batch_sizes, steps, batch, like)
    room = _room(resets, batch_sizes, steps, batch)
    absent = torch.ones(room[0], dtype=torch.bool, device=like.device).index_fill_(0, order.tokens, False)
    begins = order.owner.new_zeros(2, 0, dtype=torch.bool) if order.begins is None else order.begins
    return (
        torch.cat((order.tokens, absent.nonzero().squeeze(1))),
        _longer(order.batch_sizes, steps),
        _longer(order.owner, room[1]),
        order.last,
        _longer(begins, 0 if order.begins is None else room[1]),
    )


def _longer(t: Tensor, size: int) -> Tensor:
    return torch.cat((t, t.new_zeros(*t.shape[:-1], size - t.shape[-1])), -1)


def _room(resets: Tensor | None, batch_sizes: Tensor | None, steps: int, batch: int) -> tuple[int, int]:
    """Tokens, and rows: a sequence of no steps is one as well."""
    tokens = resets.shape[0] if batch_sizes is not None and resets is not None else steps * batch
    return tokens, batch if resets is None else tokens + batch


def _fake(
    lengths: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, steps: int, batch: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, rows = _room(resets, batch_sizes, steps, batch)

    def empty(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return like.new_empty(sizes, dtype=dtype)

    begins = empty(2, 0 if resets is None else rows, dtype=torch.bool)
    return empty(tokens), torch.empty(steps, dtype=torch.int64), empty(rows), empty(2, batch), begins


LIBRARY.define(
    "recurrent_order(Tensor? lengths, Tensor? resets, Tensor? batch_sizes, SymInt steps, SymInt batch, Tensor like) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("recurrent_order", _padded, _key)
register_fake("pykernels::recurrent_order", _fake, lib=LIBRARY)
_padded_order = torch.ops.pykernels.recurrent_order.default
