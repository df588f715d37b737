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

_SERVED = frozenset(("proj_size", "peephole", "layer_norm", "zoneout"))


def unserved(features: Sequence[str]) -> str:
    """Those of a call's features, or the combination of them, that the floors do not serve; empty: none."""
    missing = [feature for feature in features if feature not in _SERVED]
    by_rows = [feature for feature in features if feature in ("layer_norm", "zoneout")]
    if not missing and by_rows and "proj_size" in features:
        return f"proj_size together with {' and '.join(by_rows)}"
    return " and ".join(missing)


#: Gates of a cell, and what is kept of each token and of its gradient, in hidden sizes.
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
WIDTH = {"lstm": 4, "gru": 4, "tanh": 1, "relu": 1}


@dataclass
class Forward:
    """What a loop forward is given, all dense, and what it fills: `output`, `kept`, `cells`.

    D is 1 or 2: directions, the second against time. h_n and c_n hold the initial states, in place of which it writes
    the final ones.
    """

    kind: str
    steps: Steps
    gates: Tensor  #: (D, N, G H) float32: the input's part
    bias: Tensor | None  #: (D, G H) float32, of a GRU (D, 4 H)
    peephole: Tensor | None  #: (D, 3 H) float32: p_i, p_f, p_o
    w_hh: Tensor  #: (D, G H, H)
    h0: Tensor  #: (D, B, H)
    output: Tensor  #: (N, D H): directions side by side
    h_n: Tensor
    c_n: Tensor | None  #: float32; of an LSTM
    kept: Tensor | None  #: (D, N, 4 H): gates after their activations; may be the memory of `gates`
    cells: Tensor | None  #: (D, N, H) float32: c
    products: Tensor | None = None  #: (D, N, G H) float32: the state's part, where `output` is known: only kept is made


