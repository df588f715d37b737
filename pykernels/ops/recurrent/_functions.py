"""The operators of the recurrent room (schemas, fakes) and the autograd Functions over them.

An operator serves one layer in one direction over packed tokens: (N, I), sorted by time, with the number of rows of
each step in `batch_sizes` (none: every step has all rows of the state). Padded, ragged and packed input differ only in
how tokens are brought into this order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _backends
from ...reference import recurrent as reference
from .._function import second_derivative
from .._library import define

ROOM = _backends.Room("recurrent")

Mode = tuple[str, str, bool]  # "lstm", "gru", "tanh" or "relu"; backend; reverse


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _wanted(*made: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    return tuple(_like(x) if wanted else x.new_empty(0) for x, wanted in made)


def _fake_lstm(input: Tensor, h0: Tensor, c0: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tokens, hidden, kept = input.shape[0], h0.shape[1], input.shape[0] if arguments[-1] else 0
    dtype = torch.float32 if input.dtype == torch.float32 else torch.float16
    gates, cells = input.new_empty(kept, 4 * hidden, dtype=dtype), input.new_empty(kept, hidden, dtype=torch.float32)
    return input.new_empty(tokens, hidden), _like(h0), _like(c0), gates, cells


def _fake_gru(input: Tensor, h0: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tokens, hidden, kept = input.shape[0], h0.shape[1], input.shape[0] if arguments[-1] else 0
    gates = input.new_empty(kept, 4 * hidden, dtype=torch.float32)
    return input.new_empty(tokens, hidden), _like(h0), gates


def _fake_rnn(input: Tensor, h0: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return input.new_empty(input.shape[0], h0.shape[1]), _like(h0)


def _fake_lstm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, _, x, h0, c0, w_ih, w_hh, *_, mask) = arguments
    bias = w_ih.new_empty(w_ih.shape[0])
    return _wanted(*zip((x, h0, c0, w_ih, w_hh, bias), mask, strict=True))


def _fake_gru_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, x, h0, w_ih, w_hh, *_, mask) = arguments
    bias = w_ih.new_empty(w_ih.shape[0])
    return _wanted(*zip((x, h0, w_ih, w_hh, bias, bias), (*mask, mask[4]), strict=True))


def _fake_rnn_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, x, h0, w_ih, w_hh, *_, mask) = arguments
    return _wanted(*zip((x, h0, w_ih, w_hh, w_ih.new_empty(w_ih.shape[0])), mask, strict=True))


_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes"

# output, h_n, c_n; then what backward reads of every token: gates i f g o after their activations (float16 for both
# 16-bit dtypes: they are at most 1, where it has three bits more than bfloat16, and 1 - o needs them), c (float32)
lstm_forward = define(
    ROOM,
    f"lstm_forward(Tensor input, Tensor h0, Tensor c0, {_WEIGHTS}, bool reverse, bool save) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_lstm,
)
# dx, dh0, dc0, dW_ih, dW_hh, db (of either bias); mask in the same order
lstm_backward = define(
    ROOM,
    "lstm_backward(Tensor dy, Tensor dhn, Tensor dcn, Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, "
    "Tensor? batch_sizes, Tensor output, Tensor gates, Tensor cells, bool reverse, bool[6] output_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_lstm_backward,
)
# output, h_n; then r, z, n and n' = h W_hn^T + b_hn of every token, float32 (n' is not bounded)
gru_forward = define(
    ROOM,
    f"gru_forward(Tensor input, Tensor h0, {_WEIGHTS}, bool reverse, bool save) -> (Tensor, Tensor, Tensor)",
    _fake_gru,
)
# dx, dh0, dW_ih, dW_hh, db_ih, db_hh; the last of the mask stands for both biases
gru_backward = define(
    ROOM,
    "gru_backward(Tensor dy, Tensor dhn, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? batch_sizes, "
    "Tensor output, Tensor gates, bool reverse, bool[5] output_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_gru_backward,
)
# output, h_n; backward reads the output alone
rnn_forward = define(
    ROOM,
    f"rnn_forward(Tensor input, Tensor h0, {_WEIGHTS}, str nonlinearity, bool reverse) -> (Tensor, Tensor)",
    _fake_rnn,
)
# dx, dh0, dW_ih, dW_hh, db (of either bias)
rnn_backward = define(
    ROOM,
    "rnn_backward(Tensor dy, Tensor dhn, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? batch_sizes, "
    "Tensor output, str nonlinearity, bool reverse, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_rnn_backward,
)

Tensors = tuple[Any, ...]  # some may be None


def _forward(mode: Mode, layer: Tensors, states: Tensors, save: bool) -> tuple[Tensors, Tensors]:
    """((output, *final states), what only backward reads); `layer` is (input, w_ih, w_hh, b_ih, b_hh, batch_sizes)."""
    (kind, backend, reverse), (input, *weights) = mode, layer
    if kind == "lstm":
        *results, gates, cells = lstm_forward[backend](input, *states, *weights, reverse, save)
        return tuple(results), (gates, cells)
    if kind == "gru":
        *results, gates = gru_forward[backend](input, *states, *weights, reverse, save)
        return tuple(results), (gates,)
    return rnn_forward[backend](input, *states, *weights, kind, reverse), ()


def _backward(
    mode: Mode,
    mask: tuple[bool, ...],
    cotangents: Tensors,
    layer: Tensors,
    states: Tensors,
    output: Tensor,
    kept: Tensors,
) -> Tensors:
    """Gradients of (input, w_ih, w_hh, b_ih, b_hh, *states), zero-size where the mask is False."""
    (kind, backend, reverse), (input, w_ih, w_hh, _, _, sizes) = mode, layer
    biased = mask[3] or mask[4]
    order = (mask[0], *mask[5:], mask[1], mask[2], biased)
    tensors = (*cotangents, input, *states, w_ih, w_hh, sizes, output, *kept)
    options = (reverse,) if kind in ("lstm", "gru") else (kind, reverse)
    backward = {"lstm": lstm_backward, "gru": gru_backward}.get(kind, rnn_backward)[backend]
    dx, *found = backward(*tensors, *options, order)
    d_states, (dw_ih, dw_hh, db_ih, *rest) = found[: len(states)], found[len(states) :]
    # The same numbers for both biases, but not the same memory: an optimizer may write to either.
    db_hh = rest[0] if rest else db_ih.clone() if mask[3] and mask[4] else db_ih
    return dx, dw_ih, dw_hh, db_ih, db_hh, *d_states


class LayerGrad(Function):
    """The gradients as a function of the cotangents and the inputs; its own backward differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, mask: tuple[bool, ...], states: int, kept: int, *tensors: Any) -> Any:
        ctx.mode, ctx.mask, ctx.states = mode, mask, states
        cotangents, layer, tensors = tensors[: 1 + states], tensors[1 + states : 7 + states], tensors[7 + states :]
        initial, output, saved = tensors[:states], tensors[states], tensors[states + 1 :]
        ctx.save_for_backward(*cotangents, *layer, *initial)
        ctx.kept = kept
        return _backward(mode, mask, cotangents, layer, initial, output, saved)

    @staticmethod
    def backward(ctx: Any, *ddx: Tensor) -> Any:
        (kind, _, reverse), states = ctx.mode, ctx.states
        saved = ctx.saved_tensors
        batch_sizes = saved[6 + states]
        given = [i for i, t in enumerate(saved) if t is not None and i != 6 + states]
        wanted = [i for i, needed in enumerate(ctx.mask) if needed]

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(saved)
            for i, value in zip(given, tensors, strict=True):
                full[i] = value
            cotangents, layer, initial = full[: 1 + states], full[1 + states : 6 + states], full[7 + states :]
            primals = [*layer, *initial]

            def of(*chosen: Tensor) -> tuple[Tensor, ...]:
                point = list(primals)
                for i, value in zip(wanted, chosen, strict=True):
                    point[i] = value
                x, w_ih, w_hh, b_ih, b_hh, *state = point
                return reference.layer(kind, x, tuple(state), w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse)

            grads: tuple[Tensor, ...] = torch.func.vjp(of, *(primals[i] for i in wanted))[1](tuple(cotangents))
            return grads

        found = second_derivative(first, tuple(saved[i] for i in given), tuple(ddx[i] for i in wanted))
        result: list[Tensor | None] = [None] * len(saved)
        for i, value in zip(given, found, strict=True):
            result[i] = value
        return None, None, None, None, *result, None, *(None,) * ctx.kept


