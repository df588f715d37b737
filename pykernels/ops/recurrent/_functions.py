"""The operators of the recurrent room (schemas, fakes) and the autograd Function over them.

An operator serves one layer over packed tokens: (N, I), sorted by time, with the number of rows of each step in
`batch_sizes` (none: every step has all rows of the state). Padded, ragged, packed and cut (`resets`) input differ only
in how tokens are brought into this order; a cell is a sequence of one step.

A layer in one direction, forward in time, has states (B, H). States (2, B, H) stand for both directions of a layer, the
second against time: its weights are stacked in the same way, and the outputs lie side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _backends
from ...reference import recurrent as reference
from .._function import apply, second_derivative
from .._library import define

ROOM = _backends.Room("recurrent")

Tensors = tuple[Any, ...]  # some may be None


class Mode(NamedTuple):
    """What a layer is and who serves it. kind: "lstm", "gru", "tanh" or "relu"."""

    kind: str
    backend: str
    recompute: bool = False


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _wanted(*made: tuple[Any, bool]) -> tuple[Tensor, ...]:
    return tuple(_like(x) if wanted else made[0][0].new_empty(0) for x, wanted in made)


def _output(input: Tensor, h0: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], h0.shape[-1] * (1 if h0.dim() == 2 else 2))


def _lstm_saved(input: Tensor, c0: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
    *many, _, hidden = c0.shape
    dtype = torch.float32 if input.dtype == torch.float32 else torch.float16
    gates = input.new_empty(*many, tokens, 4 * hidden, dtype=dtype)
    return gates, input.new_empty(*many, tokens, hidden, dtype=torch.float32)


def _gru_saved(input: Tensor, h0: Tensor, tokens: Any) -> Tensor:
    *many, _, hidden = h0.shape
    return input.new_empty(*many, tokens, 4 * hidden, dtype=torch.float32)


def _fake_lstm(input: Tensor, h0: Tensor, c0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    saved = _lstm_saved(input, c0, input.shape[0] if rest[-1] else 0)
    return _output(input, h0), _like(h0), _like(c0), *saved


def _fake_gru(input: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _output(input, h0), _like(h0), _gru_saved(input, h0, input.shape[0] if rest[-1] else 0)


def _fake_rnn(input: Tensor, h0: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _output(input, h0), _like(h0)


def _fake_lstm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, _, x, h0, c0, w_ih, w_hh, w_hr, peephole, *_, mask) = arguments
    bias = w_ih.new_empty(w_ih.shape[:-1])
    return _wanted(*zip((x, h0, c0, w_ih, w_hh, bias, w_hr, peephole), mask, strict=True))


def _fake_gru_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, x, h0, w_ih, w_hh, *_, mask) = arguments
    bias = w_ih.new_empty(w_ih.shape[:-1])
    return _wanted(*zip((x, h0, w_ih, w_hh, bias, bias), (*mask, mask[4]), strict=True))


def _fake_rnn_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, x, h0, w_ih, w_hh, *_, mask) = arguments
    return _wanted(*zip((x, h0, w_ih, w_hh, w_ih.new_empty(w_ih.shape[:-1])), mask, strict=True))


_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_LSTM = f"{_WEIGHTS}, Tensor? w_hr, Tensor? peephole, Tensor? batch_sizes"
_OTHER = f"{_WEIGHTS}, Tensor? batch_sizes"

# G gates, H the hidden size; h0 (B, P), c0 (B, H), w_ih (G H, I), w_hh (G H, P), w_hr (P, H) or none with P = H,
# peephole (3 H): p_i, p_f, p_o; of two directions all have a dimension of two in front of these, and so have gradients
# and what is kept. Gradients of h_n and c_n may be none: zeros.

# output (N, P or 2 P), h_n, c_n; then what backward reads of every token (zero rows without `save`): gates i f g o
# after their activations (float16 for both 16-bit dtypes: they are at most 1, where it has three bits more than
# bfloat16, and 1 - o needs them), c (float32)
lstm_forward = define(
    ROOM,
    f"lstm_forward(Tensor input, Tensor h0, Tensor c0, {_LSTM}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_lstm,
)
# the gates and c that forward leaves with `save`, from its output: h before every token is known, so that all products
# are one, and what is left in the order of time is elementwise
lstm_recompute = define(
    ROOM,
    f"lstm_recompute(Tensor input, Tensor h0, Tensor c0, {_LSTM}, Tensor output) -> (Tensor, Tensor)",
    lambda input, h0, c0, *_: _lstm_saved(input, c0, input.shape[0]),
)
# dx, dh0, dc0, dW_ih, dW_hh, db (of either bias), dW_hr, dpeephole; mask in the same order
lstm_backward = define(
    ROOM,
    "lstm_backward(Tensor dy, Tensor? dhn, Tensor? dcn, Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, "
    "Tensor? w_hr, Tensor? peephole, Tensor? batch_sizes, Tensor output, Tensor gates, Tensor cells, "
    "bool[8] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_lstm_backward,
)
# output, h_n; then r, z, n and n' = h W_hn^T + b_hn of every token, float32 (n' is not bounded)
gru_forward = define(
    ROOM,
    f"gru_forward(Tensor input, Tensor h0, {_OTHER}, bool save) -> (Tensor, Tensor, Tensor)",
    _fake_gru,
)
# r, z, n, n' as forward leaves them, from its output
gru_recompute = define(
    ROOM,
    f"gru_recompute(Tensor input, Tensor h0, {_OTHER}, Tensor output) -> Tensor",
    lambda input, h0, *_: _gru_saved(input, h0, input.shape[0]),
)
# dx, dh0, dW_ih, dW_hh, db_ih, db_hh; the last of the mask stands for both biases
gru_backward = define(
    ROOM,
    "gru_backward(Tensor dy, Tensor? dhn, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? batch_sizes, "
    "Tensor output, Tensor gates, bool[5] output_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_gru_backward,
)
# output, h_n; backward reads the output alone
rnn_forward = define(
    ROOM,
    f"rnn_forward(Tensor input, Tensor h0, {_OTHER}, str nonlinearity) -> (Tensor, Tensor)",
    _fake_rnn,
)
# dx, dh0, dW_ih, dW_hh, db (of either bias)
rnn_backward = define(
    ROOM,
    "rnn_backward(Tensor dy, Tensor? dhn, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? batch_sizes, "
    "Tensor output, str nonlinearity, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_rnn_backward,
)

# A layer's tensors: input, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, batch_sizes; those of one kind of layer that another
# has not are None.
_LAYER = 8
_SIZES = _LAYER - 1


def _forward(mode: Mode, layer: Tensors, states: Tensors, save: bool) -> tuple[Tensors, Tensors]:
    """((output, *final states), what only backward reads)."""
    kind, backend, _ = mode
    if kind == "lstm":
        *results, gates, cells = lstm_forward[backend](layer[0], *states, *layer[1:], save)
        return tuple(results), (gates, cells)
    weights = (*layer[1:5], layer[_SIZES])
    if kind == "gru":
        *results, gates = gru_forward[backend](layer[0], *states, *weights, save)
        return tuple(results), (gates,)
    return rnn_forward[backend](layer[0], *states, *weights, kind), ()


def _recomputed(mode: Mode, layer: Tensors, states: Tensors, output: Tensor) -> Tensors:
    """What only backward reads, made again."""
    if mode.kind == "lstm":
        found: Tensors = lstm_recompute[mode.backend](layer[0], *states, *layer[1:], output)
        return found
    if mode.kind != "gru":
        return ()
    weights = (*layer[1:5], layer[_SIZES])
    return (gru_recompute[mode.backend](layer[0], *states, *weights, output),)


def _backward(
    mode: Mode,
    mask: tuple[bool, ...],
    cotangents: Tensors,
    layer: Tensors,
    states: Tensors,
    output: Tensor,
    kept: Tensors,
) -> Tensors:
    """Gradients of (input, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, *states), zero-size where the mask is False."""
    kind, backend, _ = mode
    if mode.recompute:
        kept = _recomputed(mode, layer, states, output)
    input, w_ih, w_hh, _, _, w_hr, peephole, sizes = layer
    of_input, of_w_ih, of_w_hh, of_b_ih, of_b_hh, of_w_hr, of_peephole, *of_states = mask
    order = (of_input, *of_states, of_w_ih, of_w_hh, of_b_ih or of_b_hh)
    if kind == "lstm":
        dx, *found = lstm_backward[backend](
            *cotangents, input, *states, w_ih, w_hh, w_hr, peephole, sizes, output, *kept,
            (*order, of_w_hr, of_peephole),
        )  # fmt: skip
        *found, dw_hr, dpeephole = found
    else:
        tensors = (*cotangents, input, *states, w_ih, w_hh, sizes, output, *kept)
        backward, options = (gru_backward, ()) if kind == "gru" else (rnn_backward, (kind,))
        dx, *found = backward[backend](*tensors, *options, order)
        dw_hr = dpeephole = None
    d_states, (dw_ih, dw_hh, db_ih, *rest) = found[: len(states)], found[len(states) :]
    # The same numbers for both biases, but not the same memory: an optimizer may write to either.
    db_hh = rest[0] if rest else db_ih.clone() if of_b_ih and of_b_hh else db_ih
    return dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dpeephole, *d_states


class LayerGrad(Function):
    """The gradients as a function of the cotangents and the inputs; its own backward differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, mask: tuple[bool, ...], states: int, kept: int, *tensors: Any) -> Any:
        ctx.mode, ctx.mask, ctx.states, ctx.kept = mode, mask, states, kept
        cotangents, rest = tensors[: 1 + states], tensors[1 + states :]
        layer, rest = rest[:_LAYER], rest[_LAYER:]
        initial, output, saved = rest[:states], rest[states], rest[states + 1 :]
        ctx.save_for_backward(*cotangents, *layer, *initial)
        return _backward(mode, mask, cotangents, layer, initial, output, saved)

    @staticmethod
    def backward(ctx: Any, *ddx: Tensor) -> Any:
        kind = ctx.mode.kind
        saved, begin = ctx.saved_tensors, 1 + ctx.states  # of the layer's tensors
        sizes = begin + _SIZES
        given = [i for i, t in enumerate(saved) if t is not None and i != sizes]
        wanted = [i for i, needed in enumerate(ctx.mask) if needed]

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(saved)
            for i, value in zip(given, tensors, strict=True):
                full[i] = value
            primals = [*full[begin:sizes], *full[sizes + 1 :]]

            def of(*chosen: Tensor) -> tuple[Tensor, ...]:
                point = list(primals)
                for i, value in zip(wanted, chosen, strict=True):
                    point[i] = value
                weights = reference.Weights(*point[1:_SIZES])
                return reference.layer(kind, point[0], tuple(point[_SIZES:]), weights, saved[sizes])

            results, pullback = torch.func.vjp(of, *(primals[i] for i in wanted))
            cotangents = (torch.zeros_like(y) if d is None else d for d, y in zip(full[:begin], results, strict=True))
            grads: tuple[Tensor, ...] = pullback(tuple(cotangents))
            return grads

        found = second_derivative(first, tuple(saved[i] for i in given), tuple(ddx[i] for i in wanted))
        result: list[Tensor | None] = [None] * len(saved)
        for i, value in zip(given, found, strict=True):
            result[i] = value
        return None, None, None, None, *result, None, *(None,) * ctx.kept


