"""What both GPU floors of the recurrent room do in torch before and after their time loops.

Tokens are packed: sorted by time, step t having the first `sizes[t]` rows of the batch, which never become more. A loop
"visits" steps in the order of time, or against it for a reversed layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    def first(self, values: Tensor) -> Tensor:
        """Of every row that is visited at all: its first token's part of `values` (N, ...)."""
        if not self.sizes:
            return values[:0]
        if not self.reverse:
            return values[: self.sizes[0]]
        if self.uniform:
            return values[self.tokens - self.batch :]
        found = [torch.arange(v.begun, v.rows) + v.offset for v in self.visits()]
        return values.index_select(0, torch.cat(found).to(values.device))


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


#: Gates of a cell, and what is kept of each token and of its gradient, in hidden sizes.
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
WIDTH = {"lstm": 4, "gru": 4, "tanh": 1, "relu": 1}


@dataclass
class Forward:
    """What a loop forward is given, all dense, and what it fills: `output`, `kept`, `cells`.

    h_n and c_n hold the initial states, in place of which it writes the final ones.
    """

    kind: str
    steps: Steps
    gates: Tensor  #: (N, G H) float32: the input's part
    bias: Tensor | None
    w_hh: Tensor
    h0: Tensor
    output: Tensor  #: (N, H)
    h_n: Tensor
    c_n: Tensor | None  #: float32; of an LSTM
    kept: Tensor | None  #: (N, 4 H): gates after their activations; may be the memory of `gates`
    cells: Tensor | None  #: (N, H) float32: c
    products: Tensor | None = None  #: (N, G H) float32: the state's part, where `output` is known: nothing else is made


@dataclass
class Backward:
    """What a loop backward is given, all dense but dy, whose rows may lie apart.

    It fills dgates (N, W H): the gradients of i, f, g, o; of n, r, z, n' (the first three are those of the input's
    part, the last three of the state's); of the only gate. `carry`, float32, holds dc_n and becomes dc0; of a GRU it is
    dh and becomes what of dh0 bypasses W_hh.
    """

    kind: str
    steps: Steps
    dy: Tensor
    dh: Tensor  #: (B, H) float32: dh_n, and in the end dh0, if the loop says so
    carry: Tensor | None
    w_hh: Tensor
    h0: Tensor
    c0: Tensor | None
    output: Tensor
    kept: Tensor | None
    cells: Tensor | None
    dgates: Tensor


