"""One step of a layer with layer normalisation or zoneout, a program for each row of the batch, in float32.

A program has the whole row: statistics over all gates of a token are two reductions, and nothing is read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _lib
from . import _recurrent_cells as cells

EPS = tl.constexpr(1e-5)
BLEND = tl.constexpr(1)
MASK = tl.constexpr(2)
HALF = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)

_FORWARD = (
    "offset", "previous", "begun", "staying", "share_h", "share_c", "threshold_h", "threshold_c", "first_h", "first_c",
)  # fmt: skip
_BACKWARD = (*_FORWARD, "rows")


@triton.jit
def _words(seed_ptr, first, place, unit, hidden, STATE: tl.constexpr):
    return _lib.philox_word(tl.load(seed_ptr + STATE), first + place * hidden + unit).to(tl.int64)


@triton.jit
def _zoned(
    before, after, seed_ptr, first, place, unit, hidden, share, threshold, ZONE: tl.constexpr, STATE: tl.constexpr
):
    if ZONE == MASK:
        return tl.where(_words(seed_ptr, first, place, unit, hidden, STATE) >= threshold, after, before)
    elif ZONE == BLEND:
        return share * before + (1.0 - share) * after
    else:
        return after


@triton.jit
def _unzoned(d, seed_ptr, first, place, unit, hidden, share, threshold, ZONE: tl.constexpr, STATE: tl.constexpr):
    """Of the gradient of the state after a step, the part of the new one and the part of the old one."""
    if ZONE == MASK:
        new = _words(seed_ptr, first, place, unit, hidden, STATE) >= threshold
        return tl.where(new, d, 0.0), tl.where(new, 0.0, d)
    elif ZONE == BLEND:
        return (1.0 - share) * d, share * d
    else:
        return d, tl.zeros_like(d)


@triton.jit
def _rounded(h, ROUND: tl.constexpr):
    if ROUND == HALF:
        return h.to(tl.float16).to(tl.float32)
    elif ROUND == BFLOAT16:
        return h.to(tl.bfloat16).to(tl.float32)
    else:
        return h


@triton.jit
def _load(ptr, unit, hidden, PART: tl.constexpr):
    return tl.load(ptr + PART * hidden + unit, mask=unit < hidden, other=0.0)


@triton.jit
def _place(places_ptr, token, PLACES: tl.constexpr):
    if PLACES:
        return tl.load(places_ptr + token)
    else:
        return token


@triton.jit(do_not_specialize=_FORWARD)
def recurrent_row_fwd_kernel(
    x_ptr, product_ptr, bias_n_ptr, peephole_ptr, norm_ptr, norm_c_ptr, norm_c_bias_ptr, h0_ptr, output_ptr, h_n_ptr,
    c_ptr, hat_ptr, kept_ptr, cell_ptr, stats_ptr, seed_ptr, places_ptr, hidden, offset, previous, begun, staying,
    share_h, share_c, threshold_h, threshold_c, first_h, first_c,
    KIND: tl.constexpr, BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, NORM: tl.constexpr, NORM_C: tl.constexpr,
    KEEP: tl.constexpr, ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, PLACES: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    GATES: tl.constexpr = cells.gates_of(KIND)
    row = tl.program_id(0).to(tl.int64)
    token = offset + row
    unit = tl.arange(0, BLOCK_H).to(tl.int64)
    mask = unit < hidden
    products = product_ptr + row * GATES * hidden
    p0 = _load(products, unit, hidden, 0)
    p1, p2, p3 = p0, p0, p0
    if GATES > 1:
        p1, p2 = _load(products, unit, hidden, 1), _load(products, unit, hidden, 2)
    if GATES > 3:
        p3 = _load(products, unit, hidden, 3)
    if NORM:
        count = GATES * hidden * 1.0
        total = p0
        if GATES > 1:
            total += p1 + p2
        if GATES > 3:
            total += p3
        mean = tl.sum(total, 0) / count
        p0 = tl.where(mask, p0 - mean, 0.0)
        squares = p0 * p0
        if GATES > 1:
            p1, p2 = tl.where(mask, p1 - mean, 0.0), tl.where(mask, p2 - mean, 0.0)
            squares += p1 * p1 + p2 * p2
        if GATES > 3:
            p3 = tl.where(mask, p3 - mean, 0.0)
            squares += p3 * p3
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / count + EPS)
        p0, p1, p2, p3 = p0 * scale, p1 * scale, p2 * scale, p3 * scale
        if KEEP:
            hats = hat_ptr + token * GATES * hidden + unit
            tl.store(hats, p0, mask=mask)
            if GATES > 1:
                tl.store(hats + hidden, p1, mask=mask)
                tl.store(hats + 2 * hidden, p2, mask=mask)
            if GATES > 3:
                tl.store(hats + 3 * hidden, p3, mask=mask)
            tl.store(stats_ptr + token * 3, scale)
        p0 *= _load(norm_ptr, unit, hidden, 0)
        if GATES > 1:
            p1, p2 = p1 * _load(norm_ptr, unit, hidden, 1), p2 * _load(norm_ptr, unit, hidden, 2)
        if GATES > 3:
            p3 *= _load(norm_ptr, unit, hidden, 3)
    xs = x_ptr + token * GATES * hidden
    place = _place(places_ptr, token, PLACES)
    old = tl.where(row < begun, output_ptr + (row + previous) * hidden, h0_ptr + row * hidden)
    before = tl.load(old + unit, mask=mask, other=0.0)
    if KIND == cells.LSTM:
        c = tl.load(c_ptr + row * hidden + unit, mask=mask, other=0.0)
        a0, a1 = _load(xs, unit, hidden, 0) + p0, _load(xs, unit, hidden, 1) + p1
        a3 = _load(xs, unit, hidden, 3) + p3
        if PEEPHOLE:
            a0 += _load(peephole_ptr, unit, hidden, 0) * c
            a1 += _load(peephole_ptr, unit, hidden, 1) * c
        k0, k1, k2 = _lib.sigmoid(a0, True), _lib.sigmoid(a1, True), _lib.tanh(_load(xs, unit, hidden, 2) + p2, True)
        now = k1 * c + k0 * k2
        if PEEPHOLE:
            a3 += _load(peephole_ptr, unit, hidden, 2) * now
        k3 = _lib.sigmoid(a3, True)
        inner = now
        if NORM_C:
            average = tl.sum(tl.where(mask, now, 0.0), 0) / hidden
            apart = tl.where(mask, now - average, 0.0)
            narrow = 1.0 / tl.sqrt(tl.sum(apart * apart, 0) / hidden + EPS)
            inner = apart * narrow * _load(norm_c_ptr, unit, hidden, 0) + _load(norm_c_bias_ptr, unit, hidden, 0)
            if KEEP:
                tl.store(stats_ptr + token * 3 + 1, average)
                tl.store(stats_ptr + token * 3 + 2, narrow)
        h = k3 * _lib.tanh(inner, True)
        c = _zoned(c, now, seed_ptr, first_c, place, unit, hidden, share_c, threshold_c, ZONE_C, 1)
        tl.store(c_ptr + row * hidden + unit, c, mask=mask)
        if KEEP:
            cells.store_kept(kept_ptr + token * 4 * hidden + unit, hidden, mask, k0, k1, k2, k3)
            tl.store(cell_ptr + token * hidden + unit, c, mask=mask)
    elif KIND == cells.GRU:
        r = _lib.sigmoid(_load(xs, unit, hidden, 0) + p0, True)
        z = _lib.sigmoid(_load(xs, unit, hidden, 1) + p1, True)
        if BIAS:
            p2 += _load(bias_n_ptr, unit, hidden, 0)
        n = _lib.tanh(_load(xs, unit, hidden, 2) + r * p2, True)
        h = n + z * (before - n)
        if KEEP:
            cells.store_kept(kept_ptr + token * 4 * hidden + unit, hidden, mask, r, z, n, p2)
    else:
        a = _load(xs, unit, hidden, 0) + p0
        if KIND == cells.TANH:
            h = _lib.tanh(a, True)
        else:
            h = _lib.relu_value(a, 1.0, True)
        if KEEP:
            tl.store(kept_ptr + token * hidden + unit, h, mask=mask)
    h = _rounded(h, ROUND)
    h = _zoned(before, h, seed_ptr, first_h, place, unit, hidden, share_h, threshold_h, ZONE_H, 0)
    h = _rounded(h, ROUND)
    tl.store(output_ptr + token * hidden + unit, h, mask=mask)
    tl.store(h_n_ptr + row * hidden + unit, h, mask=mask & (row >= staying))


@triton.jit(do_not_specialize=_BACKWARD)
def recurrent_row_bwd_kernel(
    dy_ptr, through_ptr, carry_h_ptr, carry_c_ptr, peephole_ptr, norm_ptr, norm_c_ptr, norm_c_bias_ptr, h0_ptr, c0_ptr,
    output_ptr, hat_ptr, kept_ptr, cell_ptr, stats_ptr, dgates_ptr, dstate_ptr, dproduct_ptr, fresh_ptr, dnorm_ptr,
    seed_ptr, places_ptr, hidden, dy_stride, offset, previous, begun, share_h, share_c, threshold_h, threshold_c,
    first_h, first_c,
    KIND: tl.constexpr, PEEPHOLE: tl.constexpr, NORM: tl.constexpr, NORM_C: tl.constexpr, ZONE_H: tl.constexpr,
    ZONE_C: tl.constexpr, PLACES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    GATES: tl.constexpr = cells.gates_of(KIND)
    row = tl.program_id(0).to(tl.int64)
    token = offset + row
    unit = tl.arange(0, BLOCK_H).to(tl.int64)
    mask = unit < hidden
    place = _place(places_ptr, token, PLACES)
    carry_ptrs = carry_h_ptr + row * hidden + unit
    dh = tl.load(dy_ptr + token * dy_stride + unit, mask=mask, other=0.0) + _load(
        through_ptr + row * hidden, unit, hidden, 0
    )
    dh += tl.load(carry_ptrs, mask=mask, other=0.0)
    dh, old = _unzoned(dh, seed_ptr, first_h, place, unit, hidden, share_h, threshold_h, ZONE_H, 0)
    ds = dgates_ptr + token * GATES * hidden + unit
    d0 = dh
    d1, d2, d3 = d0, d0, d0
    if KIND == cells.LSTM:
        kept = kept_ptr + token * 4 * hidden
        i, f = _load(kept, unit, hidden, 0), _load(kept, unit, hidden, 1)
        g, o = _load(kept, unit, hidden, 2), _load(kept, unit, hidden, 3)
        source = tl.where(row < begun, cell_ptr + (row + previous) * hidden, c0_ptr + row * hidden)
        was = tl.load(source + unit, mask=mask, other=0.0)
        now = f * was + i * g
        inner = now
        if NORM_C:
            narrow = tl.load(stats_ptr + token * 3 + 2)
            hat = tl.where(mask, (now - tl.load(stats_ptr + token * 3 + 1)) * narrow, 0.0)
            gain = _load(norm_c_ptr, unit, hidden, 0)
            inner = hat * gain + _load(norm_c_bias_ptr, unit, hidden, 0)
        t = _lib.tanh(inner, True)
        d3 = dh * t * o * (1.0 - o)
        dc = dh * o * (1.0 - t * t)
        tl.store(fresh_ptr + token * hidden + unit, now, mask=mask)
        tl.store(dnorm_ptr + token * hidden + unit, dc, mask=mask)
        if NORM_C:
            dc = tl.where(mask, dc * gain, 0.0)
            dc = narrow * (dc - tl.sum(dc, 0) / hidden - hat * (tl.sum(dc * hat, 0) / hidden))
        carry_c_ptrs = carry_c_ptr + row * hidden + unit
        later = tl.load(carry_c_ptrs, mask=mask, other=0.0)
        later, old_c = _unzoned(later, seed_ptr, first_c, place, unit, hidden, share_c, threshold_c, ZONE_C, 1)
        dc += later
        if PEEPHOLE:
            dc += _load(peephole_ptr, unit, hidden, 2) * d3
        d0 = dc * g * i * (1.0 - i)
        d1 = dc * was * f * (1.0 - f)
        d2 = dc * i * (1.0 - g * g)
        dc = dc * f + old_c
        if PEEPHOLE:
            dc += _load(peephole_ptr, unit, hidden, 0) * d0 + _load(peephole_ptr, unit, hidden, 1) * d1
        tl.store(carry_c_ptrs, dc, mask=mask)
        cells.store_kept(ds, hidden, mask, d0, d1, d2, d3)
    elif KIND == cells.GRU:
        kept = kept_ptr + token * 4 * hidden
        r, z = _load(kept, unit, hidden, 0), _load(kept, unit, hidden, 1)
        n, inner = _load(kept, unit, hidden, 2), _load(kept, unit, hidden, 3)
        source = tl.where(row < begun, output_ptr + (row + previous) * hidden, h0_ptr + row * hidden)
        before = tl.load(source + unit, mask=mask, other=0.0)
        dn = dh * (1.0 - z) * (1.0 - n * n)
        d0, d1, d2 = dn * inner * r * (1.0 - r), dh * (before - n) * z * (1.0 - z), dn * r
        old += dh * z
        tl.store(ds, d0, mask=mask)
        tl.store(ds + hidden, d1, mask=mask)
        tl.store(ds + 2 * hidden, dn, mask=mask)
        states = dstate_ptr + token * GATES * hidden + unit
        tl.store(states, d0, mask=mask)
        tl.store(states + hidden, d1, mask=mask)
        tl.store(states + 2 * hidden, d2, mask=mask)
    else:
        y = tl.load(kept_ptr + token * hidden + unit, mask=mask, other=0.0)
        if KIND == cells.TANH:
            d0 = dh * (1.0 - y * y)
        else:
            d0 = tl.where(y <= 0.0, 0.0, dh)
        tl.store(ds, d0, mask=mask)
    tl.store(carry_ptrs, old, mask=mask)
    if NORM:
        count = GATES * hidden * 1.0
        hats = hat_ptr + token * GATES * hidden
        scale = tl.load(stats_ptr + token * 3)
        d0 *= _load(norm_ptr, unit, hidden, 0)
        h0 = _load(hats, unit, hidden, 0)
        total, along = d0, d0 * h0
        h1, h2, h3 = h0, h0, h0
        if GATES > 1:
            d1, d2 = d1 * _load(norm_ptr, unit, hidden, 1), d2 * _load(norm_ptr, unit, hidden, 2)
            h1, h2 = _load(hats, unit, hidden, 1), _load(hats, unit, hidden, 2)
            total += d1 + d2
            along += d1 * h1 + d2 * h2
        if GATES > 3:
            d3 *= _load(norm_ptr, unit, hidden, 3)
            h3 = _load(hats, unit, hidden, 3)
            total += d3
            along += d3 * h3
        mean, dot = tl.sum(total, 0) / count, tl.sum(along, 0) / count
        outs = dproduct_ptr + token * GATES * hidden + unit
        tl.store(outs, scale * (d0 - mean - h0 * dot), mask=mask)
        if GATES > 1:
            tl.store(outs + hidden, scale * (d1 - mean - h1 * dot), mask=mask)
            tl.store(outs + 2 * hidden, scale * (d2 - mean - h2 * dot), mask=mask)
        if GATES > 3:
            tl.store(outs + 3 * hidden, scale * (d3 - mean - h3 * dot), mask=mask)
