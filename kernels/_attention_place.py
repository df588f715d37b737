"""What the kernels of attention are given, as tuples, and where a program of theirs stands.

A member that is None does not exist in the compiled kernel, nor do the branches that ask for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import _lib


class Rows(NamedTuple):
    """A tensor (B, H, L) or (B, H, L, D), packed (L, H) or (L, H, D): pointer and strides."""

    ptr: Any
    b: Any
    h: Any
    l: Any


class Plane(NamedTuple):
    """A tensor that broadcasts to (B, H, Lq, Lk): pointer and strides, 0 where it is broadcast."""

    ptr: Any
    b: Any
    h: Any
    i: Any
    j: Any


class Sizes(NamedTuple):
    """group: query heads a key head. lq, lk: lengths; of packed sequences the totals, with the ends in cu_q and cu_k
    and bounds on one sequence's lengths in max_q and max_k."""

    batch: Any
    heads: Any
    group: Any
    lq: Any
    lk: Any
    max_q: Any
    max_k: Any
    cu_q: Any
    cu_k: Any


class Masks(NamedTuple):
    """left, right: of the window; causal is right = 0. seen: uint8 (B, H, Lk), keys that some query may see by what
    the tensors say; span: the first of them and one past the last."""

    left: Any
    right: Any
    prefix: Any
    bias: Any
    mask: Any
    seen: Any
    span: Any
    slopes: Any
    last: Any = None  #: inside loops Triton 3.6 forgets strides of 1 in members, unless a member that is None follows


class Numbers(NamedTuple):
    """scale gives logits in powers of two; with softcap the argument of tanh, and softcap the rest."""

    scale: Any
    softcap: Any
    seed: Any
    threshold: Any
    keep_scale: Any


class Here(NamedTuple):
    """One sequence and head: lengths, first query and key in a packed tensor, dropout counter of weight (0, 0); query i
    stands at key i + shift, and [begin, end) holds all keys that some query sees: what lies outside may be anything,
    even NaN. Pointers of the masks at this sequence and head."""

    b: Any
    h: Any
    lq: Any
    lk: Any
    q_first: Any
    k_first: Any
    counter: Any
    seed: Any
    shift: Any
    prefix: Any
    begin: Any
    end: Any
    slope: Any
    bias_ptr: Any
    mask_ptr: Any
    seen_ptr: Any


@triton.jit
def at(rows, b, h, first):
    """`rows` from row `first` of this sequence and head on."""
    return Rows(rows.ptr + b * rows.b + h * rows.h + first * rows.l, rows.b, rows.h, rows.l)


@triton.jit
def here(b, h, size, masks, numbers, TOP_LEFT: tl.constexpr, SEQUENCES: tl.constexpr):
    """Where head h of sequence b is. SEQUENCES: the number of packed sequences, up to a power of two; else 0.

    Whatever the ends of packed sequences hold, lengths stay within the totals; a sequence that does not exist is empty.
    """
    if SEQUENCES == 0:
        lq = size.lq
        lk = size.lk
        q_first = tl.cast(0, tl.int64)
        k_first = tl.cast(0, tl.int64)
        counter = (tl.cast(b, tl.int64) * size.heads + h) * lq * lk
    else:
        n, q_firsts, k_firsts, q_lengths, k_lengths = lengths(size, SEQUENCES)
        length_q = tl.sum(tl.where(n == b, q_lengths, 0), 0)
        length_k = tl.sum(tl.where(n == b, k_lengths, 0), 0)
        pairs = tl.sum(tl.where(n < b, q_lengths * k_lengths, 0), 0)
        lq = length_q.to(tl.int32)
        lk = length_k.to(tl.int32)
        q_first = tl.sum(tl.where(n == b, q_firsts, 0), 0)
        k_first = tl.sum(tl.where(n == b, k_firsts, 0), 0)
        counter = pairs * size.heads + h * length_q * length_k
    b = tl.minimum(b, size.batch - 1)
    shift = 0 if TOP_LEFT else lk - lq
    prefix = 0
    begin = 0
    end = lk
    seed = 0
    slope = 0.0
    bias_ptr = 0  # not None, which Triton 3.6 returns from no function
    mask_ptr = 0
    seen_ptr = 0
    if masks.left is not None:
        begin = tl.maximum(begin, shift - masks.left)
    if masks.right is not None:
        end = tl.minimum(end, lq + shift + masks.right)
    if masks.prefix is not None:
        prefix = tl.minimum(tl.load(masks.prefix + b), lk).to(tl.int32)
        end = tl.minimum(end, tl.maximum(lq + shift, prefix))
    if masks.seen is not None:
        seen_ptr = masks.seen.ptr + b * masks.seen.b + h * masks.seen.h
        span_ptr = masks.span.ptr + b * masks.span.b + h * masks.span.h
        begin = tl.maximum(begin, tl.load(span_ptr))
        end = tl.minimum(end, tl.load(span_ptr + 1))
    if numbers.seed is not None:
        seed = tl.load(numbers.seed)
    if masks.slopes is not None:
        slope = tl.load(masks.slopes.ptr + b * masks.slopes.b + h) * _lib.LOG2E
    if masks.bias is not None:
        bias_ptr = masks.bias.ptr + b * masks.bias.b + h * masks.bias.h
    if masks.mask is not None:
        mask_ptr = masks.mask.ptr + b * masks.mask.b + h * masks.mask.h
    return Here(
        b, h, lq, lk, q_first, k_first, counter, seed, shift, prefix, begin, end, slope, bias_ptr, mask_ptr, seen_ptr
    )


@triton.jit
def lengths(size, SEQUENCES: tl.constexpr):
    """(number, first query, first key, queries, keys) of every packed sequence."""
    n = tl.arange(0, SEQUENCES)
    exists = n < size.batch
    q_first = tl.maximum(tl.load(size.cu_q + n, mask=exists, other=0), 0)
    k_first = tl.maximum(tl.load(size.cu_k + n, mask=exists, other=0), 0)
    q_last = tl.minimum(tl.load(size.cu_q + n + 1, mask=exists, other=0), size.lq)
    k_last = tl.minimum(tl.load(size.cu_k + n + 1, mask=exists, other=0), size.lk)
    q_lengths = tl.minimum(tl.maximum(q_last - q_first, 0), size.max_q)
    k_lengths = tl.minimum(tl.maximum(k_last - k_first, 0), size.max_k)
    return n, q_first, k_first, q_lengths, k_lengths


@triton.jit
def locate(tiles, size, OF_KEYS: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr):
    """(tile, b, h) of a program on one axis. REVERSE starts with the last tiles: under a causal mask they take longest.

    With packed sequences the grid is an upper bound (a tile more for each sequence), and every program finds its
    sequence from the ends: no length has to be known on the host.
    """
    pid = tl.program_id(0)
    own = pid % tiles
    if REVERSE:
        own = tiles - 1 - own
    if SEQUENCES == 0:
        bh = pid // tiles
        return own, tl.cast(bh // size.heads, tl.int64), tl.cast(bh % size.heads, tl.int64)
    else:
        n, _, _, q_lengths, k_lengths = lengths(size, SEQUENCES)
        if OF_KEYS:
            counts = (k_lengths + (TILE - 1)) // TILE
        else:
            counts = (q_lengths + (TILE - 1)) // TILE
        b = tl.sum((tl.cumsum(counts, 0) <= own).to(tl.int32), 0)
        tile = own - tl.sum(tl.where(n < b, counts, 0), 0)
        return tile.to(tl.int32), tl.cast(b, tl.int64), tl.cast(pid // tiles, tl.int64)
