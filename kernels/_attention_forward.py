"""The forward kernel of attention: one program for each tile of queries, online softmax over the keys it may see."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_place as places
from . import _attention_tiles as tiles_of
from . import _lib

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attention_fwd_kernel(
    q, k, v, q_desc, k_desc, v_desc, out, lse, lse_low_ptr, sinks_ptr, tiles, size, masks, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, PLAIN: tl.constexpr,
    TOP_LEFT: tl.constexpr, LOWEST: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """out, and lse with what its rounding leaves out.

    PLAIN: the logits are the products times a positive scale, which then enters the exponent in one fused
    multiply-add instead of a multiplication for each product.
    """
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    tile, b, h = places.locate(
        tiles, size, False, masks.right is not None or masks.prefix is not None, BLOCK_Q, SEQUENCES
    )
    place = places.here(b, h, size, masks, numbers, TOP_LEFT, SEQUENCES)
    q = places.at(q, place.b, place.h, place.q_first)
    k = places.at(k, place.b, place.h // size.group, place.k_first)
    v = places.at(v, place.b, place.h // size.group, place.k_first)
    out = places.at(out, place.b, place.h, place.q_first)

    i0 = tile * BLOCK_Q
    i = i0 + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    q_tile = tiles_of.queries(q, q_desc, place, i0, D, BLOCK_Q, BLOCK_D, True)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + place.h).to(tl.float32) * _lib.LOG2E
        m = tl.full((BLOCK_Q,), 0.0, tl.float32) + sink
        l = tl.where(m == -float("inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    edge = (masks.bias is not None or masks.mask is not None) and i0 + BLOCK_Q > place.lq
    begin, full_begin, full_end, first, masked = tiles_of.key_tiles(
        i0, tl.minimum(i0 + BLOCK_Q, place.lq), place, masks, edge, BLOCK_K
    )
    for MASKED in tl.static_range(2):
        for t in tl.range(0, masked if MASKED else (full_end - full_begin) // BLOCK_K):
            n = tiles_of.tile_start(t, begin, full_begin, full_end, first, BLOCK_K, MASKED)
            k_tile = tiles_of.keys(k, k_desc, place, masks, size.group, n, D, BLOCK_K, BLOCK_D, MASKED)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if not PLAIN:
                s, _ = tiles_of.scaled(s, numbers, PRECISE)
            s = tiles_of.add_and_mask(s, i[:, None], (n + columns)[None, :], place, masks, MASKED, LOWEST)
            highest = tl.max(s, 1)
            if PLAIN:
                highest = highest * numbers.scale
            m_new = tl.maximum(m, highest)
            base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen so far: exp2(-inf - 0), not NaN
            if PLAIN:
                p = tl.exp2(s * numbers.scale - base[:, None])
            else:
                p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, 1)
            if numbers.seed is not None:
                p = tl.where(tiles_of.kept(i[:, None], (n + columns)[None, :], place, numbers), p, 0.0)
            acc = acc * alpha[:, None]
            v_tile = tiles_of.keys(v, v_desc, place, masks, size.group, n, DV, BLOCK_K, BLOCK_DV, MASKED)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
            m = m_new

    alone = l == 0.0
    factor = 1.0 / tl.where(alone, 1.0, l)
    if numbers.seed is not None:
        factor = factor * numbers.keep_scale
    exact = (m.to(tl.float64) + tl.log2(tl.where(alone, 1.0, l)).to(tl.float64)) * LN2
    rounded = tl.where(alone, -float("inf"), exact.to(tl.float32))
    low = (exact - rounded.to(tl.float64)).to(tl.float32)
    low = tl.where(tl.abs(rounded) < float("inf"), low, 0.0)
    exists = i < place.lq
    at = place.b * lse.b + place.h * lse.h + (place.q_first + i) * lse.l
    tl.store(lse.ptr + at, rounded, mask=exists)
    tl.store(lse_low_ptr + at, low, mask=exists)
    tiles_of.write(out, acc * factor[:, None], i, exists, DV, BLOCK_DV)
