"""Recurrent cells and sequences in plain torch. Autograd of these functions is the truth for gradients.

Every product with the input is taken once for all time steps, outside the loop. float16 and bfloat16 are computed in
float32: h is rounded to the input's dtype at each step, as it is in the output; c keeps float32 to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._random import keep_mask

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_relu_cell", "rnn_tanh_cell"]

State = tuple[Tensor, ...]  # (h,) or (h, c), each (B, H)
Step = Callable[[Tensor, State], State]  # (gates from the input, state before) -> state after


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh)."""
    return _cell("tanh", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """h' = relu(x W_ih^T + b_ih + h W_hh^T + b_hh)."""
    return _cell("relu", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(i, f, g, o) = x W_ih^T + b_ih + h W_hh^T + b_hh;   s = sigmoid

    c' = s(f) c + s(i) tanh(g);   h' = s(o) tanh(c').
    """
    h, c = _cell("lstm", input, tuple(hx), w_ih, w_hh, b_ih, b_hh)
    return h, c


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """(r, z, n) = x W_ih^T + b_ih;   (r', z', n') = h W_hh^T + b_hh;   s = sigmoid

    n'' = tanh(n + s(r + r') n');   h' = (1 - s(z + z')) n'' + s(z + z') h.
    """
    return _cell("gru", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rnn_tanh_cell` or `rnn_relu_cell` over time; layers, directions and dropout as `lstm` says."""
    state = None if hx is None else (hx,)
    output, final = _sequence(
        nonlinearity, input, state, weights, num_layers, bidirectional, batch_first, dropout if training else 0.0,
        0, lengths, batch_sizes, seed,
    )  # fmt: skip
    return output, final[0]


def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`lstm_cell` over time, with h' replaced by h' W_hr^T if there are projections.

    Layer l > 0 reads layer l - 1's output, of which dropout keeps element e of the (num_layers - 1, T, B, H) tensor of
    these iff `keep_mask` says so, times 1 / (1 - p). The second direction of a layer runs from the last step to the
    first; outputs are concatenated. With `lengths` the state of a sequence stops changing after its last step (the
    second direction begins there) and the output beyond is 0. With `batch_sizes` the input is packed: step t has the
    next `batch_sizes[t]` rows.
    """
    output, final = _sequence(
        "lstm", input, None if hx is None else tuple(hx), weights, num_layers, bidirectional, batch_first,
        dropout if training else 0.0, proj_size, lengths, batch_sizes, seed,
    )  # fmt: skip
    return output, (final[0], final[1])


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gru_cell` over time; layers, directions and dropout as `lstm` says."""
    state = None if hx is None else (hx,)
    output, final = _sequence(
        "gru", input, state, weights, num_layers, bidirectional, batch_first, dropout if training else 0.0,
        0, lengths, batch_sizes, seed,
    )  # fmt: skip
    return output, final[0]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def lstm_gates(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(h', c') from the input's gates and the state's added up, (B, 4H)."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_gates(input: Tensor, hidden: Tensor, h: Tensor) -> Tensor:
    """h' from the input's gates and the state's, each (B, 3H) with its biases."""
    (r, z, n), (r_h, z_h, n_h) = input.chunk(3, -1), hidden.chunk(3, -1)
    n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
    return n + torch.sigmoid(z + z_h) * (h - n)


def _prepare(
    mode: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None
) -> tuple[Tensor, Step]:
    """The gates from the input, for all its rows at once, and the function of one step.

    The GRU's b_hh stays inside the step: its n' is multiplied by r. Elsewhere both biases add up outside.
    """
    b_ih, b_hh = (None if b is None else _wide(b) for b in (b_ih, b_hh))
    w_hh = _wide(w_hh).mT
    project = None if w_hr is None else _wide(w_hr).mT
    if mode != "gru":
        b_ih, b_hh = (b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh), None

    def rounded(h: Tensor) -> Tensor:
        return h.to(input.dtype).to(h.dtype)

    def rnn_step(gates: Tensor, state: State) -> State:
        gates = torch.addmm(gates, state[0], w_hh)
        return (rounded(gates.tanh() if mode == "tanh" else gates.relu()),)

    def lstm_step(gates: Tensor, state: State) -> State:
        h, c = lstm_gates(torch.addmm(gates, state[0], w_hh), state[1])
        return rounded(h if project is None else h @ project), c

    def gru_step(gates: Tensor, state: State) -> State:
        h = state[0]
        return (rounded(gru_gates(gates, h @ w_hh if b_hh is None else torch.addmm(b_hh, h, w_hh), h)),)

    step: Step = {"lstm": lstm_step, "gru": gru_step}.get(mode, rnn_step)
    return linear(_wide(input), _wide(w_ih), b_ih), step


def _cell(
    mode: str, input: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> State:
    gates, step = _prepare(mode, input, w_ih, w_hh, b_ih, b_hh, None)
    return tuple(s.to(input.dtype) for s in step(gates, tuple(_wide(s) for s in state)))


def _scan(step: Step, gates: Tensor, state: State, valid: Tensor | None, reverse: bool) -> tuple[Tensor, State]:
    """Steps through gates (T, B, G); where `valid` (T, B, 1) is False the state stays."""
    steps = list(zip(gates.unbind(0), [None] * gates.shape[0] if valid is None else valid.unbind(0), strict=True))
    outputs = []
    for gate, keep in reversed(steps) if reverse else steps:
        after = step(gate, state)
        state = after if keep is None else tuple(torch.where(keep, a, s) for a, s in zip(after, state, strict=True))
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    if not outputs:  # a step of no rows: the output is still a function of the weights, whose gradients are zero
        none = step(gates.flatten(0, 1), tuple(s[:0] for s in state))
        return none[0].reshape(0, *state[0].shape), state
    output = torch.stack(outputs)
    return output if valid is None else torch.where(valid, output, 0), state


def _scan_packed(step: Step, gates: Tensor, state: State, sizes: list[int], reverse: bool) -> tuple[Tensor, State]:
    """Steps through packed gates (sum of sizes, G); sequences are sorted, so the first n rows of the state go on."""
    pieces = list(gates.split(sizes))
    outputs: list[Tensor] = []
    if reverse:
        first, state = state, tuple(s[:0] for s in state)
        for piece, n in zip(reversed(pieces), reversed(sizes), strict=True):
            begun = state[0].shape[0]
            if n > begun:
                state = tuple(torch.cat([s, f[begun:n]]) for s, f in zip(state, first, strict=True))
            state = step(piece, state)
            outputs.append(state[0])
        outputs.reverse()
        idle = tuple(f[state[0].shape[0] :] for f in first)
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(state, idle, strict=True))
    ended: list[State] = []
    for piece, n in zip(pieces, sizes, strict=True):
        if n < state[0].shape[0]:
            ended.append(tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        state = step(piece, state)
        outputs.append(state[0])
    ended.append(state)
    return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))


def layer(
    mode: str,
    input: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """One layer in one direction over packed tokens (N, I), as the kernels have it: (output, final states).

    `mode` is "lstm", "gru", "tanh" or "relu". Without `batch_sizes` every step has all rows of the state.
    """
    gates, step = _prepare(mode, input, w_ih, w_hh, b_ih, b_hh, None)
    batch, wide = state[0].shape[0], tuple(_wide(s) for s in state)
    if batch_sizes is None:
        steps = input.shape[0] // batch if batch else 0
        output, final = _scan(step, gates.reshape(steps, batch, gates.shape[1]), wide, None, reverse)
        output = output.reshape(input.shape[0], wide[0].shape[1])
    else:
        output, final = _scan_packed(step, gates, wide, batch_sizes.tolist(), reverse)
    return tuple(part.to(input.dtype) for part in (output, *final))


def _sequence(
    mode: str,
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    proj_size: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, State]:
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    x = input.transpose(0, 1) if batch_first and sizes is None else input
    batch = x.shape[1] if sizes is None else sizes[0]
    valid = None
    if lengths is not None:
        valid = (torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths).unsqueeze(2)
        x = torch.where(valid, x, 0)  # what lies beyond may be NaN, and 0 * NaN would reach the gradients
    finals: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, b_ih, b_hh, w_hr = _named(weights[k * each : (k + 1) * each], proj_size > 0)
            gates, step = _prepare(mode, x, w_ih, w_hh, b_ih, b_hh, w_hr)
            if hx is not None:
                state = tuple(_wide(s[k]) for s in hx)
            else:
                widths = (w_hh.shape[1], w_ih.shape[0] // 4) if mode == "lstm" else (w_hh.shape[1],)
                state = tuple(gates.new_zeros(batch, width) for width in widths)
            if sizes is None:
                output, state = _scan(step, gates, state, valid, direction == 1)
            else:
                output, state = _scan_packed(step, gates, state, sizes, direction == 1)
            outputs.append(output.to(input.dtype))
            finals.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout > 0 and layer < num_layers - 1:
            assert seed is not None
            keep = keep_mask(seed.to(x.device), (num_layers - 1, *x.shape), dropout)[layer]
            x = torch.where(keep, x * (1 / (1 - dropout) if dropout < 1 else 0.0), 0)
    final = tuple(torch.stack(parts).to(input.dtype) for parts in zip(*finals, strict=True))
    return (x.transpose(0, 1) if batch_first and sizes is None else x), final


def _named(
    weights: Sequence[Tensor], projected: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(w_ih, w_hh, b_ih, b_hh, w_hr) from a layer's flat weights, of which biases and projection may be missing."""
    w_hr = weights[-1] if projected else None
    biases = len(weights) - projected == 4
    return weights[0], weights[1], weights[2] if biases else None, weights[3] if biases else None, w_hr
