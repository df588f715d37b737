"""One step of each cell on a tile, forward and backward, in float32: what the time loops of this floor share.

A tile is rows of the batch by hidden units; a cell's gates lie a hidden size apart in memory. Where a cell has fewer
than four of anything, the rest are stand-ins that are neither read nor stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _lib

#: `KIND` of the kernels.
KINDS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}

LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
TANH = tl.constexpr(2)
RELU = tl.constexpr(3)


# Triton 3.6 makes tensors of the constants that a jit function returns.
@triton.constexpr_function
def gates_of(KIND):
    return {0: 4, 1: 3}.get(KIND, 1)


@triton.constexpr_function
def width_of(KIND):
    return 4 if KIND <= 1 else 1


@triton.jit
def of_direction(ptr, rows, columns):
    """This program's share of a tensor (2, rows, columns). The third axis of programs is a layer's directions."""
    return ptr + tl.program_id(2).to(tl.int64) * rows * columns


@triton.jit
def chosen(second, a, a_2, b, b_2, c, c_2):
    """Of each pair the second one, or the first."""
    return tl.where(second, a_2, a), tl.where(second, b_2, b), tl.where(second, c_2, c)


@triton.jit
def bias_tiles(bias_ptr, unit, hidden, KIND: tl.constexpr, BIAS: tl.constexpr):
    """The biases of a row of units, one tile for each of the four parts; zeros without."""
    if BIAS:
        b0 = tl.load(bias_ptr + unit, mask=unit < hidden, other=0.0)
        b1, b2, b3 = b0, b0, b0
        if KIND <= GRU:
            b1 = tl.load(bias_ptr + hidden + unit, mask=unit < hidden, other=0.0)
            b2 = tl.load(bias_ptr + 2 * hidden + unit, mask=unit < hidden, other=0.0)
            b3 = tl.load(bias_ptr + 3 * hidden + unit, mask=unit < hidden, other=0.0)
        return b0, b1, b2, b3
    else:  # an else, because the compiler reads on behind a return
        zero = tl.zeros_like(unit).to(tl.float32)
        return zero, zero, zero, zero


@triton.jit
def peephole_tiles(peephole_ptr, unit, hidden):
    """p_i, p_f and p_o of a row of units, in float32."""
    q0 = tl.load(peephole_ptr + unit, mask=unit < hidden, other=0.0).to(tl.float32)
    q1 = tl.load(peephole_ptr + hidden + unit, mask=unit < hidden, other=0.0).to(tl.float32)
    q2 = tl.load(peephole_ptr + 2 * hidden + unit, mask=unit < hidden, other=0.0).to(tl.float32)
    return q0, q1, q2


@triton.jit
def forward_cell(
    x_ptrs, peephole_ptr, unit, hidden, mask, b0, b1, b2, b3, p0, p1, p2, p3, h, c,
    KIND: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """(h', c', and four parts to keep) from the input's gates at x_ptrs, biases, and the products with the state.

    Gates are summed as (input + bias) + product: the product comes whole, rounded to the gates' magnitude once.
    """
    a0 = tl.load(x_ptrs, mask=mask, other=0.0) + b0
    if KIND == LSTM:
        a0 += p0
        a1 = tl.load(x_ptrs + hidden, mask=mask, other=0.0) + b1 + p1
        a3 = tl.load(x_ptrs + 3 * hidden, mask=mask, other=0.0) + b3 + p3
        if PEEPHOLE:
            q0, q1, q2 = peephole_tiles(peephole_ptr, unit, hidden)
            a0 += q0 * c
            a1 += q1 * c
        i, f = _lib.sigmoid(a0, PRECISE), _lib.sigmoid(a1, PRECISE)
        g = _lib.tanh(tl.load(x_ptrs + 2 * hidden, mask=mask, other=0.0) + b2 + p2, PRECISE)
        c = f * c + i * g
        if PEEPHOLE:
            a3 += q2 * c
        o = _lib.sigmoid(a3, PRECISE)
        return o * _lib.tanh(c, PRECISE), c, i, f, g, o
    elif KIND == GRU:
        r = _lib.sigmoid(a0 + p0, PRECISE)
        z = _lib.sigmoid(tl.load(x_ptrs + hidden, mask=mask, other=0.0) + b1 + p1, PRECISE)
        inner = p2 + b3
        n = _lib.tanh(tl.load(x_ptrs + 2 * hidden, mask=mask, other=0.0) + b2 + r * inner, PRECISE)
        return n + z * (h - n), c, r, z, n, inner
    elif KIND == TANH:
        y = _lib.tanh(a0 + p0, PRECISE)
        return y, c, y, y, y, y
    else:
        y = _lib.relu_value(a0 + p0, 1.0, PRECISE)
        return y, c, y, y, y, y


@triton.jit
def store_kept(ptrs, hidden, mask, k0, k1, k2, k3):
    tl.store(ptrs, k0.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + hidden, k1.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + 2 * hidden, k2.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + 3 * hidden, k3.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def backward_cell(
    kept_ptr, peephole_ptr, token, unit, hidden, mask, dh, carry, c, before, y,
    KIND: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """(four parts of the gates' gradient, carry) from dh, the gradient of h', and what was kept.

    LSTM: carry is dc; c the new one, `before` the old; parts i, f, g, o.
    GRU: carry is the part of h's gradient that passes by the product; `before` is the old h; parts n, r, z, n': the
    first three are those of the input's gates, the last three those of the state's.
    """
    if KIND == LSTM:
        kept_ptrs = kept_ptr + token * (4 * hidden) + unit
        i = tl.load(kept_ptrs, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(kept_ptrs + hidden, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(kept_ptrs + 2 * hidden, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(kept_ptrs + 3 * hidden, mask=mask, other=0.0).to(tl.float32)
        t = _lib.tanh(c, PRECISE)
        d3 = dh * t * o * (1.0 - o)
        dc = carry + dh * o * (1.0 - t * t)
        if PEEPHOLE:
            q0, q1, q2 = peephole_tiles(peephole_ptr, unit, hidden)
            dc += q2 * d3
        d0 = dc * g * i * (1.0 - i)
        d1 = dc * before * f * (1.0 - f)
        d2 = dc * i * (1.0 - g * g)
        dc *= f
        if PEEPHOLE:
            dc += q0 * d0 + q1 * d1
        return d0, d1, d2, d3, dc
    elif KIND == GRU:
        kept_ptrs = kept_ptr + token * (4 * hidden) + unit
        r = tl.load(kept_ptrs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(kept_ptrs + hidden, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(kept_ptrs + 2 * hidden, mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(kept_ptrs + 3 * hidden, mask=mask, other=0.0).to(tl.float32)
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (before - n) * z * (1.0 - z)
        dr = dn * inner * r * (1.0 - r)
        return dn, dr, dz, dn * r, dh * z
    elif KIND == TANH:
        d = dh * (1.0 - y * y)
        return d, d, d, d, carry
    else:
        d = tl.where(y <= 0.0, 0.0, dh)
        return d, d, d, d, carry
