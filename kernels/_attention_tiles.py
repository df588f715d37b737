"""Which tile of which sequence a program owns, which tiles it has to visit, and what becomes of a tile of products.

A tile is full where every query in it may see every key by position: no comparison is made there, and no edge of a
tensor is near. Tiles that the masks by position (causal, window, prefix, and the ends of the keys that are seen at all)
leave nothing of are not visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _lib


@triton.jit
def sequence(
    b, h, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """(lq, lk, first query, first key, dropout counter of weight (0, 0)) of sequence b, head h.

    With packed sequences (SEQUENCES: their number, up to a power of two; else 0) lq and lk come as the totals. Whatever
    the ends hold, the lengths stay within the totals; a sequence that does not exist is empty.
    """
    if SEQUENCES == 0:
        zero = tl.cast(0, tl.int64)
        return lq, lk, zero, zero, (tl.cast(b, tl.int64) * heads + h) * lq * lk
    else:
        n, q_first, k_first, q_lengths, k_lengths = _lengths(batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES)
        length_q = tl.sum(tl.where(n == b, q_lengths, 0), 0)
        length_k = tl.sum(tl.where(n == b, k_lengths, 0), 0)
        pairs = tl.sum(tl.where(n < b, q_lengths * k_lengths, 0), 0)
        return (
            length_q.to(tl.int32),
            length_k.to(tl.int32),
            tl.sum(tl.where(n == b, q_first, 0), 0),
            tl.sum(tl.where(n == b, k_first, 0), 0),
            pairs * heads + h * length_q * length_k,
        )


@triton.jit
def _lengths(batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES: tl.constexpr):
    n = tl.arange(0, SEQUENCES)
    exists = n < batch
    q_first = tl.maximum(tl.load(cu_q_ptr + n, mask=exists, other=0), 0)
    k_first = tl.maximum(tl.load(cu_k_ptr + n, mask=exists, other=0), 0)
    q_last = tl.minimum(tl.load(cu_q_ptr + n + 1, mask=exists, other=0), lq)
    k_last = tl.minimum(tl.load(cu_k_ptr + n + 1, mask=exists, other=0), lk)
    q_lengths = tl.minimum(tl.maximum(q_last - q_first, 0), max_q)
    k_lengths = tl.minimum(tl.maximum(k_last - k_first, 0), max_k)
    return n, q_first, k_first, q_lengths, k_lengths


@triton.jit
def locate(
    pid, tiles, heads, batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr,
    OF_KEYS: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """(tile, b, h) of a program on one axis. REVERSE starts with the last tiles: under a causal mask they take longest.

    With packed sequences the grid is an upper bound (a tile more for each sequence), and every program finds its
    sequence from the ends: no length has to be known on the host.
    """
    own = pid % tiles
    if REVERSE:
        own = tiles - 1 - own
    if SEQUENCES == 0:
        bh = pid // tiles
        return own, tl.cast(bh // heads, tl.int64), tl.cast(bh % heads, tl.int64)
    else:
        n, _, _, q_lengths, k_lengths = _lengths(batch, lq, lk, max_q, max_k, cu_q_ptr, cu_k_ptr, SEQUENCES)
        if OF_KEYS:
            counts = (k_lengths + (TILE - 1)) // TILE
        else:
            counts = (q_lengths + (TILE - 1)) // TILE
        b = tl.sum((tl.cumsum(counts, 0) <= own).to(tl.int32), 0)
        tile = own - tl.sum(tl.where(n < b, counts, 0), 0)
        return tile.to(tl.int32), tl.cast(b, tl.int64), tl.cast(pid // tiles, tl.int64)


@triton.jit
def limits(
    b, h, lq, lk, left, right, prefix_ptr, span_ptr, span_b, span_h,
    TOP_LEFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """(shift, prefix, seen_begin, seen_end): query i stands at key i + shift, and [seen_begin, seen_end) holds all keys
    that some query sees. What lies outside may be anything, even NaN."""
    shift = 0 if TOP_LEFT else lk - lq
    prefix = 0
    begin = 0
    end = lk
    if LEFT:
        begin = tl.maximum(begin, shift - left)
    if RIGHT:
        end = tl.minimum(end, lq + shift + right)
    if PREFIX:
        prefix = tl.minimum(tl.load(prefix_ptr + b), lk).to(tl.int32)
        end = tl.minimum(end, tl.maximum(lq + shift, prefix))
    if SEEN:
        begin = tl.maximum(begin, tl.load(span_ptr + b * span_b + h * span_h))
        end = tl.minimum(end, tl.load(span_ptr + b * span_b + h * span_h + 1))
    return shift, prefix, begin, end


@triton.jit
def key_tiles(
    i0, i1, seen_begin, seen_end, shift, left, right, prefix, edge,
    TILE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """For queries [i0, i1): the keys [full_begin, full_end) are in full tiles; then the masked ones: `first` tiles from
    `begin`, then others from full_end on, `masked` in all. edge: no tile is full."""
    begin = seen_begin
    end = seen_end
    full_begin = seen_begin
    full_end = seen_end
    if LEFT:
        begin = tl.maximum(begin, i0 + shift - left)
        full_begin = tl.maximum(full_begin, i1 - 1 + shift - left)
    if RIGHT:
        end = tl.minimum(end, i1 + shift + right)
        full_end = tl.minimum(full_end, i0 + 1 + shift + right)
    if PREFIX:
        end = tl.minimum(end, tl.maximum(i1 + shift, prefix))
        full_end = tl.minimum(full_end, tl.maximum(i0 + 1 + shift, prefix))
    return _split(begin, end, full_begin, full_end, edge, TILE)


@triton.jit
def query_tiles(
    j0, j1, lq, seen_begin, seen_end, shift, left, right, prefix, edge,
    TILE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """`key_tiles` the other way round: which queries see keys [j0, j1)."""
    begin = 0
    end = lq
    full_begin = 0
    full_end = lq
    if RIGHT:
        begin = tl.maximum(begin, j0 - shift - right)
        full_begin = tl.maximum(full_begin, j1 - 1 - shift - right)
    if PREFIX:
        begin = tl.maximum(begin, tl.where(j0 < prefix, 0, j0 - shift))
        full_begin = tl.maximum(full_begin, tl.where(j1 <= prefix, 0, j1 - 1 - shift))
    if LEFT:
        end = tl.minimum(end, j1 - shift + left)
        full_end = tl.minimum(full_end, j0 + 1 - shift + left)
    end = tl.where((j0 < seen_end) & (j1 > seen_begin), end, 0)
    return _split(begin, end, full_begin, full_end, edge, TILE)


@triton.jit
def _split(begin, end, full_begin, full_end, edge, TILE: tl.constexpr):
    begin = tl.maximum(begin, 0) // TILE * TILE
    full_begin = (tl.maximum(full_begin, 0) + (TILE - 1)) // TILE * TILE
    full_end = tl.maximum(tl.minimum(full_end, end), 0) // TILE * TILE
    nothing = (full_end <= full_begin) | edge
    full_begin = tl.where(nothing, begin, full_begin)
    full_end = tl.where(nothing, begin, full_end)
    first = (full_begin - begin) // TILE
    masked = first + (tl.maximum(end - full_end, 0) + (TILE - 1)) // TILE
    return begin, full_begin, full_end, first, masked


@triton.jit
def masked_tile(t, begin, full_end, first, TILE: tl.constexpr):
    """Where masked tile number t starts. One loop over both edges: with a third loop the accumulators spill."""
    return tl.where(t < first, begin + t * TILE, full_end + (t - first) * TILE)


@triton.jit
def rows(
    ptr, start, stride, n, low, high, seen_ptr, seen_j,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """Rows start + n of a matrix with SIZE columns, padded to BLOCK with 0; 0 too for rows outside [low, high) and for
    keys that are not seen, which may be NaN."""
    column = tl.arange(0, BLOCK)
    ptrs = (ptr + tl.cast(start, tl.int64) * stride) + (n.to(tl.int64) * stride)[:, None] + column[None, :]
    index = start + n.to(tl.int64)
    if MASKED:
        inside = (index >= low) & (index < high)
        if SEEN:
            inside = inside & (tl.load(seen_ptr + index * seen_j, mask=inside, other=0) != 0)
        if SIZE == BLOCK:
            return tl.load(ptrs, mask=inside[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)
    else:
        if SEEN:
            inside = tl.load(seen_ptr + index * seen_j) != 0
            if SIZE == BLOCK:
                return tl.load(ptrs, mask=inside[:, None], other=0.0)
            else:
                return tl.load(ptrs, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)
        else:
            if SIZE == BLOCK:
                return tl.load(ptrs)
            else:
                return tl.load(ptrs, mask=(column < SIZE)[None, :], other=0.0)


@triton.jit
def add_and_mask(
    t, i, j, lq, lk, seen_begin, seen_end, shift, left, right, prefix, slope,
    bias_ptr, bias_i, bias_j, mask_ptr, mask_i, mask_j, seen_ptr, seen_j,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, SEEN: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Logits in powers of two: t plus ALiBi and bias where query i may see key j, else -inf.

    i and j are index vectors that broadcast to t, in either order: the same lines serve a tile and its transpose.
    In a tile that is MASKED indices may lie outside; they are clamped, and what they read is not used.
    """
    if ALIBI:
        t -= slope * tl.abs(i + shift - j).to(tl.float32)
    row = i.to(tl.int64)
    column = j.to(tl.int64)
    if MASKED:
        row = tl.minimum(row, lq - 1)
        column = tl.minimum(column, lk - 1)
    if BIAS:
        bias = tl.load(bias_ptr + row * bias_i + column * bias_j).to(tl.float32)
        t = tl.where(bias <= LOWEST, -float("inf"), t + bias * _lib.LOG2E)
    if MASK:
        t = tl.where(tl.load(mask_ptr + row * mask_i + column * mask_j) != 0, t, -float("inf"))
    if SEEN:
        t = tl.where(tl.load(seen_ptr + column * seen_j) != 0, t, -float("inf"))
    if MASKED:
        allowed = (j >= seen_begin) & (j < seen_end) & (i < lq)
        if LEFT:
            allowed = allowed & (j >= i + (shift - left))
        if RIGHT:
            allowed = allowed & (j <= i + (shift + right))
        if PREFIX:
            allowed = allowed & ((j <= i + shift) | (j < prefix))
        t = tl.where(allowed, t, -float("inf"))
    return t


@triton.jit
def kept(seed, threshold, counter, i, j, lk):
    """Whether dropout keeps weight (i, j); counter is the row-major index of weight (0, 0)."""
    return _lib.philox_word(seed, counter + i.to(tl.int64) * lk + j) >= threshold
