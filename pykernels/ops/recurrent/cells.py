"""Recurrent cells: one step of a vanilla RNN, an LSTM or a GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._backends import explaining, is_compiling
from ._arguments import GATES, cell_arguments
from ._cell_functions import run_cell
from ._functions import ROOM

__all__ = ["gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"]

_REFERENCE = {
    "lstm_cell": reference.lstm_cell,
    "gru_cell": reference.gru_cell,
    "rnn_tanh_cell": reference.rnn_tanh_cell,
    "rnn_relu_cell": reference.rnn_relu_cell,
}


def _run(function: str, kind: str, backend: str | None, input: Tensor, h: Any, c: Any, *weights: Any) -> Any:
    """The cell `function` of (input, h, c or None, w_ih, w_hh, b_ih, b_hh)."""
    if input.__class__ is Tensor and not (is_compiling() or explaining() or torch.is_autocast_enabled("cpu")):
        served = ROOM.resolve(function, backend, input)
        if served == "cpu":  # the operator checks its arguments itself, in a tenth of the time
            try:
                return run_cell(served, kind, input, h, c, *weights)
            except (AttributeError, RuntimeError, TypeError):
                pass  # in words that name the argument, here:
    hx = (h,) if kind != "lstm" else (h, c)
    input, states, weights = cell_arguments(function, GATES.get(kind, 1), input, hx, weights)
    if explaining():
        ROOM.explained = (kind, False, input, (1, *states[0].shape))
    served = ROOM.resolve(function, backend, input)
    if served == "reference":
        return _REFERENCE[function](input, states if kind == "lstm" else states[0], *weights)
    h, c = states if kind == "lstm" else (states[0], None)
    return run_cell(served, kind, input, h, c, *weights)


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
    h: Tensor = _run("rnn_tanh_cell", "tanh", backend, input, hx, None, w_ih, w_hh, b_ih, b_hh)
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
    h: Tensor = _run("rnn_relu_cell", "relu", backend, input, hx, None, w_ih, w_hh, b_ih, b_hh)
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
    h, c = _run("lstm_cell", "lstm", backend, input, *hx, w_ih, w_hh, b_ih, b_hh)
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
    h: Tensor = _run("gru_cell", "gru", backend, input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return h
