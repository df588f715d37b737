"""Lookup and bags, forward: one kernel for every mode. And the gradient of the per-sample weights.

A program owns some bags and some columns, and walks all of its bags at once: rows are summed in registers, as many in
flight as the program has bags, times four. A lookup is a bag of one row. Nothing is exchanged between threads but the
length of the longest bag.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _errors
from . import _lib
from .checks import report, report_values


@triton.jit
def id_at(ids_ptr, position, mask, rows, padding):
    """The id at each position, and whether it takes part: a row of the table, and not the padding."""
    id = tl.load(ids_ptr + position, mask=mask, other=-1).to(tl.int64)
    return id, (id >= 0) & (id < rows) & (id != padding)


@triton.jit
def report_id(record_ptr, what, ids_ptr, first_bad, n, rows, table):
    """Reports the id at the lowest of these positions; n where there is nothing to report."""
    position = tl.min(first_bad, 0)
    if position < n:
        report(record_ptr, what, position, tl.load(ids_ptr + position).to(tl.int64), rows, table)


@triton.jit
def bag_ends(bag, mask, offsets_ptr, bags, length, n, OFFSETS: tl.constexpr, LAST: tl.constexpr):
    """First position of each bag and one past its last, in [0, n] whatever the offsets hold."""
    if OFFSETS:
        begin = tl.load(offsets_ptr + bag, mask=mask, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + bag + 1, mask=mask & (LAST | (bag + 1 < bags)), other=n).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), n)
        return begin, tl.minimum(tl.maximum(end, begin), n)
    else:
        return bag * length, (bag + 1) * length


@triton.jit
def reduce_bags(
    bag, col, live, ids_ptr, weight_ptr, offsets_ptr, scale_ptr, record_ptr,
    what, table, bags, length, n, rows, cols, padding, weight_row, weight_col,
    MODE: tl.constexpr, OFFSETS: tl.constexpr, LAST: tl.constexpr, BAGS: tl.constexpr, COLS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums, means or maxima of BAGS bags in COLS columns, and where in their bags the maxima are."""
    used = col < cols
    from_row = weight_ptr + col * weight_col
    begin, end = bag_ends(bag, live, offsets_ptr, bags, length, n, OFFSETS, LAST)
    longest = tl.max(tl.where(live, end - begin, 0), 0).to(tl.int32)
    total = tl.full((BAGS, COLS), -float("inf") if MODE == "max" else 0.0, tl.float32)
    place = tl.full((BAGS, COLS), -1, tl.int32)
    count = tl.zeros((BAGS,), tl.int32)
    bad = tl.full((BAGS,), -1, tl.int32)
    for i in tl.range(0, longest, loop_unroll_factor=UNROLL):
        position = begin + i
        inside = live & (position < end)
        id, counted = id_at(ids_ptr, position, inside, rows, padding)
        row = tl.load(from_row + id[:, None] * weight_row, mask=counted[:, None] & used, other=0.0).to(tl.float32)
        if MODE == "max":  # the first of equal ones; of a bag with NaN the first NaN
            better = (place < 0) | (row > total) | ((row != row) & (total == total))
            better = better & counted[:, None]
            total = tl.where(better, row, total)
            place = tl.where(better, i, place)
        else:
            if scale_ptr is not None:
                factor = tl.load(scale_ptr + position, mask=counted, other=0.0).to(tl.float32)
                row = row * factor[:, None]
            total += row
            count += counted.to(tl.int32)
        if record_ptr is not None:
            bad = tl.where(inside & ((id < 0) | (id >= rows)) & (bad < 0), i, bad)
    if MODE == "max":
        total = tl.where(place < 0, 0.0, total)
    if MODE == "mean":
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    if record_ptr is not None:
        report_id(record_ptr, what, ids_ptr, tl.where(bad < 0, n, begin + bad), n, rows, table)
    return total, place


