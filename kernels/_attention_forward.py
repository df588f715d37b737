"""The forward kernel of attention: one program for each tile of queries, online softmax over the keys it may see."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_tiles as tiles_of
from . import _lib

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lse_low_ptr, sinks_ptr,
    out_b, out_h, out_l, lse_b, lse_h, lse_l,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    bias_ptr, bias_b, bias_h, bias_i, bias_j, mask_ptr, mask_b, mask_h, mask_i, mask_j,
    seen_ptr, seen_b, seen_h, seen_j, span_ptr, span_b, span_h, prefix_ptr, slopes_ptr, slopes_b,
    cu_q_ptr, cu_k_ptr, seed_ptr, tiles, heads, group, batch, lq, lk, max_q, max_k,
    left, right, scale, softcap, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, PLAIN: tl.constexpr,
    TOP_LEFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, SEEN: tl.constexpr, LOWEST: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SINKS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """out, and lse with what its rounding leaves out.

    `scale` gives logits in powers of two; with SOFTCAP it gives the argument of tanh, and `softcap` the rest.
    PLAIN: the logits are the products times a positive scale, which then enters the exponent in one fused
    multiply-add instead of a multiplication for each product.
    """
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
    q = tiles_of.rows(q_ptr, i0, q_l, in_tile, 0, lq, None, 0, D, BLOCK_D, True, False)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * _lib.LOG2E
        m = tl.full((BLOCK_Q,), 0.0, tl.float32) + sink
        l = tl.where(m == -float("inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
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
            k = tiles_of.rows(k_ptr, n, k_l, columns, seen_begin, seen_end, seen_ptr, seen_j, D, BLOCK_D, MASKED, SEEN)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if SOFTCAP:
                s = softcap * _lib.tanh(s * scale, PRECISE)
            elif not PLAIN:
                s = s * scale
            s = tiles_of.add_and_mask(
                s, i[:, None], (n + columns)[None, :], lq, lk, seen_begin, seen_end, shift, left, right, prefix, slope,
                bias_ptr, bias_i, bias_j, mask_ptr, mask_i, mask_j, seen_ptr, seen_j,
                MASKED, LEFT, RIGHT, PREFIX, ALIBI, BIAS, MASK, SEEN, LOWEST,
            )  # fmt: skip
            highest = tl.max(s, 1)
            if PLAIN:
                highest = highest * scale
            m_new = tl.maximum(m, highest)
            base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen so far: exp2(-inf - 0), not NaN
            if PLAIN:
                p = tl.exp2(s * scale - base[:, None])
            else:
                p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, 1)
            if DROPOUT:
                keep = tiles_of.kept(seed, threshold, counter, i[:, None], (n + columns)[None, :], lk)
                p = tl.where(keep, p, 0.0)
            acc = acc * alpha[:, None]
            v = tiles_of.rows(
                v_ptr, n, v_l, columns, seen_begin, seen_end, seen_ptr, seen_j, DV, BLOCK_DV, MASKED, SEEN
            )
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            m = m_new

    alone = l == 0.0
    factor = 1.0 / tl.where(alone, 1.0, l)
    if DROPOUT:
        factor = factor * keep_scale
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    exact = (m.to(tl.float64) + tl.log2(tl.where(alone, 1.0, l)).to(tl.float64)) * LN2
    lse = tl.where(alone, -float("inf"), exact.to(tl.float32))
    low = (exact - lse.to(tl.float64)).to(tl.float32)
    low = tl.where(tl.abs(lse) < float("inf"), low, 0.0)
    row = q_first + i
    column = tl.arange(0, BLOCK_DV)
    exists = i < lq
    at = b * lse_b + h * lse_h + row * lse_l
    tl.store(lse_ptr + at, lse, mask=exists)
    tl.store(lse_low_ptr + at, low, mask=exists)
    out_ptrs = out_ptr + b * out_b + h * out_h + (row * out_l)[:, None] + column[None, :]
    tl.store(out_ptrs, out, mask=exists[:, None] & (column < DV)[None, :])
