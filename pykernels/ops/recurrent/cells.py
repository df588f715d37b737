"""Recurrent cells: one step of a vanilla RNN, an LSTM or a GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import reference
from ._arguments import cell_arguments
from ._functions import ROOM, Mode, run_layer

__all__ = ["gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"]


def _step(kind: str, backend: str, input: Tensor, states: tuple[Tensor, ...], weights: tuple[Any, ...]) -> Any:
    """A cell is a sequence of one step: (its output, *final states)."""
    return run_layer(Mode(kind, backend), (input, *weights, None, None, None), states)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a vanilla RNN, `h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh)`. As `torch.rnn_tanh_cell`.

    Args:
        input: x, Tensor[B, I], floating point; all arguments have its dtype and device.
        hx: h, Tensor[B, H].
        w_ih, w_hh: Tensor[H, I], Tensor[H, H].
        b_ih, b_hh: Tensor[H] or None.
        backend: see `pykernels.explain`.

    Returns:
        h', Tensor[B, H]. Under autocast everything is first cast to its lower precision.

    Raises:
        TypeError: an argument is not a Tensor.
        NotImplementedError: not floating point.
        RuntimeError: wrong shapes, different dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    input, states, weights = cell_arguments("rnn_tanh_cell", 1, input, (hx,), (w_ih, w_hh, b_ih, b_hh))
    served = ROOM.resolve("rnn_tanh_cell", backend, input)
    if served == "reference":
        return reference.rnn_tanh_cell(input, states[0], *weights)
    h: Tensor = _step("tanh", served, input, states, weights)[0]
    return h


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a vanilla RNN, `h' = relu(x W_ih^T + b_ih + h W_hh^T + b_hh)`. As `torch.rnn_relu_cell`.

    Arguments, shapes and errors as `rnn_tanh_cell`.
    """
    input, states, weights = cell_arguments("rnn_relu_cell", 1, input, (hx,), (w_ih, w_hh, b_ih, b_hh))
    served = ROOM.resolve("rnn_relu_cell", backend, input)
    if served == "reference":
        return reference.rnn_relu_cell(input, states[0], *weights)
    h: Tensor = _step("relu", served, input, states, weights)[0]
    return h


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM. As `torch.lstm_cell`.

    (i, f, g, o) = x W_ih^T + b_ih + h W_hh^T + b_hh; c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c').
    Source: Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000).

    Args:
        input: x, Tensor[B, I], floating point; all arguments have its dtype and device.
        hx: (h, c), each Tensor[B, H].
        w_ih, w_hh: Tensor[4H, I], Tensor[4H, H], gates in the order i, f, g, o.
        b_ih, b_hh: Tensor[4H] or None.
        backend: see `pykernels.explain`.

    Returns:
        (h', c'), each Tensor[B, H]. Under autocast everything is first cast to its lower precision.

    Raises:
        As `rnn_tanh_cell`; RuntimeError also when `hx` does not hold two states.
    """
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell(): argument 'hx' must hold two states (h, c), not {len(hx)}")
    input, states, weights = cell_arguments("lstm_cell", 4, input, tuple(hx), (w_ih, w_hh, b_ih, b_hh))
    served = ROOM.resolve("lstm_cell", backend, input)
    if served == "reference":
        return reference.lstm_cell(input, states, *weights)
    h, _, c = _step("lstm", served, input, states, weights)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a GRU. As `torch.gru_cell`.

    (r, z, n) = x W_ih^T + b_ih and (r', z', n') = h W_hh^T + b_hh; n'' = tanh(n + sigmoid(r + r') n');
    h' = (1 - u) n'' + u h with u = sigmoid(z + z'). Source: Cho et al. (2014), the reset gate after the product.

    Args:
        input: x, Tensor[B, I], floating point; all arguments have its dtype and device.
        hx: h, Tensor[B, H].
        w_ih, w_hh: Tensor[3H, I], Tensor[3H, H], gates in the order r, z, n.
        b_ih, b_hh: Tensor[3H] or None.
        backend: see `pykernels.explain`.

    Returns:
        h', Tensor[B, H]. Under autocast everything is first cast to its lower precision.

    Raises:
        As `rnn_tanh_cell`.
    """
    input, states, weights = cell_arguments("gru_cell", 3, input, (hx,), (w_ih, w_hh, b_ih, b_hh))
    served = ROOM.resolve("gru_cell", backend, input)
    if served == "reference":
        return reference.gru_cell(input, states[0], *weights)
    h: Tensor = _step("gru", served, input, states, weights)[0]
    return h