@triton.jit
def bag_fwd_kernel(
    ids_ptr, weight_ptr, offsets_ptr, scale_ptr, out_ptr, maxima_ptr, record_ptr,
    what, bags, length, n, rows, cols, padding, weight_row, weight_col,
    MODE: tl.constexpr, OFFSETS: tl.constexpr, LAST: tl.constexpr, BAGS: tl.constexpr, COLS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    live, used = bag < bags, col < cols
    out = bag[:, None] * cols + col
    if MODE == "lookup":  # padding is -1: its row is returned like any other
        id, valid = id_at(ids_ptr, bag, live, rows, padding)
        row = weight_ptr + col * weight_col + id[:, None] * weight_row
        tl.store(out_ptr + out, tl.load(row, mask=valid[:, None] & used, other=0.0), mask=live[:, None] & used)
        if record_ptr is not None:
            report_id(record_ptr, what, ids_ptr, tl.where(live & (valid == 0), bag, n), n, rows, 0)
    else:
        total, place = reduce_bags(
            bag, col, live, ids_ptr, weight_ptr, offsets_ptr, scale_ptr, record_ptr,
            what, 0, bags, length, n, rows, cols, padding, weight_row, weight_col,
            MODE, OFFSETS, LAST, BAGS, COLS, UNROLL,
        )  # fmt: skip
        if MODE == "max" and maxima_ptr is not None:
            tl.store(maxima_ptr + out, place, mask=live[:, None] & used)
        tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & used)


