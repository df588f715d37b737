"""The gradient of an additive bias: one program for each of its tiles adds up what was broadcast, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_tiles as tiles_of
from . import _lib


@triton.jit
def attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, base_ptr, delta_ptr, dbias_ptr,
    dout_b, dout_h, dout_l, lse_b, lse_h, lse_l, bias_batch, bias_heads, bias_rows, bias_columns,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    bias_ptr, bias_b, bias_h, bias_i, bias_j, mask_ptr, mask_b, mask_h, mask_i, mask_j,
    seen_ptr, seen_b, seen_h, seen_j, span_ptr, span_b, span_h, prefix_ptr, slopes_ptr, slopes_b,
    cu_q_ptr, cu_k_ptr, seed_ptr, tiles, heads, group, batch, lq, lk, max_q, max_k,
    left, right, scale, softcap, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TOP_LEFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, SEEN: tl.constexpr, LOWEST: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SEQUENCES: tl.constexpr,
    ALL_BATCH: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """dbias = the sum of ds over every dimension but the keys' that the bias was broadcast along (ALL_...).

    `tiles` counts the tiles along the bias's columns. dbias is contiguous.
    """
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    tile_j = pid % tiles
    row_tiles = tl.cdiv(bias_rows, BLOCK_Q)
    tile_i = pid // tiles % row_tiles
    own_h = pid // tiles // row_tiles % bias_heads
    own_b = pid // tiles // row_tiles // bias_heads
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.cast(threshold, tl.uint32)
    total_q = lq
    total_k = lk
    in_rows = tl.arange(0, BLOCK_Q)
    in_columns = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for b32 in tl.range(0 if ALL_BATCH else own_b, batch if ALL_BATCH else own_b + 1):
        b = tl.cast(b32, tl.int64)
        for h32 in tl.range(0 if ALL_HEADS else own_h, heads if ALL_HEADS else own_h + 1):
            h = tl.cast(h32, tl.int64)
            lq, lk, q_first, k_first, counter = tiles_of.sequence(
                b, h, heads, batch, total_q, total_k, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES
            )
            shift, prefix, seen_begin, seen_end = tiles_of.limits(
                b, h, lq, lk, left, right, prefix_ptr, span_ptr, span_b, span_h, TOP_LEFT, LEFT, RIGHT, PREFIX, SEEN
            )
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + b * slopes_b + h) * _lib.LOG2E
            q_rows = q_ptr + b * q_b + h * q_h + q_first * q_l
            k_rows = k_ptr + b * k_b + h // group * k_h + k_first * k_l
            v_rows = v_ptr + b * v_b + h // group * v_h + k_first * v_l
            dout_rows = dout_ptr + b * dout_b + h * dout_h + q_first * dout_l
            bias_here = bias_ptr + b * bias_b + h * bias_h
            mask_here = mask_ptr
            seen_here = seen_ptr
            if MASK:
                mask_here = mask_ptr + b * mask_b + h * mask_h
            if SEEN:
                seen_here = seen_ptr + b * seen_b + h * seen_h
            last_row = tl.minimum(tl.cdiv(lq, BLOCK_Q), 2147483647 if ALL_ROWS else tile_i + 1)
            for ti in tl.range(0 if ALL_ROWS else tile_i, last_row):
                i0 = ti * BLOCK_Q
                i = i0 + in_rows
                exists = i < lq
                at = b * lse_b + h * lse_h + (q_first + i) * lse_l
                q = tiles_of.rows(q_rows, i0, q_l, in_rows, 0, lq, None, 0, D, BLOCK_D, True, False)
                dout = tiles_of.rows(dout_rows, i0, dout_l, in_rows, 0, lq, None, 0, DV, BLOCK_DV, True, False)
                base = tl.load(base_ptr + at, mask=exists, other=float("inf"))
                delta = tl.load(delta_ptr + at, mask=exists, other=0.0)
                begin, _, _, _, masked = tiles_of.key_tiles(
                    i0, tl.minimum(i0 + BLOCK_Q, lq), seen_begin, seen_end, shift, left, right, prefix, True,
                    BLOCK_K, LEFT, RIGHT, PREFIX,
                )  # fmt: skip
                begin = begin // BLOCK_K
                for tj in tl.range(tl.maximum(begin, tile_j), tl.minimum(begin + masked, tile_j + 1)):
                    n = tj * BLOCK_K
                    j = n + in_columns
                    k = tiles_of.rows(
                        k_rows, n, k_l, in_columns, seen_begin, seen_end, seen_here, seen_j, D, BLOCK_D, True, SEEN
                    )
                    v = tiles_of.rows(
                        v_rows, n, v_l, in_columns, seen_begin, seen_end, seen_here, seen_j, DV, BLOCK_DV, True, SEEN
                    )
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                    if SOFTCAP:
                        s = softcap * _lib.tanh(s, PRECISE)
                    s = tiles_of.add_and_mask(
                        s, i[:, None], j[None, :], lq, lk, seen_begin, seen_end, shift, left, right, prefix, slope,
                        bias_here, bias_i, bias_j, mask_here, mask_i, mask_j, seen_here, seen_j,
                        True, LEFT, RIGHT, PREFIX, ALIBI, BIAS, MASK, SEEN, LOWEST,
                    )  # fmt: skip
                    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                    if DROPOUT:
                        keep = tiles_of.kept(seed, threshold, counter, i[:, None], j[None, :], lk)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    acc += tl.exp2(s - base[:, None]) * (dp - delta[:, None])

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
    rows_ptr, dbias_ptr, lse_b, lse_h, lse_l, bias_heads, bias_rows,
    tiles, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr,
    BLOCK_Q: tl.constexpr, SEQUENCES: tl.constexpr,
    ALL_BATCH: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of a bias that is the same for all keys, from the sums of ds along each query's keys.

    Those sums are known without the products (softmax does not see such a bias), and exactly: adding up ds would leave
    the rounding of `out` in them, where the truth is mostly 0.
    """
    pid = tl.program_id(0)
    tile_i = pid % tiles
    own_h = pid // tiles % bias_heads
    own_b = pid // tiles // bias_heads
    in_rows = tl.arange(0, BLOCK_Q)
    acc = tl.zeros((BLOCK_Q,), tl.float32)
    for b32 in tl.range(0 if ALL_BATCH else own_b, batch if ALL_BATCH else own_b + 1):
        b = tl.cast(b32, tl.int64)
        for h32 in tl.range(0 if ALL_HEADS else own_h, heads if ALL_HEADS else own_h + 1):
            h = tl.cast(h32, tl.int64)
            length, _, q_first, _, _ = tiles_of.sequence(
                b, h, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES
            )
            last_row = tl.minimum(tl.cdiv(length, BLOCK_Q), 2147483647 if ALL_ROWS else tile_i + 1)
            for ti in tl.range(0 if ALL_ROWS else tile_i, last_row):
                i = ti * BLOCK_Q + in_rows
                acc += tl.load(rows_ptr + b * lse_b + h * lse_h + (q_first + i) * lse_l, mask=i < length, other=0.0)
    plane = (tl.cast(own_b, tl.int64) * bias_heads + own_h) * bias_rows
    i = tl.cast(tile_i, tl.int64) * BLOCK_Q + in_rows
    if ALL_ROWS:
        tl.store(dbias_ptr + plane, tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty))
    else:
        tl.store(dbias_ptr + plane + i, acc.to(dbias_ptr.dtype.element_ty), mask=i < bias_rows)
