"""The time loop backward: one launch a step for any size, or one launch in all where W_hh stays on the chip."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _recurrent_cells as cells

_VISIT = ("offset", "rows", "previous", "begun", "following", "staying")
_STEP = ("tokens", "batch", *_VISIT, *(f"{name}_2" for name in _VISIT))


@triton.jit
def _sides(
    dy_ptr, dy_side, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_ptr, carry_ptr,
    tokens, batch, hidden, KIND: tl.constexpr, PEEPHOLE: tl.constexpr,
):  # fmt: skip
    """This direction's share of everything that there is; 0 in place of the rest (Triton 3.6 returns no None)."""
    dy_ptr = cells.of_direction(dy_ptr, 1, dy_side)
    w_ptr = cells.of_direction(w_ptr, cells.gates_of(KIND) * hidden, hidden)
    peephole_ptr = cells.of_direction(peephole_ptr, 3, hidden) if PEEPHOLE else 0
    h0_ptr, dh_ptr = cells.of_direction(h0_ptr, batch, hidden), cells.of_direction(dh_ptr, batch, hidden)
    output_ptr = cells.of_direction(output_ptr, 1, hidden)
    dgates_ptr = cells.of_direction(dgates_ptr, tokens, cells.width_of(KIND) * hidden)
    kept_ptr = cells.of_direction(kept_ptr, tokens, 4 * hidden) if KIND <= cells.GRU else 0
    carry_ptr = cells.of_direction(carry_ptr, batch, hidden) if KIND <= cells.GRU else 0
    c0_ptr = cells.of_direction(c0_ptr, batch, hidden) if KIND == cells.LSTM else 0
    cell_ptr = cells.of_direction(cell_ptr, tokens, hidden) if KIND == cells.LSTM else 0
    return dy_ptr, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_ptr, carry_ptr


@triton.jit
def _finish(
    kept_ptr, cell_ptr, peephole_ptr, c0_ptr, h0_ptr, output_ptr, dgates_ptr, token, row, unit, hidden, previous,
    begun, mask, dh, carry, KIND: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Applies the cell's derivative and stores the gates' gradient: (its four parts as they are stored, carry)."""
    WIDTH: tl.constexpr = cells.width_of(KIND)
    started, fresh = mask & (row < begun), mask & (row >= begun)
    before, c, y = dh, dh, dh
    if KIND == cells.LSTM:
        c = tl.load(cell_ptr + token * hidden + unit, mask=mask, other=0.0)
        before = tl.load(cell_ptr + (row + previous) * hidden + unit, mask=started, other=0.0)
        before += tl.load(c0_ptr + row * hidden + unit, mask=fresh, other=0.0).to(tl.float32)
    elif KIND == cells.GRU:
        before = tl.load(output_ptr + (row + previous) * (DIRECTIONS * hidden) + unit, mask=started, other=0.0).to(
            tl.float32
        )
        before += tl.load(h0_ptr + row * hidden + unit, mask=fresh, other=0.0).to(tl.float32)
    else:
        y = tl.load(output_ptr + token * (DIRECTIONS * hidden) + unit, mask=mask, other=0.0).to(tl.float32)
    d0, d1, d2, d3, carry = cells.backward_cell(
        kept_ptr, peephole_ptr, token, unit, hidden, mask, dh, carry, c, before, y, KIND, PEEPHOLE, PRECISE
    )
    ptrs = dgates_ptr + token * (WIDTH * hidden) + unit
    kind = dgates_ptr.dtype.element_ty
    d0, d1, d2, d3 = d0.to(kind), d1.to(kind), d2.to(kind), d3.to(kind)
    tl.store(ptrs, d0, mask=mask)
    if WIDTH > 1:
        tl.store(ptrs + hidden, d1, mask=mask)
        tl.store(ptrs + 2 * hidden, d2, mask=mask)
        tl.store(ptrs + 3 * hidden, d3, mask=mask)
    return d0, d1, d2, d3, carry


@triton.jit(do_not_specialize=_STEP)
def recurrent_step_bwd_kernel(
    dy_ptr, dh_n_ptr, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, carry_ptr,
    hidden, dy_stride, dy_side, tokens, batch, offset, rows, previous, begun, following, staying,
    offset_2, rows_2, previous_2, begun_2, following_2, staying_2,
    KIND: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    DIRECTIONS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step for a tile of rows and units: dh from the gates' gradient of the step after it, and the cell's part.

    A row's last token takes dh_n in place of that product. The carry is updated in place, by its only program. Of two
    directions each makes a step of its own (`*_2`: the second's).
    """
    GATES: tl.constexpr = cells.gates_of(KIND)
    WIDTH: tl.constexpr = cells.width_of(KIND)
    if DIRECTIONS == 2:
        (
            dy_ptr, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_n_ptr,
            carry_ptr,
        ) = _sides(
            dy_ptr, dy_side, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_n_ptr,
            carry_ptr, tokens, batch, hidden, KIND, PEEPHOLE,
        )  # fmt: skip
        second = tl.program_id(2) == 1
        offset, rows, previous = cells.chosen(second, offset, offset_2, rows, rows_2, previous, previous_2)
        begun, following, staying = cells.chosen(second, begun, begun_2, following, following_2, staying, staying_2)
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None].to(tl.int64)
    unit = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :].to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    mask = (row < rows) & (unit < hidden)
    depth = GATES * hidden
    d_ptrs = dgates_ptr + (row + following) * (WIDTH * hidden) + (WIDTH - GATES) * hidden
    dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        d = tl.load(d_ptrs + at[None, :], mask=(row < staying) & (at[None, :] < depth), other=0.0)
        w_ptrs = w_ptr + at[:, None].to(tl.int64) * hidden + unit
        w = tl.load(w_ptrs, mask=(at[:, None] < depth) & (unit < hidden), other=0.0)
        dh = tl.dot(d, w, dh, input_precision=PRECISION)
    state = row * hidden + unit
    carry = dh
    if KIND <= cells.GRU:
        carry = tl.load(carry_ptr + state, mask=mask, other=0.0)
    if KIND == cells.GRU:  # begins with dh_n
        dh += carry
    else:
        dh += tl.load(dh_n_ptr + state, mask=mask & (row >= staying), other=0.0)
    dh += tl.load(dy_ptr + (row + offset) * dy_stride + unit, mask=mask, other=0.0).to(tl.float32)
    _, _, _, _, carry = _finish(
        kept_ptr, cell_ptr, peephole_ptr, c0_ptr, h0_ptr, output_ptr, dgates_ptr, row + offset, row, unit,
        hidden, previous, begun, mask, dh, carry, KIND, PEEPHOLE, PRECISE, DIRECTIONS,
    )  # fmt: skip
    if KIND <= cells.GRU:
        tl.store(carry_ptr + state, carry, mask=mask)


