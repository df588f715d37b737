"""One step of a recurrent layer with every option, and the weights it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .._random import philox_words, seed_on

State = tuple[Tensor, ...]  # (h,) or (h, c), each (B, H)
Step = Callable[[Tensor, State], State]  # (gates from the input, state before) -> state after

GATES = {"lstm": 4, "gru": 3}  # a vanilla RNN has one
EPS = 1e-5  # of layer normalisation
_SHIFTS = tuple((use * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for use in range(4))  # as int64


class Weights(NamedTuple):
    """The weights of one layer in one direction; `None` where the option that needs them is off.

    w_ih (G H, I), w_hh (G H, P), b_ih and b_hh (G H): torch's, G gates, P = H without projections. w_hr (P, H):
    projection. peephole (3 H): p_i, p_f, p_o. norm_ih, norm_hh (G H): gains of layer normalisation; norm_c, norm_c_bias
    (H): gain and offset of c's.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    peephole: Tensor | None = None
    norm_ih: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None


def extra_names(mode: str, projected: bool, peephole: bool, layer_norm: bool) -> list[str]:
    """Fields of `Weights` that follow the biases in a flat list of weights."""
    names = (["w_hr"] if projected else []) + (["peephole"] if peephole else [])
    if layer_norm:
        names += ["norm_ih", "norm_hh", *(["norm_c", "norm_c_bias"] if mode == "lstm" else [])]
    return names


def unflatten(flat: Sequence[Tensor], extra: Sequence[str]) -> Weights:
    """A layer's flat weights by name: w_ih, w_hh, b_ih and b_hh or neither, then those of `extra`."""
    names = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if len(flat) - len(extra) == 4 else []), *extra]
    return Weights(**dict(zip(names, flat, strict=True)))


def wide(x: Tensor) -> Tensor:
    """16-bit tensors in float32; the others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def keep(
    seed: int | Tensor | None, use: int, index: int, shape: Sequence[int], p: float, device: torch.device
) -> Tensor:
    """Which elements of the index-th tensor of this shape stay, each with probability 1 - p.

    A call's masks have seeds of their own, `seed + use * 0x9E3779B97F4A7C15`; use 0: dropout between layers, 1:
    recurrent dropout, 2 and 3: zoneout of h and c. Offsets count on from one tensor to the next.
    """
    count = math.prod(shape)
    return kept_at(seed, use, torch.arange(index * count, (index + 1) * count, device=device), p).reshape(tuple(shape))


def kept_at(seed: int | Tensor | None, use: int, offsets: Tensor, p: float) -> Tensor:
    """`keep` of the elements at these offsets."""
    return philox_words(seed_on(seed, offsets.device) + _SHIFTS[use], offsets) >= round(p * 2.0**32)


def dropped(x: Tensor, seed: int | Tensor | None, use: int, index: int, p: float) -> Tensor:
    """x with the elements that `keep` drops set to 0, the others times 1 / (1 - p)."""
    return torch.where(keep(seed, use, index, x.shape, p, x.device), x * (1 / (1 - p) if p < 1 else 0.0), 0)


def lstm_gates(gates: Tensor, c: Tensor, peephole: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(o, h', c') from the input's gates and the state's added up, (B, 4H); c before the step."""
    i, f, g, o = gates.chunk(4, -1)
    if peephole is None:
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        o = o.sigmoid()
        return o, o * c.tanh(), c
    p_i, p_f, p_o = peephole.chunk(3)
    c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    o = (o + p_o * c).sigmoid()
    return o, o * c.tanh(), c


def gru_gates(input: Tensor, hidden: Tensor, h: Tensor) -> Tensor:
    """h' from the input's gates and the state's, each (B, 3H) with its biases."""
    (r, z, n), (r_h, z_h, n_h) = input.chunk(3, -1), hidden.chunk(3, -1)
    n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
    return n + torch.sigmoid(z + z_h) * (h - n)


def prepare(mode: str, input: Tensor, weights: Weights) -> tuple[Tensor, Step]:
    """The gates from the input, for all its rows at once, and the function of one step.

    The GRU's b_hh stays inside the step: its n' is multiplied by r. Elsewhere both biases add up outside.
    """
    w = Weights(*(None if x is None else wide(x) for x in weights))
    b_ih, b_hh = w.b_ih, w.b_hh
    if mode != "gru":
        b_ih, b_hh = (b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh), None
    step = stepper(mode, input.dtype, w._replace(b_hh=b_hh))
    if w.norm_ih is None:
        return linear(wide(input), w.w_ih, b_ih), step
    gates = layer_norm(linear(wide(input), w.w_ih), w.norm_ih.shape, w.norm_ih, eps=EPS)
    return gates if b_ih is None else gates + b_ih, step


def stepper(mode: str, dtype: torch.dtype, w: Weights) -> Step:
    """The function of one step: of w, which is wide, it reads what belongs to the state. h is rounded to `dtype`."""
    w_hh, b_hh = w.w_hh.mT, w.b_hh
    project = None if w.w_hr is None else w.w_hr.mT

    def rounded(h: Tensor) -> Tensor:
        return h.to(dtype).to(h.dtype)

    def recurrent(h: Tensor, add: Tensor | None) -> Tensor:
        if w.norm_hh is None:
            return h @ w_hh if add is None else torch.addmm(add, h, w_hh)
        product = layer_norm(h @ w_hh, w.norm_hh.shape, w.norm_hh, eps=EPS)
        return product if add is None else product + add

    def rnn_step(gates: Tensor, state: State) -> State:
        gates = recurrent(state[0], gates)
        return (rounded(gates.tanh() if mode == "tanh" else gates.relu()),)

    def lstm_step(gates: Tensor, state: State) -> State:
        o, h, c = lstm_gates(recurrent(state[0], gates), state[1], w.peephole)
        if w.norm_c is not None:
            h = o * layer_norm(c, w.norm_c.shape, w.norm_c, w.norm_c_bias, eps=EPS).tanh()
        return rounded(h if project is None else h @ project), c

    def gru_step(gates: Tensor, state: State) -> State:
        h = state[0]
        return (rounded(gru_gates(gates, recurrent(h, b_hh), h)),)

    step: Step = {"lstm": lstm_step, "gru": gru_step}.get(mode, rnn_step)
    return step
