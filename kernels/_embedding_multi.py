"""Bags over many tables in one launch: where each table is, and how large, is read from a small array."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from ._embedding_forward import Bags, reduce_bags, tile

FIELDS = tl.constexpr(
    10
)  #: of a table: addresses of ids, table, offsets and factors; length, n, rows, cols, stride, column


@triton.jit
def bag_multi_kernel(
    tables_ptr, tensors, out_ptr, maxima_ptr, record_ptr, what, bags, width,
    MODE: tl.constexpr, OFFSETS: tl.constexpr, LAST: tl.constexpr, WEIGHTED: tl.constexpr, NARROW: tl.constexpr,
    ALIGNED: tl.constexpr, BAGS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """tensors: what the addresses point into, for the interpreter's check of bounds; not used."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    table = tl.program_id(1)
    fields = tables_ptr + table * FIELDS
    length, n, rows = tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6)
    cols, stride, column = tl.load(fields + 7), tl.load(fields + 8), tl.load(fields + 9)
    if tl.program_id(2) * COLS >= cols:
        return
    ids_ptr = tl.load(fields).to(tl.pointer_type(tl.int32 if NARROW else tl.int64))
    weight_ptr = tl.load(fields + 1).to(tl.pointer_type(dtype))
    offsets_ptr = tl.load(fields + 2).to(tl.pointer_type(tl.int64)) if OFFSETS else None
    scale_ptr = tl.load(fields + 3).to(tl.pointer_type(dtype)) if WEIGHTED else None
    if ALIGNED:  # every table's rows: 128-bit accesses
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        cols, stride = tl.multiple_of(cols, 16), tl.multiple_of(stride, 16)
        column = tl.multiple_of(column, 16)
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    col = tl.program_id(2).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    live = bag < bags
    total, place = reduce_bags(
        bag, col, live, ids_ptr, weight_ptr, offsets_ptr, scale_ptr, record_ptr,
        what, table, bags, length, n, rows, cols, -1, stride, 1,
        MODE, OFFSETS, LAST, BAGS, COLS, UNROLL,
    )  # fmt: skip
    to = bag[:, None] * width + column + col
    if MODE == "max" and maxima_ptr is not None:
        tl.store(maxima_ptr + to, place, mask=live[:, None] & (col < cols))
    tl.store(out_ptr + to, total.to(dtype), mask=live[:, None] & (col < cols))


def embedding_bag_multi_forward(
    ids: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    per_sample_weights: Sequence[Tensor],
    mode: str,
    include_last_offset: bool,
    with_maxima: bool,
    what: int,
) -> tuple[Tensor, Tensor]:
    narrow, ragged = all(x.dtype == torch.int32 for x in ids), any(start is not None for start in offsets)
    bags = [_bags(x if narrow else x.long(), o, include_last_offset, ragged) for x, o in zip(ids, offsets, strict=True)]
    weights = [w if w.stride(1) == 1 or w.shape[1] <= 1 else w.contiguous() for w in weights]
    scales = [scale.reshape(-1).contiguous() for scale in per_sample_weights]
    count, width = bags[0].count, sum(w.shape[1] for w in weights)
    out = weights[0].new_empty((count, width))
    wanted = mode == "max" and with_maxima
    maxima = out.new_empty(out.shape if wanted else (0,), dtype=torch.int32)
    record, fields, column = None, [], 0
    for table, (bag, weight) in enumerate(zip(bags, weights, strict=True)):
        record = bag.record(what, table)
        start, scale = bag.offsets, scales[table] if scales else None
        addresses = (0 if x is None else x.data_ptr() for x in (bag.ids, weight, start, scale))
        fields.append((*addresses, bag.length, bag.n, *weight.shape, weight.stride(0), column))
        column += weight.shape[1]
    if out.numel() == 0:
        return out, maxima
    grid, height, columns = tile(count, max(w.shape[1] for w in weights), 1024)
    aligned = all(w.data_ptr() % 16 == 0 and w.shape[1] % 16 == 0 and w.stride(0) % 16 == 0 for w in weights)
    starts = [bag.offsets for bag in bags if bag.offsets is not None]
    tensors = (*(bag.ids for bag in bags), *weights, *starts, *scales) if _lib.interpreting() else ()
    _lib.launch(
        bag_multi_kernel, (grid[0], len(weights), grid[1]), out, torch.tensor(fields, device=out.device), tensors, out,
        maxima if wanted else None, record, what, count, width, MODE=mode, OFFSETS=ragged,
        LAST=include_last_offset, WEIGHTED=bool(scales), NARROW=narrow, ALIGNED=aligned, BAGS=height, COLS=columns,
        UNROLL=2 if mode == "max" else 4,
    )  # fmt: skip
    return out, maxima


def _bags(ids: Tensor, offsets: Tensor | None, include_last_offset: bool, ragged: bool) -> Bags:
    """One table's bags; where another table has offsets, with offsets too."""
    if ragged and offsets is None:
        count, length = ids.shape
        offsets = torch.arange(count + int(include_last_offset), device=ids.device) * length
    return Bags(ids.reshape(-1) if ragged else ids, None if offsets is None else offsets.long(), include_last_offset)
