"""Packed tokens: which token comes before which, as indices; and the products of all tokens at once.

Tokens are sorted by time, step t having the first `sizes[t]` rows of the batch, which never become more. A loop
"visits" steps in the order of time, or against it for a reversed layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Visit(NamedTuple):
    """One step of the loop. Rows below `begun` have their state at token `previous + row`, others their initial state;
    rows from `staying` on are not visited again, those below have their next token at `following + row`."""

    offset: int
    rows: int
    previous: int
    begun: int
    following: int
    staying: int


class Steps:
    """The steps of one layer in one direction.

    Raises:
        RuntimeError: `batch_sizes` (or without it the batch) does not divide up the tokens.
    """

    def __init__(self, tokens: int, batch: int, batch_sizes: Tensor | None, reverse: bool) -> None:
        self.tokens, self.batch, self.reverse, self.uniform = tokens, batch, reverse, batch_sizes is None
        if batch_sizes is None:
            if batch and tokens % batch:
                raise RuntimeError(f"{tokens} tokens are no multiple of the batch size {batch}")
            self.sizes = [batch] * (tokens // batch) if batch else []
        else:
            self.sizes = [int(n) for n in batch_sizes.tolist()]
            falling = all(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
            if (
                sum(self.sizes) != tokens
                or not falling
                or (self.sizes and not batch >= self.sizes[0] >= self.sizes[-1] >= 1)
            ):
                raise RuntimeError(
                    f"batch_sizes must be positive, not increase, begin with at most {batch} and add up to {tokens}, "
                    f"not {self.sizes}"
                )
        self.offsets = [0]
        for n in self.sizes:
            self.offsets.append(self.offsets[-1] + n)

    def visits(self) -> Iterator[Visit]:
        last = len(self.sizes) - 1
        for t in range(last, -1, -1) if self.reverse else range(last + 1):
            before, after = (t + 1, t - 1) if self.reverse else (t - 1, t + 1)
            n = self.sizes[t]
            yield Visit(
                self.offsets[t],
                n,
                self.offsets[before] if 0 <= before <= last else 0,
                min(n, self.sizes[before]) if 0 <= before <= last else 0,
                self.offsets[after] if 0 <= after <= last else 0,
                min(n, self.sizes[after]) if 0 <= after <= last else 0,
            )

    def offsets_on(self, device: torch.device) -> Tensor:
        """First token of every step and the number of tokens, int64."""
        if self.uniform:
            return torch.arange(len(self.sizes) + 1, device=device) * self.batch
        return torch.tensor(self.offsets, dtype=torch.int64).to(device, non_blocking=True)

    def tile_steps(self, rows: int, device: torch.device) -> Tensor:
        """For every tile of `rows` rows of the batch, how many steps have one of them: int32."""
        tiles = range(0, self.batch, rows)
        if self.uniform:
            return torch.full((len(tiles),), len(self.sizes), dtype=torch.int32, device=device)
        counts = [sum(n > first for n in self.sizes) for first in tiles]
        return torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)

    def before(self, after: Tensor, initial: Tensor) -> Tensor:
        """The state that every token's step starts from, given the state after it: (N, H)."""
        if self.uniform:
            rest = after.shape[0] - self.batch
            if rest < 0:
                return after
            parts = (after[self.batch :], initial) if self.reverse else (initial, after[:rest])
            return torch.cat(parts)
        index = torch.cat(
            [self._before(visit) for visit in sorted(self.visits())] or [torch.empty(0, dtype=torch.int64)]
        )
        return torch.cat((after, initial)).index_select(0, index.to(after.device))

    def _before(self, visit: Visit) -> Tensor:
        rows = torch.arange(visit.rows)
        return torch.where(rows < visit.begun, visit.previous + rows, self.tokens + rows)

    def first(self) -> Tensor | slice:
        """Index of the first token of every row that is visited at all."""
        rows = self.sizes[0] if self.sizes else 0
        if not self.reverse:
            return slice(0, rows)
        if self.uniform:
            return slice(self.tokens - rows, self.tokens)
        return torch.cat([torch.arange(v.begun, v.rows) + v.offset for v in self.visits()])

    def flipped(self) -> Steps:
        """The same tokens visited in the other order: first() is then the last one, before() what follows."""
        other = copy.copy(self)
        other.reverse = not self.reverse
        return other


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32. Autocast had its say before: it would lower float32 once more."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32 or not a.is_cuda or a.numel() == 0:
            return a.float() @ b.float()
        return torch.mm(a, b, out_dtype=torch.float32)


def biases(gates: int, hidden: int, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    """Both biases in float32, added up; of a GRU (3 gates) in four parts: r, z, the input's n, the state's n."""
    found = [b.float() for b in (b_ih, b_hh) if b is not None]
    if gates != 3 or not found:
        return found[0] + found[1] if len(found) == 2 else found[0] if found else None
    split = 2 * hidden
    gated = found[0][:split] + found[1][:split] if len(found) == 2 else found[0][:split]
    zero = found[0].new_zeros(hidden)
    return torch.cat((gated, zero if b_ih is None else found[0][split:], zero if b_hh is None else found[-1][split:]))
