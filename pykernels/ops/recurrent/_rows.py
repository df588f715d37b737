"""Layers with layer normalisation or zoneout: their operators and the autograd Function over them.

Statistics need all gates of a token, so a step here is a product of the state with W_hh and then passes over whole
rows. What comes before the loop (the product with the input, its normalisation, biases) does not depend on time and is
torch's, differentiated by torch. An operator serves one direction of a layer, in float32; a 16-bit dtype shows in the
rounding of h, which the loop makes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ...reference import recurrent as reference
from ...reference.recurrent import Weights
from .._function import apply, second_derivative
from .._library import define
from ._functions import ROOM

_TENSORS = 10  # gates, h0, c0, w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias; not differentiated:
_GIVEN = 3  # batch_sizes, seed, places


class Mode(NamedTuple):
    """What a loop is beside its tensors, as the operators take it. kind: "lstm", "gru", "tanh" or "relu"."""

    kind: str
    dtype: torch.dtype  # h is rounded to it
    zones: tuple[float, float]  # zoneout of h and c
    firsts: tuple[Any, Any]  # offsets of their masks' first elements
    training: bool
    reverse: bool


def _fake_forward(gates: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> list[Tensor]:
    tokens, gated = gates.shape
    found = [gates.new_empty(tokens, h0.shape[1]), h0.new_empty(h0.shape)]
    if c0 is not None:
        found.append(c0.new_empty(c0.shape))
    if rest[-1]:
        gru, hidden = rest[-7] == "gru", gated // 3 if rest[-7] == "gru" else gated // 4 if c0 is not None else gated
        products = gates.new_empty(0) if rest[4] is None else gates.new_empty(tokens, gated)
        found += [products, gates.new_empty(tokens, 4 * hidden if gru or c0 is not None else hidden)]
        found += [gates.new_empty(tokens, 3)]
        found += [] if c0 is None else [gates.new_empty(tokens, hidden)]
    return found


def _fake_backward(
    dy: Tensor, dhn: Any, dcn: Any, h0: Tensor, c0: Any, w_hh: Tensor, w_hr: Any, peephole: Any, norm_hh: Any,
    norm_c: Any, norm_c_bias: Any, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    gates, mask = dy.new_empty(dy.shape[0], w_hh.shape[0]), rest[-1]
    bias_n = w_hh.new_empty(w_hh.shape[0] // 3) if rest[8] == "gru" else None
    like = (gates, h0, c0, w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias)
    pairs = zip(like, mask, strict=True)
    return [x.new_empty(x.shape) if wanted and x is not None else dy.new_empty(0) for x, wanted in pairs]


_OPTIONS = "str kind, ScalarType dtype, float[] zones, SymInt[] firsts, bool training, bool reverse"
# G gates, H the hidden size, P columns of h, W = 4 H (a vanilla RNN: H); gates (N, G H): those from the input, all
# biases in them but the GRU's b_hn, which is bias_n (H); the rest as elsewhere. seed, one int64, of a call's masks;
# places (N): each token's place in the layout that addresses them, or none: 0, 1, ...; zones and firsts: see Mode.
# Gives output, h_n, of an LSTM c_n; then, with `save`, the normalised products with W_hh (N, G H), or nothing where
# they are not normalised, activations (N, W), figures of the normalisations (N, 3) and of an LSTM c (N, H).
rows_forward = define(
    ROOM,
    "rows_forward(Tensor gates, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? w_hr, Tensor? bias_n, Tensor? peephole, "
    "Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, Tensor? batch_sizes, Tensor? seed, Tensor? places, "
    f"{_OPTIONS}, bool save) -> Tensor[]",
    _fake_forward,
)
# Gradients of the ten tensors from `gates` to `norm_c_bias`, zero-size where the mask is False or there is none.
rows_backward = define(
    ROOM,
    "rows_backward(Tensor dy, Tensor? dhn, Tensor? dcn, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? w_hr, "
    "Tensor? peephole, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, Tensor? batch_sizes, Tensor? seed, "
    "Tensor? places, Tensor output, Tensor products, Tensor kept, Tensor stats, Tensor? cells, "
    f"{_OPTIONS}, bool[10] mask) -> Tensor[]",
    _fake_backward,
)
# x (N, C) with the elements dropped whose words are below p 2^32, the others times 1 / (1 - p); mask `use` of the
# call's seed (pykernels/reference/recurrent/_step.py, `keep`), row r of x at places[r] (or r) after `first` elements.
drop_forward = define(
    ROOM,
    "drop_forward(Tensor x, Tensor seed, Tensor? places, int use, SymInt first, float p) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    backends=("cpu",),
)


def _backward(backend: str, mode: Mode, mask: tuple[bool, ...], cotangents: Any, tensors: Any, saved: Any) -> Any:
    output, products, kept, stats, *cells = saved
    _, h0, c0, w_hh, w_hr, _, peephole, norm_hh, norm_c, norm_c_bias, *given = tensors
    dcn = cotangents[2] if len(cotangents) == 3 else None
    return rows_backward[backend](
        cotangents[0], cotangents[1], dcn, h0, c0, w_hh, w_hr, peephole, norm_hh, norm_c, norm_c_bias, *given, output,
        products, kept, stats, cells[0] if cells else None, *mode, mask,
    )  # fmt: skip


def _reference(mode: Mode, tensors: Any) -> tuple[Tensor, ...]:
    """The loop in plain torch."""
    gates, h0, c0, w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias, batch_sizes, seed, places = tensors
    if mode.kind == "gru" and bias_n is not None:
        bias_n = torch.nn.functional.pad(bias_n, (2 * bias_n.shape[0], 0))
    w = Weights(w_hh, w_hh, None, bias_n, w_hr, peephole, None, norm_hh, norm_c, norm_c_bias)
    state = (h0,) if c0 is None else (h0, c0)
    masks: list[Any] = [None] * len(state)
    if mode.training:
        if batch_sizes is None:
            sizes = [h0.shape[0]] * (gates.shape[0] // max(h0.shape[0], 1))
        else:
            sizes = [n for n in batch_sizes.tolist() if n]
        rows = torch.arange(sum(sizes), device=gates.device) if places is None else places[: sum(sizes)]
        for i, (p, first, s) in enumerate(zip(mode.zones, mode.firsts, state, strict=False)):
            if p > 0:
                offsets = first + rows.unsqueeze(1) * s.shape[1] + torch.arange(s.shape[1], device=gates.device)
                masks[i] = reference.kept_at(seed, 2 + i, offsets, p).split(sizes)
    zone = reference.zone_of(mode.zones[: len(state)], mode.training, masks, mode.dtype)
    return reference.rows(mode.kind, gates, state, w, batch_sizes, zone, mode.reverse, mode.dtype)


class RowsGrad(Function):
    """The gradients as a function of the cotangents and the inputs; its own backward differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, backend: str, mode: Mode, mask: tuple[bool, ...], count: int, *tensors: Any) -> Any:
        cotangents, rest = tensors[:count], tensors[count:]
        given, saved = rest[: _TENSORS + _GIVEN], rest[_TENSORS + _GIVEN :]
        ctx.mode, ctx.mask, ctx.count, ctx.kept = mode, mask, count, len(saved)
        ctx.save_for_backward(*cotangents, *given)
        return tuple(_backward(backend, mode, mask, cotangents, given, saved))

    @staticmethod
    def backward(ctx: Any, *ddx: Any) -> Any:
        saved, count = ctx.saved_tensors, ctx.count
        fixed = saved[count + _TENSORS :]
        given = [i for i, t in enumerate(saved[: count + _TENSORS]) if t is not None]
        wanted = [i for i, needed in enumerate(ctx.mask) if needed]

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * (count + _TENSORS)
            for i, value in zip(given, tensors, strict=True):
                full[i] = value
            primals = full[count:]

            def of(*chosen: Tensor) -> tuple[Tensor, ...]:
                point = list(primals)
                for i, value in zip(wanted, chosen, strict=True):
                    point[i] = value
                return _reference(ctx.mode, (*point, *fixed))

            results, pullback = torch.func.vjp(of, *(primals[i] for i in wanted))
            cotangents = (torch.zeros_like(y) if d is None else d for d, y in zip(full[:count], results, strict=True))
            grads: tuple[Tensor, ...] = pullback(tuple(cotangents))
            return grads

        found = second_derivative(first, tuple(saved[i] for i in given), tuple(ddx[i] for i in wanted))
        result: list[Tensor | None] = [None] * (count + _TENSORS)
        for i, value in zip(given, found, strict=True):
            result[i] = value
        return None, None, None, None, *result, *(None,) * (_GIVEN + ctx.kept)


