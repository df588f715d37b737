"""Recurrent cells and sequences in plain torch. Autograd of these functions is the truth for gradients.

Every product with the input is taken once for all time steps, outside the loop. float16 and bfloat16 are computed in
float32: h is rounded to the input's dtype at each step, as it is in the output; c keeps float32 to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._step import GATES, State, Step, stepper
from ._step import Weights as Weights  # these are for pykernels.ops too
from ._step import dropped as dropped
from ._step import extra_names as extra_names
from ._step import keep as keep
from ._step import kept_at as kept_at
from ._step import prepare as prepare
from ._step import unflatten as unflatten
from ._step import wide as wide

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_relu_cell", "rnn_tanh_cell"]

Zone = Callable[[int, State, State], State]  # (step, state before, state after) -> what of both is the state after


@dataclass(frozen=True)
class Options:
    """What a sequence function takes beside its tensors; see `lstm`."""

    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    proj_size: int = 0
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None
    peephole: bool = False
    layer_norm: bool = False
    zoneout: float | Sequence[float] = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False  # saves memory in a kernel's backward; autograd of this code does not know it
    seed: int | Tensor | None = None

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def zones(self, states: int) -> tuple[float, ...]:
        """The zoneout probability of each state."""
        return (self.zoneout,) * states if isinstance(self.zoneout, (int, float)) else tuple(self.zoneout)


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh)."""
    return _cell("tanh", input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """h' = relu(x W_ih^T + b_ih + h W_hh^T + b_hh)."""
    return _cell("relu", input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


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
    h, c = _cell("lstm", input, tuple(hx), Weights(w_ih, w_hh, b_ih, b_hh))
    return h, c


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """(r, z, n) = x W_ih^T + b_ih;   (r', z', n') = h W_hh^T + b_hh;   s = sigmoid

    n'' = tanh(n + s(r + r') n');   h' = (1 - s(z + z')) n'' + s(z + z') h.
    """
    return _cell("gru", input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


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
    resets: Tensor | None = None,
    layer_norm: bool = False,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rnn_tanh_cell` or `rnn_relu_cell` over time; everything else as `lstm` says."""
    options = Options(
        num_layers, bidirectional, batch_first, dropout, training, 0, lengths, batch_sizes, resets, False, layer_norm,
        zoneout, recurrent_dropout, recompute, seed,
    )  # fmt: skip
    output, final = _sequence(nonlinearity, input, None if hx is None else (hx,), weights, options)
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
    resets: Tensor | None = None,
    peephole: bool = False,
    layer_norm: bool = False,
    zoneout: float | Sequence[float] = 0.0,
    recurrent_dropout: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`lstm_cell` over time, with h' replaced by h' W_hr^T if there are projections (Sak, Senior, Beaufays 2014).

    Layer l > 0 reads layer l - 1's output, of which dropout keeps element e of the (num_layers - 1, T, B, H) tensor of
    these (`keep`), times 1 / (1 - p). The second direction of a layer runs from the last step to the
    first; outputs are concatenated. With `lengths` the state of a sequence stops changing after its last step (the
    second direction begins there) and the output beyond is 0. With `batch_sizes` the input is packed: step t has the
    next `batch_sizes[t]` rows. Where `resets` is True the sequence is cut before the step: nothing passes between that
    step and the one before, in either direction.

    peephole (Gers, Schraudolph, Schmidhuber 2002): p_i c is added to i, p_f c to f, p_o c' to o.
    layer_norm (Ba, Kiros, Hinton 2016): gates = LN(x W_ih^T; a_ih) + LN(h W_hh^T; a_hh) + b_ih + b_hh, with means and
        variances over all gates and gains a; LSTM: h' = s(o) tanh(LN(c'; a_c, b_c)).
    zoneout (Krueger et al. 2017): each element of h' (of c') is with probability zoneout that of h (of c); in
        evaluation h' = zoneout h + (1 - zoneout) h'. One mask each of the (num_layers * directions, T, B, H) elements.
    recurrent_dropout (DropConnect; Wan et al. 2013, Merity et al. 2018): `dropped` is W_hh, by one mask a call.
    """
    options = Options(
        num_layers, bidirectional, batch_first, dropout, training, proj_size, lengths, batch_sizes, resets, peephole,
        layer_norm, zoneout, recurrent_dropout, recompute, seed,
    )  # fmt: skip
    output, final = _sequence("lstm", input, None if hx is None else tuple(hx), weights, options)
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
    resets: Tensor | None = None,
    layer_norm: bool = False,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gru_cell` over time; everything else as `lstm` says."""
    options = Options(
        num_layers, bidirectional, batch_first, dropout, training, 0, lengths, batch_sizes, resets, False, layer_norm,
        zoneout, recurrent_dropout, recompute, seed,
    )  # fmt: skip
    output, final = _sequence("gru", input, None if hx is None else (hx,), weights, options)
    return output, final[0]


def _cell(mode: str, input: Tensor, state: State, weights: Weights) -> State:
    gates, step = prepare(mode, input, weights)
    return tuple(s.to(input.dtype) for s in step(gates, tuple(wide(s) for s in state)))


def _cut(state: State, flags: Tensor | None) -> State:
    return state if flags is None else tuple(torch.where(flags, 0, s) for s in state)


def _scan(
    step: Step,
    gates: Tensor,
    state: State,
    valid: Tensor | None,
    resets: Tensor | None,
    zone: Zone | None,
    reverse: bool,
) -> tuple[Tensor, State]:
    """Steps through gates (T, B, G); where `valid` (T, B, 1) is False the state stays. `resets` is (T, B, 1)."""
    count = gates.shape[0]
    outputs: list[Tensor] = []
    for t in reversed(range(count)) if reverse else range(count):
        boundary = t + reverse  # the cut that lies between this step and the one processed before it
        state = _cut(state, None if resets is None or boundary == count else resets[boundary])
        after = step(gates[t], state)
        after = after if zone is None else zone(t, state, after)
        if valid is not None:
            after = tuple(torch.where(valid[t], a, s) for a, s in zip(after, state, strict=True))
        state = after
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    if not outputs:  # a step of no rows: the output is still a function of the weights, whose gradients are zero
        none = step(gates.flatten(0, 1), tuple(s[:0] for s in state))
        return none[0].reshape(0, *state[0].shape), state
    output = torch.stack(outputs)
    return output if valid is None else torch.where(valid, output, 0), state


def _scan_packed(
    step: Step,
    gates: Tensor,
    state: State,
    sizes: list[int],
    resets: Tensor | None,
    zone: Zone | None,
    reverse: bool,
) -> tuple[Tensor, State]:
    """Steps through packed gates (sum of sizes, G); sequences are sorted, so the first n rows of the state go on."""
    pieces = list(gates.split(sizes))
    cuts = [None] * len(sizes) if resets is None else list(resets.unsqueeze(1).split(sizes))
    outputs: list[Tensor] = []

    def stepped(t: int, state: State) -> State:
        after = step(pieces[t], state)
        after = after if zone is None else zone(t, state, after)
        outputs.append(after[0])
        return after

    if reverse:
        first, state = state, tuple(s[:0] for s in state)
        for t in reversed(range(len(sizes))):
            begun, n = state[0].shape[0], sizes[t]
            if begun:
                state = _cut(state, cuts[t + 1])
            if n > begun:
                state = tuple(torch.cat([s, f[begun:n]]) for s, f in zip(state, first, strict=True))
            state = stepped(t, state)
        outputs.reverse()
        idle = tuple(f[state[0].shape[0] :] for f in first)
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(state, idle, strict=True))
    ended: list[State] = []
    for t, n in enumerate(sizes):
        if n < state[0].shape[0]:
            ended.append(tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        state = stepped(t, _cut(state, cuts[t]))
    ended.append(state)
    return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))


def layer(mode: str, input: Tensor, state: State, weights: Weights, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
    """One layer over packed tokens (N, I), as the kernels have it: (output, *final states).

    `mode` is "lstm", "gru", "tanh" or "relu". Without `batch_sizes` every step has all rows of the state. States
    (2, B, H) are those of two directions, whose weights are stacked too and whose outputs lie side by side.
    """
    if state[0].dim() == 2:
        return _direction(mode, input, state, weights, batch_sizes, False)
    found = []
    for d in range(2):
        own = Weights(*(None if w is None else w[d] for w in weights))
        found.append(_direction(mode, input, tuple(s[d] for s in state), own, batch_sizes, d == 1))
    outputs, *final = zip(*found, strict=True)
    return torch.cat(outputs, -1), *(torch.stack(parts) for parts in final)


def _direction(
    mode: str, input: Tensor, state: State, weights: Weights, batch_sizes: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    gates, step = prepare(mode, input, weights)
    batch, initial = state[0].shape[0], tuple(wide(s) for s in state)
    if batch_sizes is None:
        steps = input.shape[0] // batch if batch else 0
        output, final = _scan(step, gates.reshape(steps, batch, gates.shape[1]), initial, None, None, None, reverse)
        output = output.reshape(input.shape[0], initial[0].shape[1])
    else:
        output, final = _scan_packed(step, gates, initial, batch_sizes.tolist(), None, None, reverse)
    return tuple(part.to(input.dtype) for part in (output, *final))


def rows(
    mode: str, gates: Tensor, state: State, weights: Weights, batch_sizes: Tensor | None, zone: Zone | None,
    reverse: bool, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The time loop of one layer in one direction over packed tokens, from the gates of the input (N, G) with their
    biases: (output, *final states), all wide; h is rounded to `dtype`. Of `weights`, also wide, those of the state."""
    step = stepper(mode, dtype, weights)
    if batch_sizes is not None:
        sizes = [n for n in batch_sizes.tolist() if n]
        output, final = _scan_packed(step, gates[: sum(sizes)], state, sizes, None, zone, reverse)
        return torch.nn.functional.pad(output, (0, 0, 0, gates.shape[0] - output.shape[0])), *final
    batch = state[0].shape[0]
    steps = gates.shape[0] // batch if batch else 0
    output, final = _scan(step, gates.reshape(steps, batch, gates.shape[1]), state, None, None, zone, reverse)
    return output.reshape(gates.shape[0], state[0].shape[1]), *final


def zone_of(zones: Sequence[float], training: bool, masks: Sequence[Tensor | None], dtype: torch.dtype) -> Zone | None:
    """Zoneout with a probability for each state; in training masks[i][t] are the new elements of state i at step t."""
    if not any(zones):
        return None
    if not training:

        def blend(t: int, before: State, after: State) -> State:
            h, *c = (z * b + (1 - z) * a for z, b, a in zip(zones, before, after, strict=True))
            return h.to(dtype).to(h.dtype), *c

        return blend

    def choose(t: int, before: State, after: State) -> State:
        pairs = zip(masks, after, before, strict=True)
        return tuple(a if m is None else torch.where(m[t], a, b) for m, a, b in pairs)

    return choose


def _zone(
    options: Options, k: int, tokens: torch.Size, state: State, sizes: list[int] | None, dtype: torch.dtype
) -> Zone | None:
    """Zoneout of layer and direction k, whose tokens are (T, B) or, packed, (N,)."""
    zones = options.zones(len(state))
    masks: list[Any] = [None] * len(state)
    if options.training and any(zones):
        for i, (z, s) in enumerate(zip(zones, state, strict=True)):
            mask = keep(options.seed, 2 + i, k, (*tokens, s.shape[1]), z, s.device)
            masks[i] = mask.unbind(0) if sizes is None else mask.split(sizes)
    return zone_of(zones, options.training, masks, dtype)


def _sequence(
    mode: str, input: Tensor, hx: State | None, weights: Sequence[Tensor], options: Options
) -> tuple[Tensor, State]:
    directions, layers = options.directions, options.num_layers
    each = len(weights) // (layers * directions)
    extra = extra_names(mode, options.proj_size > 0, options.peephole, options.layer_norm)
    sizes = None if options.batch_sizes is None else options.batch_sizes.tolist()
    swap = options.batch_first and sizes is None
    x, resets = (t if t is None or not swap else t.transpose(0, 1) for t in (input, options.resets))
    assert x is not None
    batch = x.shape[1] if sizes is None else sizes[0]
    valid, lengths = None, options.lengths
    if lengths is not None:
        valid = (torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths).unsqueeze(2)
        x = torch.where(valid, x, 0)  # what lies beyond may be NaN, and 0 * NaN would reach the gradients
    if resets is not None and sizes is None:
        resets = resets.unsqueeze(2) if valid is None else resets.unsqueeze(2) & valid
    seed = options.seed
    finals: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w = unflatten(weights[k * each : (k + 1) * each], extra)
            if options.training and options.recurrent_dropout > 0:
                w = w._replace(w_hh=dropped(w.w_hh, seed, 1, k, options.recurrent_dropout))
            gates, step = prepare(mode, x, w)
            if hx is not None:
                state = tuple(wide(s[k]) for s in hx)
            else:
                widths = (w.w_hh.shape[1], w.w_ih.shape[0] // GATES["lstm"]) if mode == "lstm" else (w.w_hh.shape[1],)
                state = tuple(gates.new_zeros(batch, width) for width in widths)
            zone = _zone(options, k, x.shape[:-1], state, sizes, input.dtype)
            if sizes is None:
                output, state = _scan(step, gates, state, valid, resets, zone, direction == 1)
            else:
                output, state = _scan_packed(step, gates, state, sizes, resets, zone, direction == 1)
            outputs.append(output.to(input.dtype))
            finals.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if options.training and options.dropout > 0 and layer < layers - 1:
            x = dropped(x, seed, 0, layer, options.dropout)
    final = tuple(torch.stack(parts).to(input.dtype) for parts in zip(*finals, strict=True))
    return (x.transpose(0, 1) if swap else x), final
