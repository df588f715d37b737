"""The backward kernels of attention: one that owns queries (dq), one that owns keys (dk, dv). No atomics: repeatable.

Both make the probabilities again from the log-sum-exp. dk and dv are made for each query head, and summed over the
heads that share a key head afterwards: with a loop over those heads inside, the two accumulators spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_tiles as tiles_of
from . import _lib


@triton.jit
def attention_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, lse_low_ptr, dlse_ptr, base_ptr, delta_ptr, rows, heads, length,
    dout_b, dout_h, dout_l, out_b, out_h, out_l, dlse_b, dlse_h, dlse_l, lse_b, lse_h, lse_l,
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
    dout = tl.load(
        dout_ptr + (b * dout_b + h * dout_h + i * dout_l)[:, None] + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    out = tl.load(out_ptr + (b * out_b + h * out_h + i * out_l)[:, None] + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    dlse = tl.load(dlse_ptr + b * dlse_b + h * dlse_h + i * dlse_l, mask=exists, other=0.0)
    at = b * lse_b + h * lse_h + i * lse_l
    lse = tl.load(lse_ptr + at, mask=exists, other=0.0)
    low = tl.load(lse_low_ptr + at, mask=exists, other=0.0)
    base = ((lse.to(tl.float64) + low.to(tl.float64)) * 1.4426950408889634).to(tl.float32)
    tl.store(delta_ptr + at, tl.sum(dout * out, 1) - dlse, mask=exists)
    tl.store(base_ptr + at, tl.where(lse == -float("inf"), float("inf"), base), mask=exists)


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, base_ptr, delta_ptr, dq_ptr,
    dout_b, dout_h, dout_l, lse_b, lse_h, lse_l, dq_b, dq_h, dq_l, dq_scale,
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
):  # fmt: skip
    """dq = scale * sum_j ds_ij k_j, ds = p * (dropout(<dout, v>) - delta), times the slope of the cap."""
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tile, b, h = tiles_of.locate(
        tl.program_id(0), tiles, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr,
        False, RIGHT or PREFIX, BLOCK_Q, SEQUENCES,
    )  # fmt: skip
    lq, lk, q_first, k_first, counter = tiles_of.sequence(
        b, h, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES
    )
    b = tl.minimum(b, batch - 1)
    shift, prefix, seen_begin, seen_end = tiles_of.limits(
        b, h, lq, lk, left, right, prefix_ptr, span_ptr, span_b, span_h, TOP_LEFT, LEFT, RIGHT, PREFIX, SEEN
    )
    q_ptr += b * q_b + h * q_h + q_first * q_l
    k_ptr += b * k_b + h // group * k_h + k_first * k_l
    v_ptr += b * v_b + h // group * v_h + k_first * v_l
    dout_ptr += b * dout_b + h * dout_h + q_first * dout_l
    slope = 0.0
    seed = 0
    if ALIBI:
        slope = tl.load(slopes_ptr + b * slopes_b + h) * _lib.LOG2E
    if BIAS:
        bias_ptr += b * bias_b + h * bias_h
    if MASK:
        mask_ptr += b * mask_b + h * mask_h
    if SEEN:
        seen_ptr += b * seen_b + h * seen_h
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.cast(threshold, tl.uint32)

    i0 = tile * BLOCK_Q
    in_tile = tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    i = i0 + in_tile
    exists = i < lq
    at = b * lse_b + h * lse_h + (q_first + i) * lse_l
    q = tiles_of.rows(q_ptr, i0, q_l, in_tile, 0, lq, None, 0, D, BLOCK_D, True, False)
    dout = tiles_of.rows(dout_ptr, i0, dout_l, in_tile, 0, lq, None, 0, DV, BLOCK_DV, True, False)
    base = tl.load(base_ptr + at, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=exists, other=0.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    edge = (BIAS or MASK) and i0 + BLOCK_Q > lq
    begin, full_begin, full_end, first, masked = tiles_of.key_tiles(
        i0, tl.minimum(i0 + BLOCK_Q, lq), seen_begin, seen_end, shift, left, right, prefix, edge,
        BLOCK_K, LEFT, RIGHT, PREFIX,
    )  # fmt: skip
    for MASKED in tl.static_range(2):
        if MASKED:
            count = masked
        else:
            count = (full_end - full_begin) // BLOCK_K
        for t in tl.range(0, count):
            if MASKED:
                n = tiles_of.masked_tile(t, begin, full_end, first, BLOCK_K)
            else:
                n = full_begin + t * BLOCK_K
            n = tl.multiple_of(n, BLOCK_K)
            j = n + columns
            k = tiles_of.rows(k_ptr, n, k_l, columns, seen_begin, seen_end, seen_ptr, seen_j, D, BLOCK_D, MASKED, SEEN)
            v = tiles_of.rows(
                v_ptr, n, v_l, columns, seen_begin, seen_end, seen_ptr, seen_j, DV, BLOCK_DV, MASKED, SEEN
            )
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if SOFTCAP:
                u = _lib.tanh(s, PRECISE)
                s = softcap * u
            s = tiles_of.add_and_mask(
                s, i[:, None], j[None, :], lq, lk, seen_begin, seen_end, shift, left, right, prefix, slope,
                bias_ptr, bias_i, bias_j, mask_ptr, mask_i, mask_j, seen_ptr, seen_j,
                MASKED, LEFT, RIGHT, PREFIX, ALIBI, BIAS, MASK, SEEN, LOWEST,
            )  # fmt: skip
            p = tl.exp2(s - base[:, None])
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = tiles_of.kept(seed, threshold, counter, i[:, None], j[None, :], lk)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if SOFTCAP:
                ds = ds * (1.0 - u * u)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    column = tl.arange(0, BLOCK_D)
    dq_ptrs = dq_ptr + b * dq_b + h * dq_h + ((q_first + i) * dq_l)[:, None] + column[None, :]
    dq = (dq * dq_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptrs, dq, mask=exists[:, None] & (column < D)[None, :])


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, base_ptr, delta_ptr, dk_ptr, dv_ptr,
    dout_b, dout_h, dout_l, lse_b, lse_h, lse_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, dk_scale,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    bias_ptr, bias_b, bias_h, bias_i, bias_j, mask_ptr, mask_b, mask_h, mask_i, mask_j,
    seen_ptr, seen_b, seen_h, seen_j, span_ptr, span_b, span_h, prefix_ptr, slopes_ptr, slopes_b,
    cu_q_ptr, cu_k_ptr, seed_ptr, tiles, heads, group, batch, lq, lk, max_q, max_k,
    left, right, scale, softcap, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TOP_LEFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, SEEN: tl.constexpr, LOWEST: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SEQUENCES: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """dv = sum_i dropout(p_ij) dout_i and dk = scale * sum_i ds_ij q_i of one query head, on transposed tiles: keys are
    rows, so that both sums are accumulated in place. NEED_K, NEED_V: one of them can be made alone."""
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tile, b, h = tiles_of.locate(
        tl.program_id(0), tiles, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr,
        True, False, BLOCK_K, SEQUENCES,
    )  # fmt: skip
    lq, lk, q_first, k_first, counter = tiles_of.sequence(
        b, h, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES
    )
    b = tl.minimum(b, batch - 1)
    shift, prefix, seen_begin, seen_end = tiles_of.limits(
        b, h, lq, lk, left, right, prefix_ptr, span_ptr, span_b, span_h, TOP_LEFT, LEFT, RIGHT, PREFIX, SEEN
    )
    q_ptr += b * q_b + h * q_h + q_first * q_l
    k_ptr += b * k_b + h // group * k_h + k_first * k_l
    v_ptr += b * v_b + h // group * v_h + k_first * v_l
    dout_ptr += b * dout_b + h * dout_h + q_first * dout_l
    base_ptr += b * lse_b + h * lse_h + q_first * lse_l
    delta_ptr += b * lse_b + h * lse_h + q_first * lse_l
    slope = 0.0
    seed = 0
    if ALIBI:
        slope = tl.load(slopes_ptr + b * slopes_b + h) * _lib.LOG2E
    if BIAS:
        bias_ptr += b * bias_b + h * bias_h
    if MASK:
        mask_ptr += b * mask_b + h * mask_h
    if SEEN:
        seen_ptr += b * seen_b + h * seen_h
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.cast(threshold, tl.uint32)

    j0 = tile * BLOCK_K
    in_tile = tl.arange(0, BLOCK_K)
    in_step = tl.arange(0, BLOCK_Q)
    j = j0 + in_tile
    k = tiles_of.rows(k_ptr, j0, k_l, in_tile, seen_begin, seen_end, seen_ptr, seen_j, D, BLOCK_D, True, SEEN)
    v = tiles_of.rows(v_ptr, j0, v_l, in_tile, seen_begin, seen_end, seen_ptr, seen_j, DV, BLOCK_DV, True, SEEN)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    edge = (BIAS or MASK or SEEN) and j0 + BLOCK_K > lk
    begin, full_begin, full_end, first, masked = tiles_of.query_tiles(
        j0, tl.minimum(j0 + BLOCK_K, lk), lq, seen_begin, seen_end, shift, left, right, prefix, edge,
        BLOCK_Q, LEFT, RIGHT, PREFIX,
    )  # fmt: skip
    for MASKED in tl.static_range(2):
        if MASKED:
            count = masked
        else:
            count = (full_end - full_begin) // BLOCK_Q
        for t in tl.range(0, count):
            if MASKED:
                n = tiles_of.masked_tile(t, begin, full_end, first, BLOCK_Q)
            else:
                n = full_begin + t * BLOCK_Q
            n = tl.multiple_of(n, BLOCK_Q)
            i = n + in_step
            q = tiles_of.rows(q_ptr, n, q_l, in_step, 0, lq, None, 0, D, BLOCK_D, MASKED, False)
            dout = tiles_of.rows(dout_ptr, n, dout_l, in_step, 0, lq, None, 0, DV, BLOCK_DV, MASKED, False)
            if MASKED:
                base = tl.load(base_ptr + i.to(tl.int64) * lse_l, mask=i < lq, other=float("inf"))
                delta = tl.load(delta_ptr + i.to(tl.int64) * lse_l, mask=i < lq, other=0.0)
            else:
                base = tl.load(base_ptr + i.to(tl.int64) * lse_l)
                delta = tl.load(delta_ptr + i.to(tl.int64) * lse_l)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if SOFTCAP:
                u = _lib.tanh(s, PRECISE)
                s = softcap * u
            s = tiles_of.add_and_mask(
                s, i[None, :], j[:, None], lq, lk, seen_begin, seen_end, shift, left, right, prefix, slope,
                bias_ptr, bias_i, bias_j, mask_ptr, mask_i, mask_j, seen_ptr, seen_j,
                MASKED, LEFT, RIGHT, PREFIX, ALIBI, BIAS, MASK, SEEN, LOWEST,
            )  # fmt: skip
            p = tl.exp2(s - base[None, :])
            if DROPOUT:
                keep = tiles_of.kept(seed, threshold, counter, i[None, :], j[:, None], lk)
            if NEED_V:
                if DROPOUT:
                    dropped = tl.where(keep, p * keep_scale, 0.0)
                else:
                    dropped = p
                dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
            if NEED_K:
                dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                if DROPOUT:
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - delta[None, :])
                if SOFTCAP:
                    ds = ds * (1.0 - u * u)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    exists = (j < lk)[:, None]
    if NEED_K:
        column = tl.arange(0, BLOCK_D)
        dk_ptrs = dk_ptr + b * dk_b + h * dk_h + ((k_first + j) * dk_l)[:, None] + column[None, :]
        tl.store(dk_ptrs, (dk * dk_scale).to(dk_ptr.dtype.element_ty), mask=exists & (column < D)[None, :])
    if NEED_V:
        column = tl.arange(0, BLOCK_DV)
        dv_ptrs = dv_ptr + b * dv_b + h * dv_h + ((k_first + j) * dv_l)[:, None] + column[None, :]
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=exists & (column < DV)[None, :])
