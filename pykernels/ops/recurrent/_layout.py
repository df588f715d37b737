"""Brings padded, ragged, packed and cut sequences into the order of the operators, and results back."""

from __future__ import annotations

import torch
from torch import Tensor


class Order:
    """Tokens of sequences of any length, sorted by time and by falling length.

    `resets` cut a sequence into segments that know nothing of each other, which here become sequences of their own:
    fewer steps with more rows, which is what the operators are fast at, and none of them needs to know about resets.

    Attributes:
        tokens: (N,) where the operators' tokens are in the layout given.
        batch_sizes: rows of each step, on the CPU.
    """

    def __init__(self, lengths: Tensor, steps: int, index: Tensor | None = None, resets: Tensor | None = None) -> None:
        """lengths (B); index (T, B): where each token is, by default t * B + b; resets (T, B)."""
        batch, device = lengths.shape[0], lengths.device
        time, lengths = torch.arange(steps, device=device).unsqueeze(1), lengths.long()
        self._owner = torch.arange(batch, device=device)  # sequence of a row
        self._last = (self._owner, self._owner)  # by direction: the row that ends last
        self._begins: tuple[Tensor, Tensor] | None = None  # by direction: rows that begin with the given state
        exists, row, position = time < lengths, self._owner.expand(steps, batch), time.expand(steps, batch)
        if resets is not None:
            cut = resets & exists
            inner = cut & (time > 0)
            counts = inner.sum(0) + 1
            ends = counts.cumsum(0)
            first, last = ends - counts, ends - 1
            row = first + inner.cumsum(0)
            position = time - torch.where(inner, time, 0).cummax(0)[0] if steps else position
            self._owner = torch.repeat_interleave(self._owner, counts)
            self._last = (last, first)
            whole = torch.zeros_like(self._owner, dtype=torch.bool)
            kept = ~cut[0] if steps else torch.ones_like(first, dtype=torch.bool)
            self._begins = (whole.index_copy(0, first, kept), whole.index_fill(0, last, True))
            lengths = torch.bincount(row[exists], minlength=self._owner.shape[0])
        # Rows by falling length, tokens by position and then by row.
        order = torch.argsort(lengths, descending=True, stable=True)
        rank = torch.argsort(order)
        self._owner, self._last = self._owner[order], (rank[self._last[0]], rank[self._last[1]])
        if self._begins is not None:
            self._begins = (self._begins[0][order], self._begins[1][order])
        place = (position * order.shape[0] + rank[row])[exists]
        places = time * batch + torch.arange(batch, device=device) if index is None else index
        self.tokens = places[exists][torch.argsort(place)]
        sizes = torch.bincount(position[exists], minlength=1)
        self.batch_sizes = sizes[sizes > 0].cpu()

    @classmethod
    def of_packed(cls, batch_sizes: Tensor, resets: Tensor) -> Order:
        """Of a packed batch whose `resets` (N,) cut it."""
        sizes = batch_sizes.to(resets.device).unsqueeze(1)
        steps, batch = sizes.shape[0], int(batch_sizes[0])
        row = torch.arange(batch, device=resets.device)
        exists = row < sizes
        index = (sizes.cumsum(0) - sizes + row) * exists
        return cls(exists.sum(0), steps, index, resets[index] & exists)

    def initial(self, state: Tensor, direction: int) -> Tensor:
        """A state (B, H) for the rows; zero for those that a reset begins."""
        rows = state.index_select(0, self._owner)
        return rows if self._begins is None else torch.where(self._begins[direction].unsqueeze(1), rows, 0)

    def final(self, state: Tensor, direction: int) -> Tensor:
        """The sequences' final state (B, H) from the rows'."""
        return state.index_select(0, self._last[direction])