@dataclass
class Backward:
    """What a loop backward is given, all dense but dy, whose rows and directions may lie apart.

    It fills dgates (D, N', W H): the gradients of i, f, g, o; of n, r, z, n' (the first three are those of the input's
    part, the last three of the state's); of the only gate. `carry`, float32, holds dc_n and becomes dc0; of a GRU it is
    dh and becomes what of dh0 bypasses W_hh. kept, cells and dgates have room for N' >= N tokens of each direction.
    """

    kind: str
    steps: Steps
    dy: Tensor  #: (D, N, H)
    dh: Tensor  #: (D, B, H) float32: dh_n, and in the end dh0, if the loop says so
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
        *weights, batch_sizes, save = rest
        f = self._run("lstm", input, h0, c0, Weights(*weights), batch_sizes, save)
        saved = _saved(f, "lstm", input, c0)
        return _padded(f.output, input), f.h_n.view(h0.shape), f.c_n.to(c0.dtype).view(c0.shape), *saved  # type: ignore[union-attr]

    def lstm_recompute(self, input: Tensor, h0: Tensor, c0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, batch_sizes, output = rest
        f = self._run("lstm", input, h0, c0, Weights(*weights), batch_sizes, True, output)
        return _saved(f, "lstm", input, c0)

    def lstm_backward(
        self, dy: Tensor, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor,
        w_hh: Tensor, w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, output: Tensor,
        gates: Tensor, cells: Tensor, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        weights, saved = Weights(w_ih, w_hh, None, None, w_hr, peephole), Saved(output, gates, cells)
        found = self._run_backward("lstm", batch_sizes, (dy, dh_n, dc_n), input, h0, c0, weights, saved, output_mask)
        return *found[:6], *found[7:]

    def gru_forward(self, input: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, batch_sizes, save = rest
        f = self._run("gru", input, h0, None, Weights(*weights), batch_sizes, save)
        return _padded(f.output, input), f.h_n.view(h0.shape), *_saved(f, "gru", input, h0)

    def gru_recompute(self, input: Tensor, h0: Tensor, *rest: Any) -> Tensor:
        *weights, batch_sizes, output = rest
        f = self._run("gru", input, h0, None, Weights(*weights), batch_sizes, True, output)
        return _saved(f, "gru", input, h0)[0]

    def gru_backward(
        self, dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
        batch_sizes: Tensor | None, output: Tensor, gates: Tensor, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        mask = (*output_mask[:2], False, *output_mask[2:], False, False)
        weights, saved = Weights(w_ih, w_hh), Saved(output, gates)
        found = self._run_backward("gru", batch_sizes, (dy, dh_n, None), input, h0, None, weights, saved, mask)
        return *found[:2], *found[3:7]

    def rnn_forward(self, input: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *weights, batch_sizes, nonlinearity = rest
        f = self._run(nonlinearity, input, h0, None, Weights(*weights), batch_sizes, False)
        return _padded(f.output, input), f.h_n.view(h0.shape)

    def rnn_backward(
        self, dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
        batch_sizes: Tensor | None, output: Tensor, nonlinearity: str, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        mask = (*output_mask[:2], False, *output_mask[2:], False, False)
        weights, saved = Weights(w_ih, w_hh), Saved(output)
        found = self._run_backward(nonlinearity, batch_sizes, (dy, dh_n, None), input, h0, None, weights, saved, mask)
        return *found[:2], *found[3:6]

    def cell_forward(
        self, input: Tensor, h: Tensor, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, kind: str, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        save = save and kind in ("lstm", "gru")
        f = self._run(kind, input, h, c, Weights(w_ih, w_hh, b_ih, b_hh), None, save)
        found: list[Tensor | None] = [f.output]
        if c is not None and f.c_n is not None:
            found.append(f.c_n[0].to(c.dtype))
        if f.kept is not None:
            found.append(f.kept[0])
        if f.cells is not None and c is not None and c.dtype != torch.float32:
            found.append(f.cells[0])
        return found

    def cell_backward(
        self, dh: Tensor | None, dc: Tensor | None, input: Tensor, h: Tensor, c: Tensor | None, w_ih: Tensor,
        w_hh: Tensor, output: Tensor | None, gates: Tensor | None, cells: Tensor | None, kind: str,
        mask: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        of_input, of_h, of_c, of_w_ih, of_w_hh, of_b_ih, of_b_hh = mask
        weights = Weights(w_ih, w_hh)
        saved = Saved(h if output is None else output, gates, cells)
        dh = h.new_zeros(h.shape) if dh is None else dh
        wanted = (of_input, of_h, of_c, of_w_ih, of_w_hh, of_b_ih or of_b_hh, False, False)
        found = self._run_backward(kind, None, (dh, None, dc), input, h, c, weights, saved, wanted)
        dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh = found[:7]
        db_hh = db_hh if kind == "gru" else db_ih.clone() if of_b_ih else db_ih
        gradients = (dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh)
        return [gradient for gradient, of_it in zip(gradients, mask, strict=True) if of_it]

    def _run(
        self, kind: str, input: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights, batch_sizes: Tensor | None,
        keep: bool, known: Tensor | None = None,
    ) -> Forward:  # fmt: skip
        """known: the output of an earlier run, whose gates are wanted again."""
        hidden, steps = (h0 if c0 is None else c0).shape[-1], Steps(input.shape[0], h0.shape[-2], batch_sizes)
        _check_layer(kind, input, h0, c0, weights, hidden)
        _check_shapes(output=(known, (input.shape[0], _columns(h0))))
        tokens, rows, input = steps.tokens, _rows(steps), input[: steps.tokens]
        h0, c0, *lifted = _lifted(h0, c0, *weights)
        weights, ways, width = Weights(*lifted), h0.shape[0], h0.shape[2]
        h0, w_hh, w_hr = dense(h0), dense(weights.w_hh), weights.w_hr
        gates = product(input.expand(ways, *input.shape), weights.w_ih.mT)
        kept = cells = None
        if keep:
            dtype = _kept_dtype(kind, input)
            in_place = kind == "lstm" and dtype == torch.float32
            kept = gates if in_place else gates.new_empty(ways, tokens, 4 * hidden, dtype=dtype)
            cells = gates.new_empty(ways, tokens, hidden) if kind == "lstm" else None
        products = None if known is None else product(steps.before(sides(known[:tokens], ways), h0), w_hh.mT)
        output = input.new_empty(tokens, ways * hidden) if known is None or w_hr is not None else dense(known)
        state = h0
        if w_hr is not None:
            w_hh, state = _combined(w_hh, w_hr), h0.new_zeros(ways, h0.shape[1], hidden)
            for d in range(
                ways if known is None else 0
            ):  # the first steps' products are of h0, which is W_hr of nothing
                gates[d, steps.first(d == 1)] += product(h0[d, :rows], weights.w_hh[d].t())
        bias, c_n = biases(GATES[kind], hidden, weights.b_ih, weights.b_hh), None if c0 is None else copied(c0)
        peephole = None if weights.peephole is None else weights.peephole.float().contiguous()
        f = Forward(kind, steps, gates, bias, peephole, w_hh, state, output, state.clone(), c_n, kept, cells, products)
        if output.numel():
            self.forward(f)
        if w_hr is not None and known is None:
            found = product(sides(f.output, ways), w_hr.mT).to(input.dtype)
            f.h_n = h0.clone()
            for d in range(ways):
                f.h_n[d, :rows] = found[d, steps.first(d == 0)]
            f.output = found.transpose(0, 1).reshape(tokens, ways * width)
        return f

    def _run_backward(
        self, kind: str, batch_sizes: Tensor | None, cotangents: tuple[Any, Any, Any], input: Tensor, h0: Tensor,
        c0: Tensor | None, weights: Weights, saved: Saved, mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """dx, dh0, dc0, dW_ih, dW_hh, db_ih, db_hh, dW_hr, dpeephole; mask: without db_hh, which goes by db_ih.

        The bias gradient is one sum of torch's, whose order is fixed."""
        of_input, of_h0, of_c0, of_w_ih, of_w_hh, of_bias, of_w_hr, of_peephole = mask
        hidden, gru, many = (h0 if c0 is None else c0).shape[-1], kind == "gru", h0.shape[:-2]
        steps, whole, (dy, dh_n, dc_n) = Steps(input.shape[0], h0.shape[-2], batch_sizes), input, cotangents
        gated, rows, tokens = GATES[kind] * hidden, _rows(steps), steps.tokens
        _check_layer(kind, input, h0, c0, weights, hidden)
        room, joined = input.shape[0], (input.shape[0], _columns(h0))
        _check_shapes(
            dy=(dy, joined), dhn=(dh_n, h0.shape), dcn=(dc_n, (*many, h0.shape[-2], hidden)),
            output=(saved.output, joined), gates=(saved.kept, (*many, room, 4 * hidden)),
            cells=(saved.cells, (*many, room, hidden)),
        )  # fmt: skip
        input, output = input[:tokens], dense(saved.output[:tokens])
        h0, c0, dh_n, dc_n, kept, cells, *lifted = _lifted(h0, c0, dh_n, dc_n, saved.kept, saved.cells, *weights)
        weights, (ways, batch, _) = Weights(*lifted), h0.shape
        w_ih, w_hr, dy = weights.w_ih, weights.w_hr, sides(dy[:tokens], ways)
        dh = h0.new_zeros(h0.shape, dtype=torch.float32) if dh_n is None else copied(dh_n)
        carry = dh if gru else None
        if c0 is not None:
            carry, c0 = c0.new_zeros(c0.shape, dtype=torch.float32) if dc_n is None else copied(dc_n), dense(c0)
        w_hh, state, d_after, d_outputs = dense(weights.w_hh), dense(h0), dh, None
        if w_hr is not None:
            d_outputs = copied(dy)
            for d in range(ways):
                d_outputs[d, steps.first(d == 0)] += dh[d, :rows]
            dy, d_after = product(d_outputs.to(input.dtype), w_hr).to(input.dtype), dh.new_zeros(ways, batch, hidden)
            w_hh, state = _combined(w_hh, w_hr), h0.new_zeros(ways, batch, hidden)
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        dgates = input.new_empty(ways, room, WIDTH[kind] * hidden)
        peephole = None if weights.peephole is None else weights.peephole.float().contiguous()
        b = Backward(kind, steps, dy, d_after, carry, peephole, w_hh, state, c0, output, kept, cells, dgates)
        done = not output.numel() or (self.backward(b) and w_hr is None)
        dgates = dgates[:, :tokens]
        d_input, d_state = (dgates[..., :gated], dgates[..., -gated:]) if gru else (dgates, dgates)
        for d in range(ways if of_h0 and not done else 0):
            first = product(d_state[d, steps.first(d == 1)], weights.w_hh[d])
            dh[d, :rows] = first + dh[d, :rows] if gru else first
        if gru:
            w_ih = torch.cat((w_ih[:, 2 * hidden :], w_ih[:, : 2 * hidden]), 1)  # as d_input has them: n, r, z
        dx = None
        for d in range(ways if of_input else 0):
            dx = product(d_input[d], w_ih[d], dx)
        dw_ih = product(d_input.mT, input.expand(ways, *input.shape)) if of_w_ih else None
        db_ih = d_input.sum(1, dtype=torch.float32) if of_bias else None
        dw_hr = dpeephole = None
        if of_w_hr and d_outputs is not None:
            following = steps.before(dgates, dgates.new_zeros(ways, batch, gated), flipped=True)
            d_outputs += product(following, weights.w_hh)
            inner = kept[:, :tokens, 3 * hidden :].float() * cells[:, :tokens].tanh()
            dw_hr = product(d_outputs.mT.to(input.dtype), inner.to(input.dtype))
        if of_peephole and c0 is not None:
            after = cells[:, :tokens]
            dpeephole = _peephole_gradient(dgates, steps.before(after, c0.float()), after)
        found = (
            dh if of_h0 else None,
            carry if of_c0 else None,
            _rzn(dw_ih, hidden) if gru else dw_ih,
            product(d_state.mT, steps.before(sides(output, ways), dense(h0))) if of_w_hh else None,
            _rzn(db_ih, hidden) if gru else db_ih,
            d_state.sum(1, dtype=torch.float32) if of_bias and gru else None,
            dw_hr,
            dpeephole,
        )
        dtype = whole.dtype
        own = (None if t is None else t if many else t[0] for t in found)
        gradients = (None if dx is None else _padded(dx, whole), *own)
        return tuple(whole.new_empty(0) if t is None else t.to(dtype) for t in gradients)


def _lifted(*tensors: Tensor | None) -> Any:
    """With a dimension of directions, which the first of them, a state, has or has not."""
    assert tensors[0] is not None
    return tensors if tensors[0].dim() == 3 else [None if t is None else t.unsqueeze(0) for t in tensors]


def _columns(h0: Tensor) -> int:
    return h0.shape[-1] * (1 if h0.dim() == 2 else 2)


def sides(y: Tensor, ways: int) -> Tensor:
    """(N, D H) as (D, N, H), without a copy."""
    return y.unflatten(1, (ways, y.shape[1] // ways)).transpose(0, 1)


def _padded(t: Tensor, like: Tensor, dim: int = 0) -> Tensor:
    """With as many tokens as `like`, those beyond being zero."""
    tokens, room = t.shape[dim], like.shape[0]
    if tokens == room:
        return t
    found = t.new_zeros(*t.shape[:dim], room, *t.shape[dim + 1 :])
    found.narrow(dim, 0, tokens).copy_(t)
    return found


def _saved(f: Forward, kind: str, input: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """kept and cells (of a GRU kept alone) as operators return them: of no tokens where they are not wanted."""
    (*many, _, hidden), empty = like.shape, f.gates.new_empty
    kept = empty(*many, 0, 4 * hidden, dtype=_kept_dtype(kind, input))
    cells = empty(*many, 0, hidden)
    if f.kept is not None:
        kept = _padded(f.kept, input, 1).view(*many, -1, 4 * hidden)
    if f.cells is not None:
        cells = _padded(f.cells, input, 1).view(*many, -1, hidden)
    return (kept, cells) if kind == "lstm" else (kept,)


def _check_layer(kind: str, input: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights, hidden: int) -> None:
    """What guards memory: operators may be called on their own (a saved graph)."""
    *many, batch, width = h0.shape
    if many not in ([], [2]):
        raise RuntimeError(f"h0 must be (batch, hidden size), or two of these, not {tuple(h0.shape)}")
    gated = GATES[kind] * hidden
    _check_shapes(
        c0=(c0, (*many, batch, hidden)), w_ih=(weights.w_ih, (*many, gated, input.shape[1])),
        w_hh=(weights.w_hh, (*many, gated, width)), b_ih=(weights.b_ih, (*many, gated)),
        b_hh=(weights.b_hh, (*many, gated)), w_hr=(weights.w_hr, (*many, width, hidden)),
        peephole=(weights.peephole, (*many, 3 * hidden)),
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
    return None if x is None else torch.cat((x[:, hidden:], x[:, :hidden]), 1)


def _peephole_gradient(dgates: Tensor, before: Tensor, after: Tensor) -> Tensor:
    di, df, _, do = dgates.float().chunk(4, -1)
    return torch.cat(((di * before).sum(1), (df * before).sum(1), (do * after).sum(1)), 1)
