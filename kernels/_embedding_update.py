"""A step of an optimizer on one row of a table, by the sum of its gradient: the formulas are those of
pykernels/ops/embedding/update.py. All in float32; the row is rounded once, stochastically if there is a seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _lib

WIDEST = 8192  #: columns that one program holds; row-wise Adagrad on wider rows goes twice over the gradients


@triton.jit
def round_stochastically(x, seed_ptr, offset):
    """float32 whose lower 16 bits are 0: up with the probability of the part that is cut off."""
    bits = x.to(tl.int32, bitcast=True)
    word = _lib.philox_word(tl.load(seed_ptr), offset)
    rounded = ((bits + (word >> 16).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def update_row(g, key, target, exists, mask, weight_ptr, rule, cols, col, RULE: tl.constexpr):
    """target: the rank of the row among those that are touched, where rules need it."""
    weight_row, state_ptr, second_ptr, seed_ptr, lr, decay, eps, one_minus_beta1, beta2, one_minus_beta2, scale2 = rule
    weight = weight_ptr + key * weight_row + col
    w = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    g += tl.where(decay != 0.0, decay * w, 0.0)  # not 0 times infinity
    place = key * cols + col
    if RULE == "rowwise_squares":  # this program's share, in the place of a second state
        share = target * tl.num_programs(1) + tl.program_id(1)
        tl.store(second_ptr + share, tl.sum(tl.where(mask, g * g, 0.0), 0), mask=exists)
        return
    if RULE == "rowwise_scaled":
        step = g * tl.load(second_ptr + target * tl.num_programs(1), mask=exists, other=0.0)
    elif RULE == "sgd":
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


@triton.jit
def rowwise_state_kernel(
    keys_ptr, ranks_ptr, rule, n, rows, cols, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Between the passes over wide rows: at the first entry of each run its row's state, and what scales its step."""
    _, state_ptr, squares_ptr, _, lr, _, eps, _, _, _, _ = rule
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + entry, mask=entry < n, other=rows).to(tl.int64)
    before = tl.load(keys_ptr + entry - 1, mask=(entry > 0) & (entry < n), other=-1).to(tl.int64)
    first = (key < rows) & (key != before)
    shares = squares_ptr + tl.load(ranks_ptr + entry, mask=first, other=0).to(tl.int64) * tiles
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        total += tl.load(shares + tile, mask=first, other=0.0)
    s = tl.load(state_ptr + key, mask=first, other=1.0) + total / cols
    tl.store(state_ptr + key, s, mask=first)
    tl.store(shares, lr / (tl.sqrt(s) + eps), mask=first)


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
