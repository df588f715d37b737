"""Packed tokens: which token comes before which, as indices; and the products of all tokens at once.

Tokens are sorted by time, step t having the first `sizes[t]` rows of the batch, which never become more. A loop
"visits" steps in the order of time, or against it in the second direction of a layer.
"""

from __future__ import annotations

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
    """The steps of one layer.

    `batch_sizes` may end in zeros and have fewer tokens than there are: those behind are padding, which `tokens` leaves
    out.

    Raises:
        RuntimeError: `batch_sizes` (or without it the batch) does not divide up the tokens.
    """

    def __init__(self, tokens: int, batch: int, batch_sizes: Tensor | None) -> None:
        self.tokens, self.batch, self.uniform = tokens, batch, batch_sizes is None
        if batch_sizes is None:
            if batch and tokens % batch:
                raise RuntimeError(f"{tokens} tokens are no multiple of the batch size {batch}")
            self.sizes = [batch] * (tokens // batch) if batch else []
        else:
            sizes = [int(n) for n in batch_sizes.tolist()]
            while sizes and sizes[-1] == 0:
                sizes.pop()
            if sum(sizes) > tokens or any(n < 1 or n > most for n, most in zip(sizes, [batch, *sizes], strict=False)):
                raise RuntimeError(
                    f"batch_sizes must be positive, not increase, begin with at most {batch} and add up to at most "
                    f"{tokens}, not {sizes}"
                )
            self.sizes, self.tokens = sizes, sum(sizes)
        self.offsets = [0]
        for n in self.sizes:
            self.offsets.append(self.offsets[-1] + n)

    def visits(self, reverse: bool) -> Iterator[Visit]:
        last = len(self.sizes) - 1
        for t in range(last, -1, -1) if reverse else range(last + 1):
            before, after = (t + 1, t - 1) if reverse else (t - 1, t + 1)
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

    def before(self, after: Tensor, initial: Tensor, flipped: bool = False) -> Tensor:
        """The state that every token's step starts from, given the state after it, (D, N, H), and the first, (D, B, H).

        flipped: as if each direction were the other one, which is what follows a token.
        """
        found = torch.empty(after.shape, dtype=after.dtype, device=after.device)
        for d in range(after.shape[0]):
            self._before(after[d], initial[d], (d == 1) != flipped, found[d])
        return found

    def _before(self, after: Tensor, initial: Tensor, reverse: bool, out: Tensor) -> None:
        if self.uniform:
            rest = max(0, after.shape[0] - self.batch)
            first = initial if self.sizes else initial[:0]
            torch.cat((after[self.batch :], first) if reverse else (first, after[:rest]), out=out)
            return
        parts = []
        for visit in sorted(self.visits(reverse)):
            rows = torch.arange(visit.rows)
            parts.append(torch.where(rows < visit.begun, visit.previous + rows, self.tokens + rows))
        index = torch.cat(parts or [torch.empty(0, dtype=torch.int64)]).to(after.device)
        torch.index_select(torch.cat((after, initial)), 0, index, out=out)

    def first(self, reverse: bool) -> Tensor | slice:
        """Index of the first token of every row that is visited at all; of the last one in the other direction."""
        rows = self.sizes[0] if self.sizes else 0
        if not reverse:
            return slice(0, rows)
        if self.uniform:
            return slice(self.tokens - rows, self.tokens)
        return torch.cat([torch.arange(v.begun, v.rows) + v.offset for v in self.visits(True)])


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a b in float32, of two matrices or of one for each direction; added to `plus`, two matrices' only, if given.

    Autocast had its say before: it would lower float32 once more.
    """
    if a.dim() == 3 and a.shape[0] == 1:
        return product(a[0], b[0]).unsqueeze(0)
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32 or not a.is_cuda or a.numel() == 0:
            a, b = a.float(), b.float()
            return a @ b if plus is None else plus.addmm_(a, b)
        if plus is not None:
            return torch.addmm(plus, a, b, out_dtype=torch.float32)
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def biases(gates: int, hidden: int, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    """Both biases (D, G H) in float32, added up; of a GRU (3 gates) in four parts: r, z, the input's n, the state's."""
    found = [b.float() for b in (b_ih, b_hh) if b is not None]
    if gates != 3 or not found:
        return (found[0] + found[1] if len(found) == 2 else found[0].contiguous()) if found else None
    split = 2 * hidden
    gated = found[0][:, :split] + found[1][:, :split] if len(found) == 2 else found[0][:, :split]
    zero = found[0].new_zeros(found[0].shape[0], hidden)
    of_input, of_state = (zero if b is None else b.float()[:, split:] for b in (b_ih, b_hh))
    return torch.cat((gated, of_input, of_state), 1)