class Rows(Function):
    """(output, *final states) of the loop, on every backend."""

    @staticmethod
    def forward(ctx: Any, backend: str, mode: Mode, recompute: bool, *tensors: Any) -> Any:
        found = rows_forward[backend](*tensors, *mode, not recompute)
        count = 3 if mode.kind == "lstm" else 2
        ctx.backend, ctx.mode, ctx.recompute = backend, mode, recompute
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, found[0], *found[count:])
        return tuple(found[:count])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> Any:
        everything = ctx.saved_tensors  # read once: torch.utils.checkpoint refuses a second time
        tensors, saved = everything[: _TENSORS + _GIVEN], everything[_TENSORS + _GIVEN :]
        backend, mode, mask, count = ctx.backend, ctx.mode, ctx.needs_input_grad[3 : 3 + _TENSORS], 1 + len(dfinal)
        if dy is None:  # rows of stride 0: no memory for the zeros
            dy = saved[0].new_zeros(1, saved[0].shape[1]).expand(saved[0].shape)
        if ctx.recompute:  # the same loop again, to the same bits
            saved = (saved[0], *rows_forward[backend](*tensors, *mode, True)[count:])
        if torch.is_grad_enabled():
            grads = RowsGrad.apply(backend, mode, mask, count, dy, *dfinal, *tensors, *saved)
        else:
            grads = _backward(backend, mode, mask, (dy, *dfinal), tensors, saved)
        masked = (g if wanted else None for g, wanted in zip(grads, mask, strict=True))
        return None, None, None, *masked, *(None,) * _GIVEN


