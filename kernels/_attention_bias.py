"""The gradient of an additive bias: one program for each of its tiles adds up what was broadcast, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_place as places
from . import _attention_tiles as tiles_of


@triton.jit
def owned(tiles, bias_heads, bias_rows, ROWS: tl.constexpr):
    """(batch, head, tile of rows, tile of columns) of the bias that a program makes; tiles: along the columns."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(bias_rows, ROWS)
    rest = pid // tiles // row_tiles
    return rest // bias_heads, rest % bias_heads, pid // tiles % row_tiles, pid % tiles


@triton.jit
def attention_bwd_dbias_kernel(
    q, k, v, dout, base, delta_ptr, dbias_ptr, bias_heads, bias_rows, bias_columns, tiles, size, masks, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TOP_LEFT: tl.constexpr, LOWEST: tl.constexpr, SEQUENCES: tl.constexpr,
    ALL_BATCH: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """dbias = the sum of ds over every dimension but the keys' that the bias was broadcast along (ALL_...).

    `tiles` counts the tiles along the bias's columns. dbias is contiguous. The bias is added after the cap:
    its gradient has no slope of the cap in it.
    """
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    own_b, own_h, tile_i, tile_j = owned(tiles, bias_heads, bias_rows, BLOCK_Q)
    in_rows = tl.arange(0, BLOCK_Q)
    in_columns = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for b in tl.range(0 if ALL_BATCH else own_b, size.batch if ALL_BATCH else own_b + 1):
        for h in tl.range(0 if ALL_HEADS else own_h, size.heads if ALL_HEADS else own_h + 1):
            place = places.here(tl.cast(b, tl.int64), tl.cast(h, tl.int64), size, masks, numbers, TOP_LEFT, SEQUENCES)
            q_rows = places.at(q, place.b, place.h, place.q_first)
            k_rows = places.at(k, place.b, place.h // size.group, place.k_first)
            v_rows = places.at(v, place.b, place.h // size.group, place.k_first)
            dout_rows = places.at(dout, place.b, place.h, place.q_first)
            last_row = tl.minimum(tl.cdiv(place.lq, BLOCK_Q), 2147483647 if ALL_ROWS else tile_i + 1)
            for ti in tl.range(0 if ALL_ROWS else tile_i, last_row):
                i0 = ti * BLOCK_Q
                i = i0 + in_rows
                at = place.b * base.b + place.h * base.h + (place.q_first + i) * base.l
                q_tile = tiles_of.queries(q_rows, None, place, i0, D, BLOCK_Q, BLOCK_D, True)
                dout_tile = tiles_of.queries(dout_rows, None, place, i0, DV, BLOCK_Q, BLOCK_DV, True)
                base_row = tl.load(base.ptr + at, mask=i < place.lq, other=float("inf"))
                delta_row = tl.load(delta_ptr + at, mask=i < place.lq, other=0.0)
                begin, _, _, _, masked = tiles_of.key_tiles(
                    i0, tl.minimum(i0 + BLOCK_Q, place.lq), place, masks, True, BLOCK_K
                )
                begin = begin // BLOCK_K
                for tj in tl.range(tl.maximum(begin, tile_j), tl.minimum(begin + masked, tile_j + 1)):
                    n = tj * BLOCK_K
                    j = n + in_columns
                    k_tile = tiles_of.keys(k_rows, None, place, masks, size.group, n, D, BLOCK_K, BLOCK_D, True)
                    v_tile = tiles_of.keys(v_rows, None, place, masks, size.group, n, DV, BLOCK_K, BLOCK_DV, True)
                    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                    s, _slope = tiles_of.scaled(s, numbers, PRECISE)
                    s = tiles_of.add_and_mask(s, i[:, None], j[None, :], place, masks, True, LOWEST)
                    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
                    if numbers.seed is not None:
                        keep = tiles_of.kept(i[:, None], j[None, :], place, numbers)
                        dp = tl.where(keep, dp * numbers.keep_scale, 0.0)
                    acc += tl.exp2(s - base_row[:, None]) * (dp - delta_row[:, None])

    plane = (tl.cast(own_b, tl.int64) * bias_heads + own_h) * bias_rows * bias_columns
    i = tl.cast(tile_i, tl.int64) * BLOCK_Q + in_rows
    j = tl.cast(tile_j, tl.int64) * BLOCK_K + in_columns
    if ALL_ROWS:
        tl.store(dbias_ptr + plane + j, tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty), mask=j < bias_columns)
    else:
        inside = (i < bias_rows)[:, None] & (j < bias_columns)[None, :]
        ptrs = dbias_ptr + plane + (i * bias_columns)[:, None] + j[None, :]
        tl.store(ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_bwd_dbias_rows_kernel(
    rows, dbias_ptr, bias_heads, bias_rows, size, masks, numbers,
    BLOCK_Q: tl.constexpr, TOP_LEFT: tl.constexpr, SEQUENCES: tl.constexpr,
    ALL_BATCH: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of a bias that is the same for all keys, from the sums of ds along each query's keys.

    Those sums are known without the products (softmax does not see such a bias), and exactly: adding up ds would leave
    the rounding of `out` in them, where the truth is mostly 0.
    """
    own_b, own_h, tile_i, _ = owned(1, bias_heads, bias_rows, BLOCK_Q)
    in_rows = tl.arange(0, BLOCK_Q)
    acc = tl.zeros((BLOCK_Q,), tl.float32)
    for b in tl.range(0 if ALL_BATCH else own_b, size.batch if ALL_BATCH else own_b + 1):
        for h in tl.range(0 if ALL_HEADS else own_h, size.heads if ALL_HEADS else own_h + 1):
            place = places.here(tl.cast(b, tl.int64), tl.cast(h, tl.int64), size, masks, numbers, TOP_LEFT, SEQUENCES)
            row = places.at(rows, place.b, place.h, place.q_first)
            last_row = tl.minimum(tl.cdiv(place.lq, BLOCK_Q), 2147483647 if ALL_ROWS else tile_i + 1)
            for ti in tl.range(0 if ALL_ROWS else tile_i, last_row):
                i = ti * BLOCK_Q + in_rows
                acc += tl.load(row.ptr + i.to(tl.int64) * row.l, mask=i < place.lq, other=0.0)
    plane = (tl.cast(own_b, tl.int64) * bias_heads + own_h) * bias_rows
    i = tl.cast(tile_i, tl.int64) * BLOCK_Q + in_rows
    if ALL_ROWS:
        tl.store(dbias_ptr + plane, tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty))
    else:
        tl.store(dbias_ptr + plane + i, acc.to(dbias_ptr.dtype.element_ty), mask=i < bias_rows)