@triton.jit
def _weights(w_ptr, k, unit, hidden, GATE: tl.constexpr):
    """A tile of one gate's weights: k by unit."""
    return tl.load(w_ptr + (k + GATE * hidden) * hidden + unit, mask=(k < hidden) & (unit < hidden), other=0.0)


@triton.jit(do_not_specialize=("batch", "tokens"))
def recurrent_loop_bwd_kernel(
    dy_ptr, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_ptr, carry_ptr,
    offset_ptr, steps_ptr, hidden, batch, dy_stride, dy_side, tokens,
    KIND: tl.constexpr, PEEPHOLE: tl.constexpr, DIRECTIONS: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps for a tile of rows, last to first. dh_ptr: dh_n (B, H), replaced by dh0; carry_ptr: dc_n, by dc0."""
    GATES: tl.constexpr = cells.gates_of(KIND)
    reverse = False
    if DIRECTIONS == 2:
        (
            dy_ptr, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_ptr, carry_ptr,
        ) = _sides(
            dy_ptr, dy_side, w_ptr, peephole_ptr, h0_ptr, c0_ptr, output_ptr, kept_ptr, cell_ptr, dgates_ptr, dh_ptr,
            carry_ptr, tokens, batch, hidden, KIND, PEEPHOLE,
        )  # fmt: skip
        reverse = tl.program_id(2) == 1
    tile = tl.program_id(0)
    row = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[:, None].to(tl.int64)
    unit = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    inside = (row < batch) & (unit < hidden)
    state = row * hidden + unit
    steps = tl.load(steps_ptr + tile)
    dh = tl.load(dh_ptr + state, mask=inside, other=0.0)
    carry = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if KIND == cells.LSTM:
        carry = tl.load(carry_ptr + state, mask=inside, other=0.0)
    k = tl.arange(0, BLOCK_H)[:, None]
    w0 = _weights(w_ptr, k, unit, hidden, 0)
    w1, w2, w3 = w0, w0, w0
    if GATES > 1:
        w1 = _weights(w_ptr, k, unit, hidden, 1)
        w2 = _weights(w_ptr, k, unit, hidden, 2)
    if GATES > 3:
        w3 = _weights(w_ptr, k, unit, hidden, 3)
    for step in range(0, steps):
        t = tl.where(reverse, step, steps - 1 - step)
        offset = tl.load(offset_ptr + t)
        end = tl.load(offset_ptr + t + 1)
        rows = end - offset
        previous = tl.load(offset_ptr + t - 1, mask=t > 0, other=0)
        begun = tl.where(t > 0, rows, 0)
        if DIRECTIONS == 2:  # against time, what was visited before is the step after it, if there is one
            after = tl.load(offset_ptr + t + 2, mask=t + 1 < steps, other=0)
            begun = tl.where(reverse, tl.where(t + 1 < steps, after - end, 0), begun)
            previous = tl.where(reverse, end, previous)
        mask = (row < rows) & (unit < hidden)
        token = row + offset
        total = dh + tl.load(dy_ptr + token * dy_stride + unit, mask=mask, other=0.0).to(tl.float32)
        d0, d1, d2, d3, passed = _finish(
            kept_ptr, cell_ptr, peephole_ptr, c0_ptr, h0_ptr, output_ptr, dgates_ptr, token, row, unit, hidden,
            previous, begun, mask, total, carry, KIND, PEEPHOLE, PRECISE, DIRECTIONS,
        )  # fmt: skip
        if KIND == cells.GRU:  # parts n, r, z, n': the state's gates r, z, n are the last three
            before = tl.dot(d1, w0, passed, input_precision=PRECISION)
            before = tl.dot(d2, w1, before, input_precision=PRECISION)
            before = tl.dot(d3, w2, before, input_precision=PRECISION)
        else:
            before = tl.dot(d0, w0, input_precision=PRECISION)
        if KIND == cells.LSTM:
            before = tl.dot(d1, w1, before, input_precision=PRECISION)
            before = tl.dot(d2, w2, before, input_precision=PRECISION)
            before = tl.dot(d3, w3, before, input_precision=PRECISION)
            carry = tl.where(mask, passed, carry)
        dh = tl.where(mask, before, dh)
    tl.store(dh_ptr + state, dh, mask=inside)
    if KIND == cells.LSTM:
        tl.store(carry_ptr + state, carry, mask=inside)