class Layer(Function):
    """(output, *final states) of (input, w_ih, w_hh, b_ih, b_hh, batch_sizes, *states), on every backend."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, *tensors: Any) -> Any:
        layer, states = tensors[:6], tensors[6:]
        results, kept = _forward(mode, layer, states, True)
        ctx.mode, ctx.states = mode, len(states)
        ctx.save_for_backward(*layer, *states, results[0], *kept)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        n, saved, needed = ctx.states, ctx.saved_tensors, ctx.needs_input_grad
        layer, states, output, kept = saved[:6], saved[6 : 6 + n], saved[6 + n], saved[7 + n :]
        mask = (*needed[1:6], *needed[7:])
        if torch.is_grad_enabled():
            grads = LayerGrad.apply(ctx.mode, mask, n, len(kept), *cotangents, *saved)
        else:
            grads = _backward(ctx.mode, mask, cotangents, layer, states, output, kept)
        masked = [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]
        return None, *masked[:5], None, *masked[5:]


def run_layer(mode: Mode, layer: Tensors, states: Tensors) -> Tensors:
    """(output, *final states); `layer` is (input, w_ih, w_hh, b_ih, b_hh, batch_sizes), of which some may be None."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*layer, *states)):
        results: Tensors = Layer.apply(mode, *layer, *states)
        return results
    return _forward(mode, layer, states, False)[0]
