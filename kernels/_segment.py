"""Sums of rows by id, without atomics: positions sorted by id, each row of the gradient the sum of one run of them.

The sorted positions are cut into chunks of a fixed length that depends on their number only, one program to a chunk
(and some columns), so the work of a program does not depend on how often an id occurs. A run that lies in one chunk is
finished there. Of one that crosses chunks, each chunk leaves one partial sum in float32: a *tail* where the run begins,
a *head* in every chunk that it began before. `segment_join_kernel` adds tail and heads in order. So the bits depend on
the ids and on nothing else, and nothing is asked of the device: sizes follow from the number of positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._segments import Segments, ranked
from . import _lib
from ._embedding_update import WIDEST, Rule, rowwise_state_kernel, update_row


@triton.jit
def entry_row(entry, end, filler, keys_ptr, gradient, rows, cols, col):
    """The key of an entry, and what it adds to that row. Past `end`: the filler, and nothing."""
    source_ptr, factor_ptr, place_ptr, maxima_ptr, dy_ptr, dy_row, dy_col = gradient
    live = entry < end
    key = tl.where(live, tl.load(keys_ptr + entry, mask=live, other=0).to(tl.int64), filler)
    source = tl.load(source_ptr + entry, mask=live, other=0)
    mask = (col < cols) & (live & (key < rows))
    row = tl.load(dy_ptr + source * dy_row + col * dy_col, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        row = row * tl.load(factor_ptr + entry, mask=live, other=0.0)
    if maxima_ptr is not None:  # a column's gradient belongs to the entry that held its maximum
        place = tl.load(place_ptr + entry, mask=live, other=0)
        row = tl.where(tl.load(maxima_ptr + source * cols + col, mask=mask, other=-1) == place, row, 0.0)
    return key, row


@triton.jit
def finish(total, key, target, count, out_ptr, rule, rows, cols, col, BY_FREQUENCY: tl.constexpr, RULE: tl.constexpr):
    """What becomes of the sum of one run: it is rounded once and stored, or steps the row of a table."""
    if BY_FREQUENCY:
        total = total / count.to(tl.float32)
    mask = (col < cols) & (key < rows)
    if RULE == "none":
        tl.store(out_ptr + target * cols + col, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        update_row(total, key, target, key < rows, mask, out_ptr, rule, cols, col, RULE)


@triton.jit
def segment_kernel(
    keys_ptr, ranks_ptr, source_ptr, factor_ptr, place_ptr, maxima_ptr, dy_ptr, out_ptr, partial_ptr,
    rule, n, rows, cols, dy_row, dy_col, chunk_length,
    SPARSE: tl.constexpr, BY_FREQUENCY: tl.constexpr, RULE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One chunk of the sorted entries, four rows in flight. partial: (chunks, 2, cols), a head and a tail for each."""
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    begin = chunk * chunk_length
    end = tl.minimum(begin + chunk_length, n)
    current = tl.load(keys_ptr + begin).to(tl.int64)
    if current >= rows:  # sorted last: nothing more adds to a row
        return
    filler = tl.load(keys_ptr + end - 1).to(tl.int64)
    head = tl.load(keys_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64) == current
    target = tl.load(ranks_ptr + begin).to(tl.int64) if SPARSE else current
    gradient = source_ptr, factor_ptr, place_ptr, maxima_ptr, dy_ptr, dy_row, dy_col
    head_ptr = partial_ptr + chunk * 2 * cols + col
    first = begin
    total = tl.zeros((COLS,), tl.float32)
    for i in range(begin, end, 4):
        entries = ()
        for u in tl.static_range(4):  # all loads come before a store: the compiler moves none across
            entries += (entry_row(i + u, end, filler, keys_ptr, gradient, rows, cols, col),)
        for u in tl.static_range(4):
            key, row = entries[u]
            if key != current:
                if head:
                    tl.store(head_ptr, total, mask=col < cols)
                else:
                    count = i + u - first
                    finish(total, current, target, count, out_ptr, rule, rows, cols, col, BY_FREQUENCY, RULE)
                total = tl.zeros((COLS,), tl.float32)
                head = key == current
                target = target + 1 if SPARSE else key
                first = i + u
                current = key
            total += row
    goes_on = tl.load(keys_ptr + end, mask=end < n, other=-1).to(tl.int64) == current
    if head:
        tl.store(head_ptr, total, mask=col < cols)
    elif goes_on:
        tl.store(head_ptr + cols, total, mask=(col < cols) & (current < rows))
    else:
        finish(total, current, target, end - first, out_ptr, rule, rows, cols, col, BY_FREQUENCY, RULE)


