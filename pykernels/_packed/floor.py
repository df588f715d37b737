"""The recurrent room's operators as both GPU floors have them: what torch does before and after the time loop.

All products that do not wait for the step before are made here, for all tokens at once. So is what a projection adds:
h = W_hr m with m = o tanh(c), so the loop runs over m with W_hh W_hr in place of W_hh, and needs to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .steps import Steps, biases, product

#: Features of a call that the floors serve.
SERVED = frozenset(("proj_size", "peephole"))

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
    peephole: Tensor | None  #: (3 H) float32: p_i, p_f, p_o
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
    peephole: Tensor | None
    w_hh: Tensor
    h0: Tensor
    c0: Tensor | None
    output: Tensor
    kept: Tensor | None
    cells: Tensor | None
    dgates: Tensor


class Weights(NamedTuple):
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    peephole: Tensor | None = None


class Saved(NamedTuple):
    """What a forward leaves to its backward."""

    output: Tensor
    kept: Tensor | None = None
    cells: Tensor | None = None


class Floor:
    """The operators over the loops of one floor, which a subclass has."""

    def forward(self, f: Forward) -> None:
        raise NotImplementedError

    def backward(self, b: Backward) -> bool:
        """Whether `dh` is dh0 now. Otherwise it is dh_n still."""
        raise NotImplementedError

    def lstm_forward(self, input: Tensor, h0: Tensor, c0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, batch_sizes, reverse, save = rest
        found = self._run("lstm", input, h0, c0, Weights(*weights), batch_sizes, reverse, save)
        hidden, none = c0.shape[1], input.new_empty
        kept = none(0, 4 * hidden, dtype=_kept_dtype("lstm", input)) if found.kept is None else found.kept
        cells = none(0, hidden, dtype=torch.float32) if found.cells is None else found.cells
        return found.output, found.h_n, found.c_n.to(c0.dtype), kept, cells  # type: ignore[union-attr]

    def lstm_recompute(self, input: Tensor, h0: Tensor, c0: Tensor, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
        *weights, batch_sizes, output, reverse = rest
        found = self._run("lstm", input, h0, c0, Weights(*weights), batch_sizes, reverse, True, output)
        return found.kept, found.cells

    def lstm_backward(
        self, dy: Tensor, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor,
        w_hh: Tensor, w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, output: Tensor,
        gates: Tensor, cells: Tensor, reverse: bool, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        weights, saved = Weights(w_ih, w_hh, None, None, w_hr, peephole), Saved(output, gates, cells)
        steps = Steps(input.shape[0], h0.shape[0], batch_sizes, reverse)
        found = self._run_backward("lstm", steps, (dy, dh_n, dc_n), input, h0, c0, weights, saved, output_mask)
        return *found[:6], *found[7:]

    def gru_forward(self, input: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, batch_sizes, reverse, save = rest
        found = self._run("gru", input, h0, None, Weights(*weights), batch_sizes, reverse, save)
        none = input.new_empty(0, 4 * h0.shape[1], dtype=torch.float32)
        return found.output, found.h_n, none if found.kept is None else found.kept

    def gru_recompute(self, input: Tensor, h0: Tensor, *rest: Any) -> Tensor | None:
        *weights, batch_sizes, output, reverse = rest
        return self._run("gru", input, h0, None, Weights(*weights), batch_sizes, reverse, True, output).kept

    def gru_backward(
        self, dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
        batch_sizes: Tensor | None, output: Tensor, gates: Tensor, reverse: bool, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        mask = (*output_mask[:2], False, *output_mask[2:], False, False)
        steps, weights = Steps(input.shape[0], h0.shape[0], batch_sizes, reverse), Weights(w_ih, w_hh)
        saved = Saved(output, gates)
        found = self._run_backward("gru", steps, (dy, dh_n, None), input, h0, None, weights, saved, mask)
        return *found[:2], *found[3:7]

    def rnn_forward(self, input: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *weights, batch_sizes, nonlinearity, reverse = rest
        found = self._run(nonlinearity, input, h0, None, Weights(*weights), batch_sizes, reverse, False)
        return found.output, found.h_n

    def rnn_backward(
        self, dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
        batch_sizes: Tensor | None, output: Tensor, nonlinearity: str, reverse: bool, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        mask = (*output_mask[:2], False, *output_mask[2:], False, False)
        steps, weights = Steps(input.shape[0], h0.shape[0], batch_sizes, reverse), Weights(w_ih, w_hh)
        saved = Saved(output)
        found = self._run_backward(nonlinearity, steps, (dy, dh_n, None), input, h0, None, weights, saved, mask)
        return *found[:2], *found[3:6]

    def cell_forward(
        self, input: Tensor, h: Tensor, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, kind: str, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        save = save and kind in ("lstm", "gru")
        f = self._run(kind, input, h, c, Weights(w_ih, w_hh, b_ih, b_hh), None, False, save)
        found: list[Tensor | None] = [f.output]
        if c is not None and f.c_n is not None:
            found.append(f.c_n.to(c.dtype))
        if save:
            found.append(f.kept)
        if save and c is not None and c.dtype != torch.float32:
            found.append(f.cells)
        return found  # type: ignore[return-value]

    def cell_backward(
        self, dh: Tensor | None, dc: Tensor | None, input: Tensor, h: Tensor, c: Tensor | None, w_ih: Tensor,
        w_hh: Tensor, output: Tensor | None, gates: Tensor | None, cells: Tensor | None, kind: str,
        mask: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        of_input, of_h, of_c, of_w_ih, of_w_hh, of_b_ih, of_b_hh = mask
        steps, weights = Steps(input.shape[0], h.shape[0], None, False), Weights(w_ih, w_hh)
        saved = Saved(h if output is None else output, gates, cells)
        dh = h.new_zeros(h.shape) if dh is None else dh
        wanted = (of_input, of_h, of_c, of_w_ih, of_w_hh, of_b_ih or of_b_hh, False, False)
        found = self._run_backward(kind, steps, (dh, None, dc), input, h, c, weights, saved, wanted)
        dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh = found[:7]
        db_hh = db_hh if kind == "gru" else db_ih.clone() if of_b_ih else db_ih
        gradients = (dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh)
        return [gradient for gradient, of_it in zip(gradients, mask, strict=True) if of_it]

    def _run(
        self, kind: str, input: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights, batch_sizes: Tensor | None,
        reverse: bool, keep: bool, known: Tensor | None = None,
    ) -> Forward:  # fmt: skip
        """known: the output of an earlier run, whose gates are wanted again."""
        tokens, hidden = input.shape[0], h0.shape[1] if c0 is None else c0.shape[1]
        steps = Steps(tokens, h0.shape[0], batch_sizes, reverse)
        _check_layer(kind, input, h0, c0, weights, hidden)
        _check_shapes(output=(known, (tokens, h0.shape[1])))
        h0, w_hh, w_hr = dense(h0), dense(weights.w_hh), weights.w_hr
        gates = product(input, weights.w_ih.t())
        kept = cells = None
        if keep:
            dtype = _kept_dtype(kind, input)
            in_place = kind == "lstm" and dtype == torch.float32
            kept = gates if in_place else gates.new_empty(tokens, 4 * hidden, dtype=dtype)
            cells = gates.new_empty(tokens, hidden) if kind == "lstm" else None
        products = None if known is None else product(steps.before(known, h0), w_hh.t())
        output = input.new_empty(tokens, hidden) if known is None or w_hr is not None else dense(known)
        state = h0
        if w_hr is not None:
            w_hh, state = _combined(w_hh, w_hr), h0.new_zeros(h0.shape[0], hidden)
            if known is None:  # the first steps' products are of h0, which is W_hr of nothing
                first = steps.first()
                gates[first] += product(h0[: _rows(steps)], weights.w_hh.t())
        bias, c_n = biases(GATES[kind], hidden, weights.b_ih, weights.b_hh), None if c0 is None else copied(c0)
        peephole = None if weights.peephole is None else weights.peephole.float().contiguous()
        f = Forward(kind, steps, gates, bias, peephole, w_hh, state, output, state.clone(), c_n, kept, cells, products)
        if output.numel():
            self.forward(f)
        if w_hr is not None and known is None:
            f.output = product(f.output, w_hr.t()).to(input.dtype)
            f.h_n = h0.clone()
            f.h_n[: _rows(steps)] = f.output[steps.flipped().first()]
        return f

    def _run_backward(
        self, kind: str, steps: Steps, cotangents: tuple[Any, Any, Any], input: Tensor, h0: Tensor, c0: Tensor | None,
        weights: Weights, saved: Saved, mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """dx, dh0, dc0, dW_ih, dW_hh, db_ih, db_hh, dW_hr, dpeephole; mask: without db_hh, which goes by db_ih.

        The bias gradient is one sum of torch's, whose order is fixed."""
        of_input, of_h0, of_c0, of_w_ih, of_w_hh, of_bias, of_w_hr, of_peephole = mask
        hidden, gru, w_ih, w_hr = h0.shape[1] if c0 is None else c0.shape[1], kind == "gru", weights.w_ih, weights.w_hr
        gated, output, rows = GATES[kind] * hidden, dense(saved.output), _rows(steps)
        dy, dh_n, dc_n = cotangents
        _check_layer(kind, input, h0, c0, weights, hidden)
        tokens, batch = input.shape[0], h0.shape[0]
        _check_shapes(
            dy=(dy, (tokens, h0.shape[1])), dhn=(dh_n, h0.shape), dcn=(dc_n, (batch, hidden)),
            output=(output, (tokens, h0.shape[1])), gates=(saved.kept, (tokens, 4 * hidden)),
            cells=(saved.cells, (tokens, hidden)),
        )  # fmt: skip
        dh = h0.new_zeros(h0.shape, dtype=torch.float32) if dh_n is None else copied(dh_n)
        carry = dh if gru else None
        if c0 is not None:
            carry, c0 = c0.new_zeros(c0.shape, dtype=torch.float32) if dc_n is None else copied(dc_n), dense(c0)
        w_hh, state, d_after, d_outputs = dense(weights.w_hh), dense(h0), dh, None
        if w_hr is not None:
            d_outputs = copied(dy)
            d_outputs[steps.flipped().first()] += dh[:rows]
            dy, d_after = product(d_outputs.to(input.dtype), w_hr).to(input.dtype), dh.new_zeros(h0.shape[0], hidden)
            w_hh, state = _combined(w_hh, w_hr), h0.new_zeros(h0.shape[0], hidden)
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        dgates = input.new_empty(input.shape[0], WIDTH[kind] * hidden)
        peephole = None if weights.peephole is None else weights.peephole.float().contiguous()
        b = Backward(
            kind, steps, dy, d_after, carry, peephole, w_hh, state, c0, output, saved.kept, saved.cells, dgates
        )
        done = not output.numel() or (self.backward(b) and w_hr is None)
        d_input, d_state = (dgates[:, :gated], dgates[:, -gated:]) if gru else (dgates, dgates)
        if of_h0 and not done:
            first = product(d_state[steps.first()], weights.w_hh)
            dh[:rows] = first + dh[:rows] if gru else first
        if gru:
            w_ih = torch.cat((w_ih[2 * hidden :], w_ih[: 2 * hidden]))  # in the order of d_input: n, r, z
        dw_ih = product(d_input.t(), input) if of_w_ih else None
        db_ih = d_input.sum(0, dtype=torch.float32) if of_bias else None
        dw_hr = dpeephole = None
        if of_w_hr and d_outputs is not None:
            following = steps.flipped().before(dgates, dgates.new_zeros(h0.shape[0], gated))
            d_outputs += product(following, weights.w_hh)
            inner = saved.kept[:, 3 * hidden :].float() * saved.cells.tanh()  # type: ignore[index, union-attr]
            dw_hr = product(d_outputs.t().to(input.dtype), inner.to(input.dtype))
        if of_peephole and c0 is not None:
            dpeephole = _peephole_gradient(dgates, steps.before(saved.cells, c0.float()), saved.cells)
        found = (
            product(d_input, w_ih) if of_input else None,
            dh if of_h0 else None,
            carry if of_c0 else None,
            _rzn(dw_ih, hidden) if gru else dw_ih,
            product(d_state.t(), steps.before(output, dense(h0))) if of_w_hh else None,
            _rzn(db_ih, hidden) if gru else db_ih,
            d_state.sum(0, dtype=torch.float32) if of_bias and gru else None,
            dw_hr,
            dpeephole,
        )
        return tuple(input.new_empty(0) if t is None else t.to(input.dtype) for t in found)


