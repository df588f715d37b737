"""The operators of single cells, what is left of a step when both matrix products are done, and their Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...reference.recurrent import gru_gates, lstm_gates
from .._function import differentiable, second_derivative
from .._library import define
from ._functions import ROOM


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# h', c' from the input's gates and the state's (B, 4H each), and c. They are added here, in float32: a sum in 16 bits
# would be rounded once more.
lstm_cell_forward = define(
    ROOM,
    "lstm_cell_forward(Tensor input, Tensor hidden, Tensor c) -> (Tensor, Tensor)",
    lambda input, hidden, c: (_like(c), _like(c)),
)
# gradients of the gates (of either) and of c
lstm_cell_backward = define(
    ROOM,
    "lstm_cell_backward(Tensor dh, Tensor dc, Tensor input, Tensor hidden, Tensor c) -> (Tensor, Tensor)",
    lambda dh, dc, input, hidden, c: (_like(input), _like(c)),
)
# h' from the input's gates and the state's (B, 3H each), and h
gru_cell_forward = define(
    ROOM, "gru_cell_forward(Tensor input, Tensor hidden, Tensor h) -> Tensor", lambda input, hidden, h: _like(h)
)
# gradients of the three
gru_cell_backward = define(
    ROOM,
    "gru_cell_backward(Tensor dy, Tensor input, Tensor hidden, Tensor h) -> (Tensor, Tensor, Tensor)",
    lambda dy, input, hidden, h: (_like(input), _like(hidden), _like(h)),
)


class LstmCellGrad(Function):
    """(d gates, dc) as a function of (dh, dc', input, hidden, c); its own backward differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        return lstm_cell_backward[backend](*tensors)

    @staticmethod
    def backward(ctx: Any, *ddx: Tensor) -> Any:
        def first(dh: Tensor, dc: Tensor, input: Tensor, hidden: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = torch.func.vjp(lstm_gates, input + hidden, c)[1]((dh, dc))
            return grads

        return None, *second_derivative(first, ctx.saved_tensors, ddx)


class LstmCell(Function):
    """(h', c') of (input, hidden, c). The activations are not saved: backward makes them again from the gates."""

    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Tensor) -> Any:
        ctx.backend = backend
        ctx.save_for_backward(*tensors)
        return lstm_cell_forward[backend](*tensors)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> Any:
        tensors = (dh, dc, *ctx.saved_tensors)
        if torch.is_grad_enabled():
            gates, before = LstmCellGrad.apply(ctx.backend, *tensors)
        else:
            gates, before = lstm_cell_backward[ctx.backend](*tensors)
        return None, gates, gates, before


GruCell = differentiable("GruCell", gru_cell_forward, gru_cell_backward, gru_gates, tensors=3)


def lstm_pointwise(backend: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """(h', c') of (input's gates, state's gates, c)."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return LstmCell.apply(backend, *tensors)  # type: ignore[no-any-return]
    return lstm_cell_forward[backend](*tensors)  # type: ignore[no-any-return]


def gru_pointwise(backend: str, *tensors: Tensor) -> Tensor:
    """h' of (input's gates, state's gates, h)."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return GruCell.apply(backend, *tensors)  # type: ignore[no-any-return]
    return gru_cell_forward[backend](*tensors)  # type: ignore[no-any-return]