@triton.jit
def first_not_below(keys_ptr, low, count, key, stride):
    """The first i of `count` from low on with keys[i * stride] >= key, or low + count."""
    high = low + count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(keys_ptr + middle * stride).to(tl.int64) < key
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def segment_join_kernel(
    keys_ptr, ranks_ptr, out_ptr, partial_ptr, rule, n, rows, cols, chunk_length,
    SPARSE: tl.constexpr, BY_FREQUENCY: tl.constexpr, RULE: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The run that crosses the end of a chunk, if it begins in that chunk: its tail and its heads, in order."""
    chunk = tl.program_id(0).to(tl.int64)
    end = (chunk + 1) * chunk_length  # not the last chunk: this many entries exist
    key = tl.load(keys_ptr + end - 1).to(tl.int64)
    if key >= rows:
        return
    if tl.load(keys_ptr + end).to(tl.int64) != key:
        return
    first = first_not_below(keys_ptr, end - chunk_length, chunk_length, key, 1)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if before == key:  # then first is where the chunk begins, and the run began in an earlier one
        return
    past = first_not_below(keys_ptr, chunk + 1, tl.cdiv(n, chunk_length) - chunk - 1, key + 1, chunk_length)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.load(partial_ptr + (chunk * 2 + 1) * cols + col, mask=col < cols, other=0.0)
    heads = tl.zeros((HEADS, COLS), tl.float32)
    for i in range(chunk + 1, past, HEADS):
        index = i + tl.arange(0, HEADS)[:, None]
        heads += tl.load(
            partial_ptr + index * 2 * cols + col[None, :], mask=(index < past) & (col < cols)[None, :], other=0.0
        )
    last = (past - 1) * chunk_length
    count = first_not_below(keys_ptr, last, tl.minimum(chunk_length, n - last), key + 1, 1) - first
    target = tl.load(ranks_ptr + first).to(tl.int64) if SPARSE else key
    finish(total + tl.sum(heads, 0), key, target, count, out_ptr, rule, rows, cols, col, BY_FREQUENCY, RULE)


def chunk_length(n: int) -> int:
    """Entries of a chunk: some 2000 chunks to fill a GPU, and of the longest run so few partial sums to add.

    It must not depend on the device: the sums are grouped by it.
    """
    return min(max(triton.next_power_of_2(triton.cdiv(n, 2048)), 32), 1024)


def sum_rows(
    dy: Tensor,
    segments: Segments,
    out: Tensor,
    maxima: Tensor | None,
    by_frequency: bool,
    rule: Rule | None = None,
) -> None:
    """out[id], or with ranks out[rank of id], = the sum of the rows of that id. Other rows are left alone.

    With a rule `out` is a table, whose rows take a step by their sums instead.
    """
    n, cols = segments.keys.numel(), dy.shape[1]
    if n == 0 or cols == 0:
        return
    if rule is not None and rule.whole_rows and cols > WIDEST:
        _step_wide_rows(dy, segments, out, maxima, by_frequency, rule)
        return
    maxima = None if segments.place is None or maxima is None else maxima.contiguous()
    length = chunk_length(n)
    chunks = triton.cdiv(n, length)
    partial = torch.empty((chunks, 2, cols) if chunks > 1 else (1, 1, 1), dtype=torch.float32, device=dy.device)
    width = max(32, triton.next_power_of_2(cols))
    joined = triton.next_power_of_2(cols)
    if rule is None or not rule.whole_rows:
        width, joined = _width(dy, cols), min(128, joined)
    if rule is not None and rule.name.startswith("rowwise_s"):
        joined = width  # both kernels have the same share of a row
    options = {
        "SPARSE": segments.ranks is not None,
        "BY_FREQUENCY": by_frequency,
        "RULE": "none" if rule is None else rule.name,
    }
    numbers, sizes = None if rule is None else rule.arguments(out), (n, segments.rows, cols)
    _lib.launch(
        segment_kernel, (chunks, triton.cdiv(cols, width)), dy, segments.keys, segments.ranks, segments.source,
        segments.factor, segments.place, maxima, dy, out, partial, numbers, *sizes, dy.stride(0), dy.stride(1), length,
        **options, COLS=width, num_warps=min(16, max(1, width // 256)),
    )  # fmt: skip
    if chunks > 1:
        _lib.launch(
            segment_join_kernel, (chunks - 1, triton.cdiv(cols, joined)), dy, segments.keys, segments.ranks, out,
            partial, numbers, *sizes, length, **options, HEADS=min(32, max(1, 4096 // joined)), COLS=joined,
            num_warps=4 if joined <= 1024 else 16,
        )  # fmt: skip


def _step_wide_rows(
    dy: Tensor, segments: Segments, table: Tensor, maxima: Tensor | None, by_frequency: bool, rule: Rule
) -> None:
    """Row-wise Adagrad on rows that no program holds: the mean square of each row's gradient, then the step."""
    (n, cols), (segments, _) = (segments.keys.numel(), dy.shape[1]), ranked(segments)
    tiles = triton.cdiv(cols, _width(dy, cols))
    squares = torch.empty((n, tiles), dtype=torch.float32, device=dy.device)
    rule = rule._replace(name="rowwise_squares", second_state=squares)
    sum_rows(dy, segments, table, maxima, by_frequency, rule)
    _lib.launch(
        rowwise_state_kernel, (triton.cdiv(n, 128),), dy, segments.keys, segments.ranks, rule.arguments(table), n,
        segments.rows, cols, tiles, BLOCK=128,
    )  # fmt: skip
    sum_rows(dy, segments, table, maxima, by_frequency, rule._replace(name="rowwise_scaled"))


def _width(dy: Tensor, cols: int) -> int:
    """Columns of a program where it need not have all of a row."""
    return min(128 if dy.dtype == torch.float32 else 256, max(32, triton.next_power_of_2(cols)))