def _check_layer(kind: str, input: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights, hidden: int) -> None:
    """What guards memory: operators may be called on their own (a saved graph)."""
    gated, width = GATES[kind] * hidden, h0.shape[1]
    _check_shapes(
        c0=(c0, (h0.shape[0], hidden)), w_ih=(weights.w_ih, (gated, input.shape[1])),
        w_hh=(weights.w_hh, (gated, width)), b_ih=(weights.b_ih, (gated,)), b_hh=(weights.b_hh, (gated,)),
        w_hr=(weights.w_hr, (width, hidden)), peephole=(weights.peephole, (3 * hidden,)),
    )  # fmt: skip
    if weights.w_hr is None and width != hidden:
        raise RuntimeError(f"h0 has {width} columns, c0 {hidden}, and there is no projection")


def _check_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"{name} must have the shape {tuple(shape)}, not {tuple(tensor.shape)}")


def dense(x: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes at a time can be read."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def copied(x: Tensor) -> Tensor:
    """float32, in memory of its own: loops write there."""
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _rows(steps: Steps) -> int:
    return steps.sizes[0] if steps.sizes else 0


def _combined(w_hh: Tensor, w_hr: Tensor) -> Tensor:
    return product(w_hh, w_hr).to(w_hh.dtype)


def _kept_dtype(kind: str, input: Tensor) -> torch.dtype:
    return torch.float32 if kind == "gru" or input.dtype == torch.float32 else torch.float16


def _rzn(x: Tensor | None, hidden: int) -> Tensor | None:
    return None if x is None else torch.cat((x[hidden:], x[:hidden]))


def _peephole_gradient(dgates: Tensor, before: Tensor, after: Any) -> Tensor:
    di, df, _, do = dgates.float().chunk(4, 1)
    return torch.cat(((di * before).sum(0), (df * before).sum(0), (do * after).sum(0)))