class Floor:
    """The recurrent room's operators over the loops of one floor, which a subclass has."""

    def forward(self, f: Forward) -> None:
        raise NotImplementedError

    def backward(self, b: Backward) -> bool:
        """Whether `dh` is dh0 now. Otherwise it is dh_n still."""
        raise NotImplementedError

    def lstm_forward(
        self, input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, reverse: bool,
        save: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        _refuse(w_hr, peephole)
        f = self._run("lstm", input, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, save)
        c_n, none = f.c_n, f.gates.new_empty(0, f.gates.shape[1], dtype=_kept_dtype("lstm", input))
        assert c_n is not None
        kept = none if f.kept is None else f.kept
        cells = f.gates.new_empty(0, h0.shape[1]) if f.cells is None else f.cells
        return f.output, f.h_n, c_n.to(c0.dtype), kept, cells

    def lstm_recompute(
        self, input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, output: Tensor,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _refuse(w_hr, peephole)
        f = self._run("lstm", input, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, True, output)
        assert f.kept is not None and f.cells is not None
        return f.kept, f.cells

    def lstm_backward(
        self, dy: Tensor, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor,
        w_hh: Tensor, w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, output: Tensor,
        gates: Tensor, cells: Tensor, reverse: bool, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        _refuse(w_hr, peephole)
        found = self._run_backward(
            "lstm", dy, dh_n, dc_n, input, h0, c0, w_ih, w_hh, batch_sizes, output, gates, cells, reverse,
            output_mask[:6],
        )  # fmt: skip
        return *found[:6], w_ih.new_empty(0), w_ih.new_empty(0)

    def gru_forward(
        self, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
        batch_sizes: Tensor | None, reverse: bool, save: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        f = self._run("gru", input, h0, None, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, save)
        return f.output, f.h_n, f.gates.new_empty(0, 4 * h0.shape[1]) if f.kept is None else f.kept

    def gru_recompute(
        self, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
        batch_sizes: Tensor | None, output: Tensor, reverse: bool,
    ) -> Tensor:  # fmt: skip
        f = self._run("gru", input, h0, None, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, True, output)
        assert f.kept is not None
        return f.kept

    def gru_backward(
        self, dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
        batch_sizes: Tensor | None, output: Tensor, gates: Tensor, reverse: bool, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of_input, of_h0, *rest = output_mask
        dx, dh0, _, *weights = self._run_backward(
            "gru", dy, dh_n, None, input, h0, None, w_ih, w_hh, batch_sizes, output, gates, None, reverse,
            (of_input, of_h0, False, *rest),
        )  # fmt: skip
        return dx, dh0, *weights

    def rnn_forward(
        self, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
        batch_sizes: Tensor | None, nonlinearity: str, reverse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        f = self._run(nonlinearity, input, h0, None, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, False)
        return f.output, f.h_n

    def rnn_backward(
        self, dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
        batch_sizes: Tensor | None, output: Tensor, nonlinearity: str, reverse: bool, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of_input, of_h0, *rest = output_mask
        dx, dh0, _, *weights, _ = self._run_backward(
            nonlinearity, dy, dh_n, None, input, h0, None, w_ih, w_hh, batch_sizes, output, None, None, reverse,
            (of_input, of_h0, False, *rest),
        )  # fmt: skip
        return dx, dh0, *weights

    def _run(
        self, kind: str, input: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, batch_sizes: Tensor | None, reverse: bool, keep: bool, known: Tensor | None = None,
    ) -> Forward:  # fmt: skip
        """known: the output of an earlier run, whose gates are wanted again."""
        (batch, hidden), tokens = h0.shape, input.shape[0]
        steps = Steps(tokens, batch, batch_sizes, reverse)
        h0, w_hh = dense(h0), dense(w_hh)
        gates = product(input, w_ih.t())
        kept = cells = None
        if keep and kind == "gru":
            kept = gates.new_empty(tokens, 4 * hidden)
        elif keep and kind == "lstm":
            dtype = _kept_dtype(kind, input)
            kept = gates if dtype == torch.float32 else torch.empty_like(gates, dtype=dtype)
            cells = gates.new_empty(tokens, hidden)
        output = input.new_empty(tokens, hidden) if known is None else dense(known)
        products = None if known is None else product(steps.before(output, h0), w_hh.t())
        bias, c_n = biases(GATES[kind], hidden, b_ih, b_hh), None if c0 is None else copied(c0)
        f = Forward(kind, steps, gates, bias, w_hh, h0, output, h0.clone(), c_n, kept, cells, products)
        if output.numel():
            self.forward(f)
        return f

    def _run_backward(
        self, kind: str, dy: Tensor, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor, h0: Tensor,
        c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, output: Tensor, kept: Tensor | None,
        cells: Tensor | None, reverse: bool, mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """dx, dh0, dc0, dW_ih, dW_hh, db_ih, db_hh (the same as db_ih but for a GRU); mask: the last two as one."""
        of_input, of_h0, of_c0, of_w_ih, of_w_hh, of_bias = mask
        (batch, hidden), tokens, gru = h0.shape, input.shape[0], kind == "gru"
        steps, gated = Steps(tokens, batch, batch_sizes, reverse), GATES[kind] * hidden
        dh = h0.new_zeros(h0.shape, dtype=torch.float32) if dh_n is None else copied(dh_n)
        carry = dh if gru else None
        if c0 is not None:
            carry, c0 = h0.new_zeros(h0.shape, dtype=torch.float32) if dc_n is None else copied(dc_n), dense(c0)
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        dgates = input.new_empty(tokens, WIDTH[kind] * hidden)
        b = Backward(kind, steps, dy, dh, carry, dense(w_hh), dense(h0), c0, dense(output), kept, cells, dgates)
        d_input, d_state = (dgates[:, :gated], dgates[:, -gated:]) if gru else (dgates, dgates)
        if output.numel() and not self.backward(b) and of_h0:
            first = product(steps.first(d_state), b.w_hh)
            dh[: first.shape[0]] = first + dh[: first.shape[0]] if gru else first
        if gru:
            w_ih = torch.cat((w_ih[2 * hidden :], w_ih[: 2 * hidden]))  # in the order of d_input: n, r, z
        dw_ih = product(d_input.t(), input) if of_w_ih else None
        db_ih = d_input.sum(0, dtype=torch.float32) if of_bias else None  # one sum of torch's: its order is fixed
        found = (
            product(d_input, w_ih) if of_input else None,
            dh if of_h0 else None,
            carry if of_c0 else None,
            _rzn(dw_ih, hidden) if gru else dw_ih,
            product(d_state.t(), steps.before(b.output, b.h0)) if of_w_hh else None,
            _rzn(db_ih, hidden) if gru else db_ih,
            d_state.sum(0, dtype=torch.float32) if of_bias and gru else None,
        )
        return tuple(input.new_empty(0) if t is None else t.to(input.dtype) for t in found)


def dense(x: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes at a time can be read."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def copied(x: Tensor) -> Tensor:
    """float32, in memory of its own: loops write there."""
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _kept_dtype(kind: str, input: Tensor) -> torch.dtype:
    return torch.float32 if kind == "gru" or input.dtype == torch.float32 else torch.float16


def _rzn(x: Tensor | None, hidden: int) -> Tensor | None:
    return None if x is None else torch.cat((x[hidden:], x[:hidden]))


def _refuse(w_hr: Tensor | None, peephole: Tensor | None) -> None:
    """Operators may be called on their own; the public functions never come here with either."""
    if w_hr is not None or peephole is not None:
        raise NotImplementedError("the recurrent kernels on GPUs do not serve projections and peepholes")