@triton.jit
def bag_sizes_kernel(
    ids_ptr, offsets_ptr, sizes_ptr, bags, length, n, rows, padding,
    OFFSETS: tl.constexpr, LAST: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """How many ids of each bag take part, at least 1: what "mean" divides by."""
    bag = tl.program_id(0).to(tl.int64)
    begin, end = bag_ends(bag, bag < bags, offsets_ptr, bags, length, n, OFFSETS, LAST)
    count = tl.zeros((IDS,), tl.int32)
    for i in range(begin, end, IDS):
        position = i + tl.arange(0, IDS)
        _, counted = id_at(ids_ptr, position, position < end, rows, padding)
        count += counted.to(tl.int32)
    tl.store(sizes_ptr + bag, tl.maximum(tl.sum(count, 0), 1).to(tl.float32))


@triton.jit
def bag_of(position, offsets_ptr, bags, length, STEPS: tl.constexpr, OFFSETS: tl.constexpr):
    """The bag of each position before the end of the last bag: the last one that begins at or before it."""
    if OFFSETS:
        low = tl.zeros_like(position)
        high = low + (bags - 1)
        for _ in range(STEPS):
            middle = (low + high + 1) // 2
            at_or_before = tl.load(offsets_ptr + middle).to(tl.int64) <= position
            low = tl.where(at_or_before, middle, low)
            high = tl.where(at_or_before, high, tl.maximum(middle - 1, low))
        return low
    else:
        return position // length


@triton.jit
def bag_bwd_weights_kernel(
    dy_ptr, ids_ptr, weight_ptr, offsets_ptr, sizes_ptr, out_ptr,
    bags, length, n, rows, cols, padding, dy_row, dy_col, weight_row, weight_col,
    STEPS: tl.constexpr, OFFSETS: tl.constexpr, LAST: tl.constexpr, POSITIONS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[p] = <dy[bag of p], weight[ids[p]]> / size of the bag; 0 for padding and beyond the last bag."""
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    live = position < n
    limit = n
    if OFFSETS and LAST:
        limit = tl.minimum(tl.load(offsets_ptr + bags).to(tl.int64), n)
    id, counted = id_at(ids_ptr, position, position < limit, rows, padding)
    bag = bag_of(position, offsets_ptr, bags, length, STEPS, OFFSETS)
    total = tl.zeros((POSITIONS,), tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        mask = counted[:, None] & (col < cols)
        dy = tl.load(dy_ptr + bag[:, None] * dy_row + col * dy_col, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(weight_ptr + id[:, None] * weight_row + col * weight_col, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dy * row, 1)
    if sizes_ptr is not None:
        total = total / tl.load(sizes_ptr + bag, mask=counted, other=1.0)
    tl.store(out_ptr + position, total.to(out_ptr.dtype.element_ty), mask=live)


def tile(rows: int, cols: int, size: int) -> tuple[tuple[int, int], int, int]:
    """(grid, rows of a tile, its columns): `size` elements, all of a row if it is not wider than 256."""
    width = min(256, triton.next_power_of_2(cols))
    height = max(1, min(size // width, triton.next_power_of_2(rows)))
    return (triton.cdiv(rows, height), triton.cdiv(cols, width)), height, width


class Bags:
    """The bags of one call: how many, and where they begin and end.

    Attributes:
        ids: int32 or int64, 1-D, contiguous.
        length: of each bag, where there are no offsets.
        constants: what `bag_ends` and `bag_of` must know when they are compiled.
    """

    def __init__(self, ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
        self.ids = ids.reshape(-1).contiguous()
        self.n = self.ids.numel()
        self.offsets = None if offsets is None else offsets.contiguous()
        self.count = ids.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
        self.length = ids.shape[1] if offsets is None else 0
        self.constants = {"OFFSETS": offsets is not None, "LAST": include_last_offset}

    @property
    def steps(self) -> int:
        """Turns of a binary search over the bags."""
        return 0 if self.offsets is None else max(self.count - 1, 0).bit_length()

    def record(self, what: int, table: int = 0) -> Tensor | None:
        """Where kernels report invalid ids; offsets are looked at here.

        what: the code of the ids, that of the offsets is one more; 0 for no reports. table: its number.
        """
        if what == 0:
            return None
        if self.offsets is not None:
            report_values(self.offsets, None, what + 1, "offsets", self.n, table=table)
        return _errors.record(self.ids.device)

    def sizes(self, mode: str, rows: int, padding: int) -> Tensor | None:
        """What the sums of each bag are divided by, None for 1."""
        if mode != "mean":
            return None
        sizes = torch.empty(self.count, dtype=torch.float32, device=self.ids.device)
        if self.count:
            _lib.launch(
                bag_sizes_kernel, (self.count,), self.ids, self.ids, self.offsets, sizes, self.count, self.length,
                self.n, rows, padding, **self.constants, IDS=128, num_warps=1,
            )  # fmt: skip
        return sizes


def forward(
    bags: Bags,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    maxima: Tensor | None,
    mode: str,
    padding: int,
    what: int,
) -> None:
    rows, cols = weight.shape
    record = bags.record(what)
    if bags.count == 0 or cols == 0:
        return
    # 16 to 32 KiB in flight on each multiprocessor's share of blocks: a lookup has one turn only, so its tiles are big
    grid, height, width = tile(bags.count, cols, 4096 if mode == "lookup" else 1024)
    _lib.launch(
        bag_fwd_kernel, grid, weight, bags.ids, weight, bags.offsets, scale, out, maxima, record,
        what, bags.count, bags.length, bags.n, rows, cols, padding, weight.stride(0), weight.stride(1),
        MODE=mode, **bags.constants, BAGS=height, COLS=width, UNROLL=2 if mode == "max" else 4,
    )  # fmt: skip


def backward_weights(dy: Tensor, bags: Bags, weight: Tensor, out: Tensor, mode: str, padding: int) -> None:
    rows, cols = weight.shape
    if bags.n == 0:
        return
    if bags.count == 0 or cols == 0:
        out.zero_()
        return
    grid, height, width = tile(bags.n, cols, 2048)
    _lib.launch(
        bag_bwd_weights_kernel, grid[:1], weight, dy, bags.ids, weight, bags.offsets, bags.sizes(mode, rows, padding),
        out, bags.count, bags.length, bags.n, rows, cols, padding, dy.stride(0), dy.stride(1), weight.stride(0),
        weight.stride(1), STEPS=bags.steps, **bags.constants, POSITIONS=height, COLS=width,
    )  # fmt: skip
