"""The time loop forward: one launch a step for any size, or one launch in all where W_hh stays on the chip."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _recurrent_cells as cells

#: These change from step to step: specialising on their values would compile the kernel again and again.
_VISIT = ("offset", "rows", "previous", "begun", "staying")
_STEP = ("tokens", "batch", *_VISIT, *(f"{name}_2" for name in _VISIT))


@triton.jit
def _weights(w_ptr, k, unit, hidden, GATE: tl.constexpr):
    """A tile of one gate's weights, transposed: k by unit."""
    return tl.load(w_ptr + (unit + GATE * hidden) * hidden + k, mask=(k < hidden) & (unit < hidden), other=0.0)


@triton.jit
def _finish(
    x_ptr, kept_ptr, cell_ptr, output_ptr, bias_ptr, peephole_ptr, token, row, unit, hidden, mask, p0, p1, p2, p3, h, c,
    KIND: tl.constexpr, BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, KEEP: tl.constexpr, GIVEN: tl.constexpr,
    PRECISE: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Applies the cell, stores the output and what is kept; (h' as it is stored, c')."""
    GATES: tl.constexpr = cells.gates_of(KIND)
    b0, b1, b2, b3 = cells.bias_tiles(bias_ptr, unit, hidden, KIND, BIAS)
    x_ptrs = x_ptr + token * (GATES * hidden) + unit
    h, c, k0, k1, k2, k3 = cells.forward_cell(
        x_ptrs, peephole_ptr, unit, hidden, mask, b0, b1, b2, b3, p0, p1, p2, p3, h, c, KIND, PEEPHOLE, PRECISE
    )
    if KEEP:
        cells.store_kept(kept_ptr + token * (4 * hidden) + unit, hidden, mask, k0, k1, k2, k3)
        if KIND == cells.LSTM:
            tl.store(cell_ptr + token * hidden + unit, c, mask=mask)
    h = h.to(output_ptr.dtype.element_ty)
    if not GIVEN:
        tl.store(output_ptr + token * (DIRECTIONS * hidden) + unit, h, mask=mask)
    return h, c


@triton.jit
def _sides(
    x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr, tokens, batch, hidden,
    KIND: tl.constexpr, BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """This direction's share of everything that there is; 0 in place of the rest (Triton 3.6 returns no None)."""
    GATES: tl.constexpr = cells.gates_of(KIND)
    x_ptr = cells.of_direction(x_ptr, tokens, GATES * hidden)
    w_ptr = cells.of_direction(w_ptr, GATES * hidden, hidden)
    bias_ptr = cells.of_direction(bias_ptr, cells.width_of(KIND), hidden) if BIAS else 0
    peephole_ptr = cells.of_direction(peephole_ptr, 3, hidden) if PEEPHOLE else 0
    h0_ptr, h_n_ptr = cells.of_direction(h0_ptr, batch, hidden), cells.of_direction(h_n_ptr, batch, hidden)
    output_ptr = cells.of_direction(output_ptr, 1, hidden)
    c_ptr = cells.of_direction(c_ptr, batch, hidden) if KIND == cells.LSTM else 0
    kept_ptr = cells.of_direction(kept_ptr, tokens, 4 * hidden) if KEEP else 0
    cell_ptr = cells.of_direction(cell_ptr, tokens, hidden) if KEEP and KIND == cells.LSTM else 0
    return x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr


@triton.jit(do_not_specialize=_STEP)
def recurrent_step_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr, hidden, tokens, batch,
    offset, rows, previous, begun, staying, offset_2, rows_2, previous_2, begun_2, staying_2,
    KIND: tl.constexpr, BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, KEEP: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr, DIRECTIONS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step for a tile of rows and units: products of h with all gates' weights of these units, and the cell.

    Of two directions each makes a step of its own (`*_2`: the second's). c is updated in place: no other program has
    these elements. h is not, as every program of the row tile reads all of it: it comes from the step before's output.
    """
    GATES: tl.constexpr = cells.gates_of(KIND)
    if DIRECTIONS == 2:
        x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr = _sides(
            x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr,
            tokens, batch, hidden, KIND, BIAS, PEEPHOLE, KEEP,
        )  # fmt: skip
        second = tl.program_id(2) == 1
        offset, rows, previous = cells.chosen(second, offset, offset_2, rows, rows_2, previous, previous_2)
        begun, staying, _ = cells.chosen(second, begun, begun_2, staying, staying_2, 0, 0)
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None].to(tl.int64)
    unit = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :].to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    mask = (row < rows) & (unit < hidden)
    h_ptrs = tl.where(row < begun, output_ptr + (row + previous) * (DIRECTIONS * hidden), h0_ptr + row * hidden)
    p0 = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    p1, p2, p3 = p0, p0, p0
    for start in range(0, hidden, BLOCK_K):
        at = start + k
        h = tl.load(h_ptrs + at[None, :], mask=(row < rows) & (at[None, :] < hidden), other=0.0)
        p0 = tl.dot(h, _weights(w_ptr, at[:, None], unit, hidden, 0), p0, input_precision=PRECISION)
        if GATES > 1:
            p1 = tl.dot(h, _weights(w_ptr, at[:, None], unit, hidden, 1), p1, input_precision=PRECISION)
            p2 = tl.dot(h, _weights(w_ptr, at[:, None], unit, hidden, 2), p2, input_precision=PRECISION)
        if GATES > 3:
            p3 = tl.dot(h, _weights(w_ptr, at[:, None], unit, hidden, 3), p3, input_precision=PRECISION)
    h, c = p0, p0
    if KIND == cells.GRU:
        h = tl.load(h_ptrs + unit, mask=mask, other=0.0).to(tl.float32)
    if KIND == cells.LSTM:
        c = tl.load(c_ptr + row * hidden + unit, mask=mask, other=0.0)
    h, c = _finish(
        x_ptr, kept_ptr, cell_ptr, output_ptr, bias_ptr, peephole_ptr, row + offset, row, unit, hidden, mask,
        p0, p1, p2, p3, h, c, KIND, BIAS, PEEPHOLE, KEEP, False, PRECISE, DIRECTIONS,
    )  # fmt: skip
    if KIND == cells.LSTM:
        tl.store(c_ptr + row * hidden + unit, c, mask=mask)
    tl.store(h_n_ptr + row * hidden + unit, h, mask=mask & (row >= staying))


@triton.jit(do_not_specialize=("batch", "tokens"))
def recurrent_loop_fwd_kernel(
    x_ptr, w_ptr, product_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr,
    offset_ptr, steps_ptr, hidden, batch, tokens,
    KIND: tl.constexpr, BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, KEEP: tl.constexpr, DIRECTIONS: tl.constexpr,
    GIVEN: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps for a tile of rows. Rows are independent, so programs never wait for each other; h and c never leave
    the multiprocessor, nor do the weights, which the compiler keeps in shared memory.

    GIVEN: the products with the state were made for all tokens at once (h is known), and programs share out the units.
    """
    GATES: tl.constexpr = cells.gates_of(KIND)
    reverse = False
    if DIRECTIONS == 2:
        x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr = _sides(
            x_ptr, w_ptr, bias_ptr, peephole_ptr, h0_ptr, output_ptr, h_n_ptr, c_ptr, kept_ptr, cell_ptr,
            tokens, batch, hidden, KIND, BIAS, PEEPHOLE, KEEP,
        )  # fmt: skip
        if GIVEN:
            product_ptr = cells.of_direction(product_ptr, tokens, GATES * hidden)
        reverse = tl.program_id(2) == 1
    tile = tl.program_id(0)
    row = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[:, None].to(tl.int64)
    unit = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :].to(tl.int64)
    inside = (row < batch) & (unit < hidden)
    state = row * hidden + unit
    steps = tl.load(steps_ptr + tile)
    h = tl.load(h0_ptr + state, mask=inside, other=0.0)
    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if KIND == cells.LSTM:
        c = tl.load(c_ptr + state, mask=inside, other=0.0)
    if not GIVEN:
        k = tl.arange(0, BLOCK_H)[:, None]
        w0 = _weights(w_ptr, k, unit, hidden, 0)
        w1, w2, w3 = w0, w0, w0
        if GATES > 1:
            w1 = _weights(w_ptr, k, unit, hidden, 1)
            w2 = _weights(w_ptr, k, unit, hidden, 2)
        if GATES > 3:
            w3 = _weights(w_ptr, k, unit, hidden, 3)
    for step in range(0, steps):
        t = tl.where(reverse, steps - 1 - step, step)
        offset = tl.load(offset_ptr + t)
        rows = tl.load(offset_ptr + t + 1) - offset
        mask = (row < rows) & (unit < hidden)
        token = row + offset
        if GIVEN:
            ptrs = product_ptr + token * (GATES * hidden) + unit
            p0 = tl.load(ptrs, mask=mask, other=0.0)
            p1, p2, p3 = p0, p0, p0
            if GATES > 1:
                p1 = tl.load(ptrs + hidden, mask=mask, other=0.0)
                p2 = tl.load(ptrs + 2 * hidden, mask=mask, other=0.0)
            if GATES > 3:
                p3 = tl.load(ptrs + 3 * hidden, mask=mask, other=0.0)
        else:
            p0 = tl.dot(h, w0, input_precision=PRECISION)
            p1, p2, p3 = p0, p0, p0
            if GATES > 1:
                p1 = tl.dot(h, w1, input_precision=PRECISION)
                p2 = tl.dot(h, w2, input_precision=PRECISION)
            if GATES > 3:
                p3 = tl.dot(h, w3, input_precision=PRECISION)
        new_h, new_c = _finish(
            x_ptr, kept_ptr, cell_ptr, output_ptr, bias_ptr, peephole_ptr, token, row, unit, hidden, mask,
            p0, p1, p2, p3, h.to(tl.float32), c, KIND, BIAS, PEEPHOLE, KEEP, GIVEN, PRECISE, DIRECTIONS,
        )  # fmt: skip
        h, c = tl.where(mask, new_h, h), tl.where(mask, new_c, c)
    tl.store(h_n_ptr + state, h, mask=inside)
    if KIND == cells.LSTM:
        tl.store(c_ptr + state, c, mask=inside)
