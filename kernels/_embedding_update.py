"""A step of an optimizer on one row of a table, by the sum of its gradient: the formulas are those of
pykernels/ops/embedding/update.py. All in float32; the row is rounded once, stochastically if there is a seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _lib

WIDEST = 8192  #: columns that one program can hold, which the mean over a row asks for


@triton.jit
def round_stochastically(x, seed_ptr, offset):
    """float32 whose lower 16 bits are 0: up with the probability of the part that is cut off."""
    bits = x.to(tl.int32, bitcast=True)
    word = _lib.philox_word(tl.load(seed_ptr), offset)
    rounded = ((bits + (word >> 16).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def update_row(g, key, exists, mask, weight_ptr, rule, cols, col, RULE: tl.constexpr):
    weight_row, state_ptr, second_ptr, seed_ptr, lr, decay, eps, one_minus_beta1, beta2, one_minus_beta2, scale2 = rule
    weight = weight_ptr + key * weight_row + col
    w = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    g += tl.where(decay != 0.0, decay * w, 0.0)  # not 0 times infinity
    place = key * cols + col
    if RULE == "sgd":
        step = lr * g
    elif RULE == "adagrad":
        s = tl.load(state_ptr + place, mask=mask, other=1.0) + g * g
        tl.store(state_ptr + place, s, mask=mask)
        step = lr * g / (tl.sqrt(s) + eps)
    elif RULE == "rowwise_adagrad":
        s = tl.load(state_ptr + key, mask=exists, other=1.0) + tl.sum(tl.where(mask, g * g, 0.0), 0) / cols
        tl.store(state_ptr + key, s, mask=exists)
        step = lr * g / (tl.sqrt(s) + eps)
    else:
        m = tl.load(state_ptr + place, mask=mask, other=0.0)
        v = tl.load(second_ptr + place, mask=mask, other=1.0)
        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        tl.store(state_ptr + place, m, mask=mask)
        tl.store(second_ptr + place, v, mask=mask)
        step = lr * m / (tl.sqrt(v) * scale2 + eps)
    w -= step
    if seed_ptr is not None:
        w = round_stochastically(w, seed_ptr, place)
    tl.store(weight, w.to(weight_ptr.dtype.element_ty), mask=mask)


class Rule(NamedTuple):
    """A rule with its numbers and states."""

    name: str
    lr: float
    weight_decay: float
    eps: float
    beta1: float
    beta2: float
    step: int
    state: Tensor | None
    second_state: Tensor | None
    seed: Tensor | None

    @property
    def whole_rows(self) -> bool:
        """Whether a row's step needs all of its columns."""
        return self.name == "rowwise_adagrad"

    def arguments(self, weight: Tensor) -> tuple[Any, ...]:
        """What `update_row` takes. Differences from 1 are taken here, in float64."""
        adam = self.name == "adam"
        return (
            weight.stride(0),
            self.state,
            self.second_state,
            self.seed,
            self.lr / (1 - self.beta1**self.step) if adam else self.lr,
            self.weight_decay,
            self.eps,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            (1 - self.beta2**self.step) ** -0.5 if adam else 1.0,
        )