def run_rows(
    backend: str, mode: Mode, recompute: bool, input: Tensor, weights: Weights, states: tuple[Tensor, ...], *given: Any
) -> tuple[Tensor, ...]:
    """(output, *final states), in the input's dtype, of one direction of a layer over packed tokens.

    given: batch_sizes, seed and places, each of which may be None.
    """
    bias_n = None
    if mode.kind == "gru" and weights.b_hh is not None:
        split = 2 * (weights.b_hh.shape[0] // 3)
        gated = torch.nn.functional.pad(weights.b_hh[:split], (0, split // 2))
        b_ih = gated if weights.b_ih is None else weights.b_ih + gated
        bias_n, weights = reference.wide(weights.b_hh[split:]), weights._replace(b_ih=b_ih, b_hh=None)
    gates, _ = reference.prepare(mode.kind, input, weights)
    h0, c0 = (*states, None)[:2]
    of_state = (weights.w_hr, bias_n, weights.peephole, weights.norm_hh, weights.norm_c, weights.norm_c_bias)
    tensors = [None if t is None else reference.wide(t) for t in (h0, c0, weights.w_hh, *of_state)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (gates, *tensors)):
        found = apply(Rows, backend, mode, recompute, gates, *tensors, *given)
    else:
        found = rows_forward[backend](gates, *tensors, *given, *mode, False)
    return tuple([y.to(input.dtype) for y in found])


class Drop(Function):
    """Dropout by a mask of the call's seed. It is linear: the same mask takes the gradient."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, *arguments: Any) -> Any:
        ctx.backend, ctx.options = backend, arguments[2:]
        ctx.save_for_backward(*arguments[:2])
        return drop_forward[backend](x, *arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, Drop.apply(ctx.backend, dy, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def drop(
    backend: str, x: Tensor, seed: Tensor, use: int, index: int, tokens: Any, p: float, places: Tensor | None = None
) -> Tensor:
    """`reference.recurrent.dropped` of the index-th tensor (tokens, columns), of which x has all rows or those at
    `places`. On GPUs the mask is made by torch operations."""
    if backend == "cpu":
        found: Tensor = Drop.apply(backend, x, seed, places, use, index * tokens * x.shape[1], p)
        return found
    if places is None:
        return reference.dropped(x, seed, use, index, p)
    keep = reference.keep(seed, use, index, (tokens, x.shape[1]), p, x.device).index_select(0, places)
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0)
