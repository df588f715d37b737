"""Decoding: a few queries over a cache of keys and values, cut into parts that are merged in order.

A program owns the query rows that share a key head (the queries of all its query heads) and one part of the keys, so
the cache is read once. Its sums (out, largest logit, total) go to float32 scratch memory; a second kernel adds the
parts up in order. One part alone is written at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_tiles as tiles_of
from . import _lib
from .checks import report

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finished(m, l):
    """(factor of the output, lse) of rows with the largest logit m and the total l, in powers of two."""
    alone = l == 0.0
    safe = tl.where(alone, 1.0, l)
    exact = (m.to(tl.float64) + tl.log2(safe).to(tl.float64)) * LN2
    return tl.where(alone, 0.0, 1.0 / safe), tl.where(alone, -float("inf"), exact.to(tl.float32))


@triton.jit
def key_rows(x, offset, kv, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a cache at these offsets; 0 where there is none."""
    column = tl.arange(0, BLOCK)
    ptrs = (x.ptr + kv * x.h) + offset[:, None] + column[None, :]
    if SIZE == BLOCK:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit(do_not_specialize=("what",))
def attention_decode_kernel(
    q, k, v, out, lse_ptr, part_ptr, top_ptr, total_ptr, lengths_ptr, table, sinks_ptr, slopes, record_ptr, numbers,
    cache, what, heads, group, lq, row_tiles, splits, left,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse; with parts (part_ptr) the sums of each. what: the code of the lengths, of the table's blocks one
    more; one key head of each sequence reports what is wrong."""
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    owner = tl.program_id(0) // row_tiles
    split = tl.program_id(1)
    b = tl.cast(owner // (heads // group), tl.int64)
    kv = tl.cast(owner % (heads // group), tl.int64)
    row = tl.program_id(0) % row_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = row < group * lq
    i = row % lq
    h = (kv * group + row // lq).to(tl.int64)
    length = cache.limit
    if lengths_ptr is not None:
        given = tl.load(lengths_ptr + b).to(tl.int64)
        wrong = (given < 0) | (given > cache.limit)
        length = tl.where(wrong, 0, given).to(tl.int32)
        if record_ptr is not None:
            told = wrong & (kv == 0) & (split == 0)
            if told:
                report(record_ptr, what, b, given, cache.limit + 1, 0)
    place = length - lq + i
    begin = 0
    if left is not None:
        begin = tl.maximum(length - lq - left, 0)
    keys = tl.maximum(length - begin, 0)
    each = tl.cdiv(tl.cdiv(keys, splits), BLOCK_K) * BLOCK_K
    first = begin + split * each
    last = tl.minimum(first + each, length)

    from_query = q.ptr + b * q.b + h * q.h + i * q.l
    column = tl.arange(0, BLOCK_D)
    q_tile = tl.load(from_query[:, None] + column[None, :], mask=exists[:, None] & (column < D)[None, :], other=0.0)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    if sinks_ptr is not None:
        counted = exists & (split == 0)  # once
        m = tl.load(sinks_ptr + h, mask=counted, other=-float("inf")).to(tl.float32) * _lib.LOG2E
        l = tl.where(m == -float("inf"), 0.0, 1.0)
    slope = tl.zeros((BLOCK_Q,), tl.float32)
    if slopes is not None:
        slope = tl.load(slopes.ptr + b * slopes.b + h, mask=exists, other=0.0) * _lib.LOG2E
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    for start in tl.range(first, last, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        inside = j < last
        where = j.to(tl.int64)
        block = b
        if table is not None:
            block = tl.load(table.ptr + b * table.b + j // cache.block_size, mask=inside, other=0).to(tl.int64)
            valid = (block >= 0) & (block < cache.blocks)
            if record_ptr is not None:
                width = cache.limit // cache.block_size
                first_wrong = tl.min(tl.where(inside & (valid == 0), j // cache.block_size, width), 0)
                if (first_wrong < width) & (kv == 0):
                    value = tl.load(table.ptr + b * table.b + first_wrong).to(tl.int64)
                    report(record_ptr, what + 1, b * width + first_wrong, value, cache.blocks, 0)
            inside = inside & valid
            where = (j % cache.block_size).to(tl.int64)
        k_tile = key_rows(k, block * k.b + where * k.l, kv, inside, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = tiles_of.scaled(s, numbers, PRECISE)
        if slopes is not None:
            s -= slope[:, None] * tl.abs(place[:, None] - j[None, :]).to(tl.float32)
        allowed = inside[None, :] & (j[None, :] <= place[:, None])
        if left is not None:
            allowed = allowed & (j[None, :] >= place[:, None] - left)
        s = tl.where(allowed, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen so far: exp2(-inf - 0), not NaN
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, 1)
        v_tile = key_rows(v, block * v.b + where * v.l, kv, inside, DV, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    line = (b * heads + h) * lq + i
    columns = tl.arange(0, BLOCK_DV)
    stored = exists[:, None] & (columns < DV)[None, :]
    if part_ptr is None:
        factor, lse = finished(m, l)
        tl.store(lse_ptr + line, lse, mask=exists)
        to = out.ptr + b * out.b + h * out.h + i * out.l
        tl.store(to[:, None] + columns[None, :], (acc * factor[:, None]).to(out.ptr.dtype.element_ty), mask=stored)
    else:
        part = line * splits + split
        tl.store(top_ptr + part, m, mask=exists)
        tl.store(total_ptr + part, l, mask=exists)
        tl.store(part_ptr + (part * DV)[:, None] + columns[None, :], acc, mask=stored)


@triton.jit
def attention_decode_merge_kernel(
    part_ptr, top_ptr, total_ptr, out, lse_ptr, heads, lq, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A program for each query of each head: its parts, in order."""
    line = tl.program_id(0).to(tl.int64)
    own = line * splits + tl.arange(0, SPLITS)
    real = tl.arange(0, SPLITS) < splits
    m = tl.load(top_ptr + own, mask=real, other=-float("inf"))
    top = tl.max(m, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(m - base) * tl.load(total_ptr + own, mask=real, other=0.0), 0)
    column = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for s in tl.range(0, splits):
        part = tl.load(part_ptr + (line * splits + s) * DV + column, mask=column < DV, other=0.0)
        acc += part * tl.exp2(tl.load(top_ptr + line * splits + s) - base)
    factor, lse = finished(top, total)
    tl.store(lse_ptr + line, lse)
    i = line % lq
    h = line // lq % heads
    b = line // lq // heads
    to = out.ptr + b * out.b + h * out.h + i * out.l
    tl.store(to + column, (acc * factor).to(out.ptr.dtype.element_ty), mask=column < DV)
