"""The backward kernels of attention: one that owns queries (dq), one that owns keys (dk, dv). No atomics: repeatable.

Both make the probabilities again from the log-sum-exp. dk and dv are made for each query head, and summed over the
heads that share a key head afterwards: with a loop over those heads inside, the two accumulators spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_place as places
from . import _attention_tiles as tiles_of


@triton.jit
def attention_rows_kernel(
    dout, out, lse, lse_low_ptr, dlse, base_ptr, delta_ptr, rows, heads, length,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For every query delta = <dout, out> - dlse, and the lse in powers of two: +inf where no key is seen, so that
    exp2(logit - base) is 0 there and not NaN."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    i = row % length
    h = row // length % heads
    b = row // length // heads
    column = tl.arange(0, BLOCK_DV)
    inside = exists[:, None] & (column < DV)[None, :]
    dout_ptrs = dout.ptr + (b * dout.b + h * dout.h + i * dout.l)[:, None] + column[None, :]
    out_ptrs = out.ptr + (b * out.b + h * out.h + i * out.l)[:, None] + column[None, :]
    product = tl.load(dout_ptrs, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    moved = tl.load(dlse.ptr + b * dlse.b + h * dlse.h + i * dlse.l, mask=exists, other=0.0)
    at = b * lse.b + h * lse.h + i * lse.l
    high = tl.load(lse.ptr + at, mask=exists, other=0.0)
    low = tl.load(lse_low_ptr + at, mask=exists, other=0.0)
    base = ((high.to(tl.float64) + low.to(tl.float64)) * 1.4426950408889634).to(tl.float32)
    tl.store(delta_ptr + at, tl.sum(product, 1) - moved, mask=exists)
    tl.store(base_ptr + at, tl.where(high == -float("inf"), float("inf"), base), mask=exists)


@triton.jit
def attention_bwd_dq_kernel(
    q, k, v, dout, q_desc, k_desc, v_desc, dout_desc, base, delta_ptr, dq, dq_scale, tiles, size, masks, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TOP_LEFT: tl.constexpr, LOWEST: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """dq = scale * sum_j ds_ij k_j, ds = p * (dropout(<dout, v>) - delta), times the slope of the cap."""
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    tile, b, h = places.locate(
        tiles, size, False, masks.right is not None or masks.prefix is not None, BLOCK_Q, SEQUENCES
    )
    place = places.here(b, h, size, masks, numbers, TOP_LEFT, SEQUENCES)
    q = places.at(q, place.b, place.h, place.q_first)
    k = places.at(k, place.b, place.h // size.group, place.k_first)
    v = places.at(v, place.b, place.h // size.group, place.k_first)
    dout = places.at(dout, place.b, place.h, place.q_first)
    dq = places.at(dq, place.b, place.h, place.q_first)

    i0 = tile * BLOCK_Q
    i = i0 + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    q_tile = tiles_of.queries(q, q_desc, place, i0, D, BLOCK_Q, BLOCK_D, True)
    dout_tile = tiles_of.queries(dout, dout_desc, place, i0, DV, BLOCK_Q, BLOCK_DV, True)
    at = place.b * base.b + place.h * base.h + (place.q_first + i) * base.l
    base_row = tl.load(base.ptr + at, mask=i < place.lq, other=float("inf"))[:, None]
    delta_row = tl.load(delta_ptr + at, mask=i < place.lq, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    edge = (masks.bias is not None or masks.mask is not None) and i0 + BLOCK_Q > place.lq
    begin, full_begin, full_end, first, masked = tiles_of.key_tiles(
        i0, tl.minimum(i0 + BLOCK_Q, place.lq), place, masks, edge, BLOCK_K
    )
    for MASKED in tl.static_range(2):
        for t in tl.range(0, masked if MASKED else (full_end - full_begin) // BLOCK_K):
            n = tiles_of.tile_start(t, begin, full_begin, full_end, first, BLOCK_K, MASKED)
            j = n + columns
            k_tile = tiles_of.keys(k, k_desc, place, masks, size.group, n, D, BLOCK_K, BLOCK_D, MASKED)
            v_tile = tiles_of.keys(v, v_desc, place, masks, size.group, n, DV, BLOCK_K, BLOCK_DV, MASKED)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            s, u = tiles_of.scaled(s, numbers, PRECISE)
            s = tiles_of.add_and_mask(s, i[:, None], j[None, :], place, masks, MASKED, LOWEST)
            p = tl.exp2(s - base_row)
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
            if numbers.seed is not None:
                keep = tiles_of.kept(i[:, None], j[None, :], place, numbers)
                dp = tl.where(keep, dp * numbers.keep_scale, 0.0)
            ds = tiles_of.score_gradient(p, dp, delta_row, u, numbers)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    tiles_of.write(dq, acc * dq_scale, i, i < place.lq, D, BLOCK_D)


@triton.jit
def attention_bwd_dkdv_kernel(
    q, k, v, dout, q_desc, k_desc, v_desc, dout_desc, base, delta_ptr, dk, dv, dk_scale, tiles, size, masks, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TOP_LEFT: tl.constexpr, LOWEST: tl.constexpr, SEQUENCES: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """dv = sum_i dropout(p_ij) dout_i and dk = scale * sum_i ds_ij q_i of one query head, on transposed tiles: keys are
    rows, so that both sums are accumulated in place. NEED_K, NEED_V: one of them can be made alone."""
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    tile, b, h = places.locate(tiles, size, True, False, BLOCK_K, SEQUENCES)
    place = places.here(b, h, size, masks, numbers, TOP_LEFT, SEQUENCES)
    q = places.at(q, place.b, place.h, place.q_first)
    k = places.at(k, place.b, place.h // size.group, place.k_first)
    v = places.at(v, place.b, place.h // size.group, place.k_first)
    dout = places.at(dout, place.b, place.h, place.q_first)
    rows = place.b * base.b + place.h * base.h + place.q_first * base.l

    j0 = tile * BLOCK_K
    j = j0 + tl.arange(0, BLOCK_K)
    in_step = tl.arange(0, BLOCK_Q)
    k_tile = tiles_of.keys(k, k_desc, place, masks, size.group, j0, D, BLOCK_K, BLOCK_D, True)
    v_tile = tiles_of.keys(v, v_desc, place, masks, size.group, j0, DV, BLOCK_K, BLOCK_DV, True)
    dk_tile = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    tensors: tl.constexpr = masks.bias is not None or masks.mask is not None or masks.seen is not None
    begin, full_begin, full_end, first, masked = tiles_of.query_tiles(
        j0, tl.minimum(j0 + BLOCK_K, place.lk), place, masks, tensors and j0 + BLOCK_K > place.lk, BLOCK_Q
    )
    for MASKED in tl.static_range(2):
        for t in tl.range(0, masked if MASKED else (full_end - full_begin) // BLOCK_Q):
            n = tiles_of.tile_start(t, begin, full_begin, full_end, first, BLOCK_Q, MASKED)
            i = n + in_step
            q_tile = tiles_of.queries(q, q_desc, place, n, D, BLOCK_Q, BLOCK_D, MASKED)
            dout_tile = tiles_of.queries(dout, dout_desc, place, n, DV, BLOCK_Q, BLOCK_DV, MASKED)
            at = rows + i.to(tl.int64) * base.l
            if MASKED:
                base_row = tl.load(base.ptr + at, mask=i < place.lq, other=float("inf"))[None, :]
                delta_row = tl.load(delta_ptr + at, mask=i < place.lq, other=0.0)[None, :]
            else:
                base_row = tl.load(base.ptr + at)[None, :]
                delta_row = tl.load(delta_ptr + at)[None, :]
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            s, u = tiles_of.scaled(s, numbers, PRECISE)
            s = tiles_of.add_and_mask(s, i[None, :], j[:, None], place, masks, MASKED, LOWEST)
            p = tl.exp2(s - base_row)
            weights = p
            if numbers.seed is not None:
                keep = tiles_of.kept(i[None, :], j[:, None], place, numbers)
                weights = tl.where(keep, p * numbers.keep_scale, 0.0)
            if NEED_V:
                dv_tile = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION)
            if NEED_K:
                dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
                if numbers.seed is not None:
                    dp = tl.where(keep, dp * numbers.keep_scale, 0.0)
                ds = tiles_of.score_gradient(p, dp, delta_row, u, numbers)
                dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    if NEED_K:
        dk = places.at(dk, place.b, place.h, place.k_first)
        tiles_of.write(dk, dk_tile * dk_scale, j, j < place.lk, D, BLOCK_D)
    if NEED_V:
        dv = places.at(dv, place.b, place.h, place.k_first)
        tiles_of.write(dv, dv_tile, j, j < place.lk, DV, BLOCK_DV)