class Layer(Function):
    """(output, *final states) of (a layer's tensors, *states), on every backend."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, *tensors: Any) -> Any:
        layer, states = tensors[:_LAYER], tensors[_LAYER:]
        results, kept = _forward(mode, layer, states, not mode.recompute)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layer, *states, results[0], *(() if mode.recompute else kept))
        return results

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> Any:
        mode, saved, needed, end = ctx.mode, ctx.saved_tensors, ctx.needs_input_grad, _LAYER + len(dfinal)
        layer, states, output, kept = saved[:_LAYER], saved[_LAYER:end], saved[end], saved[end + 1 :]
        mask = (*needed[1 : 1 + _SIZES], *needed[1 + _LAYER :])
        if dy is None:  # rows of stride 0: no memory for the zeros
            dy = output.new_zeros(1, output.shape[1]).expand(output.shape)
        if torch.is_grad_enabled():
            grads = LayerGrad.apply(mode, mask, len(states), len(kept), dy, *dfinal, *layer, *states, output, *kept)
        else:
            grads = _backward(mode, mask, (dy, *dfinal), layer, states, output, kept)
        masked = [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]
        return None, *masked[:_SIZES], None, *masked[_SIZES:]


def run_layer(mode: Mode, layer: Tensors, states: Tensors) -> Tensors:
    """(output, *final states) of a layer's tensors (see above; some may be None) and initial states."""
    if torch.is_grad_enabled():
        for t in (*layer, *states):
            if t is not None and t.requires_grad:
                results: Tensors = apply(Layer, mode, *layer, *states)
                return results
    return _forward(mode, layer, states, False)[0]
