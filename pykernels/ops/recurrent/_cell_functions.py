"""The operators of single cells and the autograd Function over them.

A cell is a sequence of one step, and its kernels are those of sequences. It has operators of its own because a call of
a small cell is nearly all overhead: fewer arguments, no tokens to bring into order, only the results that are wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...reference import recurrent as reference
from .._function import apply, second_derivative
from .._library import define
from ._functions import ROOM

_REFERENCE = {
    "lstm": reference.lstm_cell,
    "gru": reference.gru_cell,
    "tanh": reference.rnn_tanh_cell,
    "relu": reference.rnn_relu_cell,
}
_TENSORS = 7  # input, h, c (of an LSTM, otherwise None), w_ih, w_hh, b_ih, b_hh


def _fake_forward(
    input: Tensor, h: Tensor, c: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, kind: str, save: bool
) -> list[Tensor]:
    if any(t is not None and t.device != input.device for t in (h, c, w_ih, w_hh, b_ih, b_hh)):
        raise RuntimeError("tensors on several devices")  # a meta tensor brings an eager call here
    found = [h.new_empty(h.shape)]
    wide = input.dtype == torch.float32
    if kind == "lstm":
        found.append(c.new_empty(c.shape))
    if save and kind in ("lstm", "gru"):
        dtype = torch.float32 if wide or kind == "gru" else torch.float16
        found.append(h.new_empty(h.shape[0], 4 * h.shape[1], dtype=dtype))
    if save and kind == "lstm" and not wide:
        found.append(h.new_empty(h.shape, dtype=torch.float32))
    return found


def _fake_backward(
    dh: Any, dc: Any, input: Tensor, h: Tensor, c: Any, w_ih: Tensor, w_hh: Tensor, *rest: Any
) -> list[Tensor]:
    bias = w_ih.new_empty(w_ih.shape[0])
    made = zip((input, h, c, w_ih, w_hh, bias, bias), rest[-1], strict=True)
    return [x.new_empty(x.shape) for x, wanted in made if wanted]


# h', of an LSTM c', then, with `save`, what backward reads: of an LSTM gates after their activations (float16 for both
# 16-bit dtypes) and, where c' is not float32, c' in float32; of a GRU r, z, n, n' in float32
cell_forward = define(
    ROOM,
    "cell_forward(Tensor input, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, str kind, "
    "bool save) -> Tensor[]",
    _fake_forward,
)
# those of the gradients of (input, h, c, w_ih, w_hh, b_ih, b_hh) that the mask wants; output: h' (RNN); cells: c' in
# float32
cell_backward = define(
    ROOM,
    "cell_backward(Tensor? dh, Tensor? dc, Tensor input, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, "
    "Tensor? output, Tensor? gates, Tensor? cells, str kind, bool[7] mask) -> Tensor[]",
    _fake_backward,
)


def _gradients(backend: str, kind: str, mask: tuple[bool, ...], dh: Any, dc: Any, *saved: Any) -> list[Tensor | None]:
    found = cell_backward[backend](dh, dc, *saved, kind, mask)
    if len(found) == _TENSORS:
        return found
    rest = iter(found)
    return [next(rest) if wanted else None for wanted in mask]


class CellGrad(Function):
    """The gradients as a function of the cotangents and the inputs; its own backward differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, backend: str, kind: str, mask: tuple[bool, ...], *tensors: Any) -> Any:
        """tensors: dh, dc, input, h, c, w_ih, w_hh, output, gates, cells, b_ih, b_hh."""
        ctx.kind, ctx.mask = kind, mask
        ctx.save_for_backward(*tensors[:7], *tensors[10:])
        return tuple(_gradients(backend, kind, mask, *tensors[:10]))

    @staticmethod
    def backward(ctx: Any, *ddx: Any) -> Any:
        saved, kind = ctx.saved_tensors, ctx.kind
        given = [i for i, t in enumerate(saved) if t is not None]
        wanted = [i for i, needed in enumerate(ctx.mask) if needed]

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(saved)
            for i, value in zip(given, tensors, strict=True):
                full[i] = value
            primals = full[2:]

            def of(*chosen: Tensor) -> Any:
                point = list(primals)
                for i, value in zip(wanted, chosen, strict=True):
                    point[i] = value
                input, h, c, *weights = point
                found = _REFERENCE[kind](input, h if c is None else (h, c), *weights)
                return found if c is not None else (found,)

            results, pullback = torch.func.vjp(of, *(primals[i] for i in wanted))
            cotangents = [torch.zeros_like(y) if d is None else d for d, y in zip(full[:2], results, strict=False)]
            grads: tuple[Tensor, ...] = pullback(tuple(cotangents))
            return grads

        found = second_derivative(first, tuple(saved[i] for i in given), tuple(ddx[i] for i in wanted))
        result: list[Tensor | None] = [None] * len(saved)
        for i, value in zip(given, found, strict=True):
            result[i] = value
        return None, None, None, *result[:7], None, None, None, *result[7:]


class Cell(Function):
    """h' of (input, h, None, weights and biases), of an LSTM (h', c') of (input, h, c, ...), on every backend."""

    @staticmethod
    def forward(ctx: Any, backend: str, kind: str, *tensors: Any) -> Any:
        found = cell_forward[backend](*tensors, kind, True)
        ctx.backend, ctx.kind = backend, kind
        ctx.set_materialize_grads(False)
        if kind == "lstm":
            ctx.save_for_backward(*tensors, None, found[2], found[-1] if len(found) == 4 else found[1])
            return found[0], found[1]
        ctx.save_for_backward(*tensors, *((None, found[1]) if kind == "gru" else (found[0], None)), None)
        return found[0]

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None = None) -> Any:
        *layer, b_ih, b_hh, output, gates, cells = ctx.saved_tensors
        mask = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            arguments = (dh, dc, *layer, output, gates, cells, b_ih, b_hh)
            return None, None, *CellGrad.apply(ctx.backend, ctx.kind, mask, *arguments)
        return None, None, *_gradients(ctx.backend, ctx.kind, mask, dh, dc, *layer, output, gates, cells)


def run_cell(backend: str, kind: str, *tensors: Any) -> Any:
    """A cell of (input, h, c or None, w_ih, w_hh, b_ih, b_hh): h', of an LSTM (h', c')."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return apply(Cell, backend, kind, *tensors)
    found = cell_forward[backend](*tensors, kind, False)
    return (found[0], found[1]) if kind == "lstm" else found[0]
