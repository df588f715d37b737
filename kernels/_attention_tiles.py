"""Which tiles a program has to visit, how a tile of rows is read, and what becomes of a tile of products.

A tile is full where every query in it may see every key by position: no comparison is made there, and no edge of a
tensor is near. Tiles that the masks by position (causal, window, prefix, and the ends of the keys that are seen at all)
leave nothing of are not visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _lib


@triton.jit
def key_tiles(i0, i1, place, masks, edge, TILE: tl.constexpr):
    """For queries [i0, i1): the keys [full_begin, full_end) are in full tiles; then the masked ones: `first` tiles from
    `begin`, then others from full_end on, `masked` in all. edge: no tile is full."""
    begin = place.begin
    end = place.end
    full_begin = place.begin
    full_end = place.end
    if masks.left is not None:
        begin = tl.maximum(begin, i0 + place.shift - masks.left)
        full_begin = tl.maximum(full_begin, i1 - 1 + place.shift - masks.left)
    if masks.right is not None:
        end = tl.minimum(end, i1 + place.shift + masks.right)
        full_end = tl.minimum(full_end, i0 + 1 + place.shift + masks.right)
    if masks.prefix is not None:
        end = tl.minimum(end, tl.maximum(i1 + place.shift, place.prefix))
        full_end = tl.minimum(full_end, tl.maximum(i0 + 1 + place.shift, place.prefix))
    return _split(begin, end, full_begin, full_end, edge, TILE)


@triton.jit
def query_tiles(j0, j1, place, masks, edge, TILE: tl.constexpr):
    """`key_tiles` the other way round: which queries see keys [j0, j1)."""
    begin = 0
    end = place.lq
    full_begin = 0
    full_end = place.lq
    if masks.right is not None:
        begin = tl.maximum(begin, j0 - place.shift - masks.right)
        full_begin = tl.maximum(full_begin, j1 - 1 - place.shift - masks.right)
    if masks.prefix is not None:
        begin = tl.maximum(begin, tl.where(j0 < place.prefix, 0, j0 - place.shift))
        full_begin = tl.maximum(full_begin, tl.where(j1 <= place.prefix, 0, j1 - 1 - place.shift))
    if masks.left is not None:
        end = tl.minimum(end, j1 - place.shift + masks.left)
        full_end = tl.minimum(full_end, j0 + 1 - place.shift + masks.left)
    end = tl.where((j0 < place.end) & (j1 > place.begin), end, 0)
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
def tile_start(t, begin, full_begin, full_end, first, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Where tile number t of the full or of the masked ones starts. One loop over both masked edges: with a third loop
    the accumulators spill."""
    if MASKED:
        start = tl.where(t < first, begin + t * TILE, full_end + (t - first) * TILE)
    else:
        start = full_begin + t * TILE
    return tl.multiple_of(start, TILE)


@triton.jit
def queries(x, desc, place, start, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows from `start` on of a matrix that has place.lq of them; what does not exist is 0.

    x: `Rows` of this sequence and head; desc: a descriptor of the whole tensor, by which the copy engine fills the
    shared memory without passing registers, or None.
    """
    if desc is not None:
        return _copied(desc, place.h, place, start, ROWS, BLOCK)
    else:
        return _loaded(x, start, 0, place.lq, None, None, SIZE, ROWS, BLOCK, MASKED)


@triton.jit
def keys(
    x, desc, place, masks, group, start,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`queries` for the rows of keys and values: 0 too where no query sees the key, which may be NaN. A descriptor is
    given only where all keys are seen."""
    if desc is not None:
        return _copied(desc, place.h // group, place, start, ROWS, BLOCK)
    else:
        return _loaded(x, start, place.begin, place.end, place.seen_ptr, masks.seen, SIZE, ROWS, BLOCK, MASKED)


@triton.jit
def _copied(desc, head, place, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return desc.load([place.b.to(tl.int32), head.to(tl.int32), start, 0]).reshape(ROWS, BLOCK)


@triton.jit
def _loaded(
    x, start, low, high, seen_ptr, seen,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    ptrs = (x.ptr + tl.cast(start, tl.int64) * x.l) + (n.to(tl.int64) * x.l)[:, None] + column[None, :]
    index = start + n.to(tl.int64)
    if MASKED:
        inside = (index >= low) & (index < high)
        if seen is not None:
            inside = inside & (tl.load(seen_ptr + index * seen.l, mask=inside, other=0) != 0)
        if SIZE == BLOCK:
            return tl.load(ptrs, mask=inside[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)
    elif seen is not None:
        inside = tl.load(seen_ptr + index * seen.l) != 0
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
def scaled(s, numbers, PRECISE: tl.constexpr):
    """(logits in powers of two of the products s, what the cap's slope is made of)."""
    s = s * numbers.scale
    u = s
    if numbers.softcap is not None:
        u = _lib.tanh(s, PRECISE)
        s = numbers.softcap * u
    return s, u


@triton.jit
def add_and_mask(t, i, j, place, masks, MASKED: tl.constexpr, LOWEST: tl.constexpr):
    """Logits in powers of two: t plus ALiBi and bias where query i may see key j, else -inf.

    i and j are index vectors that broadcast to t, in either order: the same lines serve a tile and its transpose.
    In a tile that is MASKED indices may lie outside; they are clamped, and what they read is not used.
    """
    if masks.slopes is not None:
        t -= place.slope * tl.abs(i + place.shift - j).to(tl.float32)
    row = i.to(tl.int64)
    column = j.to(tl.int64)
    if MASKED:
        row = tl.minimum(row, place.lq - 1)
        column = tl.minimum(column, place.lk - 1)
    if masks.bias is not None:
        bias = tl.load(place.bias_ptr + row * masks.bias.i + column * masks.bias.j).to(tl.float32)
        t = tl.where(bias <= LOWEST, -float("inf"), t + bias * _lib.LOG2E)
    if masks.mask is not None:
        allowed = tl.load(place.mask_ptr + row * masks.mask.i + column * masks.mask.j) != 0
        t = tl.where(allowed, t, -float("inf"))
    if masks.seen is not None:
        t = tl.where(tl.load(place.seen_ptr + column * masks.seen.l) != 0, t, -float("inf"))
    if MASKED:
        allowed = (j >= place.begin) & (j < place.end) & (i < place.lq)
        if masks.left is not None:
            allowed = allowed & (j >= i + (place.shift - masks.left))
        if masks.right is not None:
            allowed = allowed & (j <= i + (place.shift + masks.right))
        if masks.prefix is not None:
            allowed = allowed & ((j <= i + place.shift) | (j < place.prefix))
        t = tl.where(allowed, t, -float("inf"))
    return t


@triton.jit
def kept(i, j, place, numbers):
    """Whether dropout keeps weight (i, j)."""
    word = _lib.philox_word(place.seed, place.counter + i.to(tl.int64) * place.lk + j)
    return word >= tl.cast(numbers.threshold, tl.uint32)


@triton.jit
def score_gradient(p, dp, delta, u, numbers):
    """The gradient of the products times scale: p * (dp - delta), times the slope of the cap."""
    ds = p * (dp - delta)
    if numbers.softcap is not None:
        ds = ds * (1.0 - u * u)
    return ds


@triton.jit
def write(x, tile, n, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows n of x, those that exist."""
    column = tl.arange(0, BLOCK)
    ptrs = x.ptr + (n.to(tl.int64) * x.l)[:, None] + column[None, :]
    tl.store(ptrs, tile.to(x.ptr.dtype.element_ty), mask=exists[:, None] & (column < SIZE)[None, :])
