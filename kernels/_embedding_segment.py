"""The positions of a lookup's or a bag's ids, sorted for `_segment`: what each entry adds, and to which row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._segments import Segments, key_dtype
from . import _lib
from ._embedding_forward import Bags, bag_of, id_at, report_id


@triton.jit
def segment_keys_kernel(
    ids_ptr, offsets_ptr, keys_ptr, record_ptr, what, bags, n, rows, padding,
    LIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What positions are sorted by: the id, or `rows` for those that add to no row."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = n
    if LIMITED:
        limit = tl.minimum(tl.load(offsets_ptr + bags).to(tl.int64), n)
    id, counted = id_at(ids_ptr, position, position < limit, rows, padding)
    tl.store(keys_ptr + position, tl.where(counted, id, rows).to(keys_ptr.dtype.element_ty), mask=position < n)
    if record_ptr is not None:
        bad = (position < limit) & ((id < 0) | (id >= rows))
        report_id(record_ptr, what, ids_ptr, tl.where(bad, position, n), n, rows, 0)


@triton.jit
def segment_entries_kernel(
    order_ptr, offsets_ptr, sizes_ptr, scale_ptr, source_ptr, factor_ptr, place_ptr, bags, length, n,
    STEPS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each sorted entry: its row of dy, what that row is multiplied by, and its place within its bag."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < n
    position = tl.load(order_ptr + entry, mask=live, other=0)
    bag = bag_of(position, offsets_ptr, bags, length, STEPS, OFFSETS)
    tl.store(source_ptr + entry, bag, mask=live)
    if factor_ptr is not None:
        factor = tl.full((BLOCK,), 1.0, tl.float32)
        if scale_ptr is not None:
            factor = tl.load(scale_ptr + position, mask=live, other=0.0).to(tl.float32)
        if sizes_ptr is not None:
            factor = factor / tl.load(sizes_ptr + bag, mask=live, other=1.0)
        tl.store(factor_ptr + entry, factor, mask=live)
    if place_ptr is not None:
        if OFFSETS:
            begin = tl.load(offsets_ptr + bag, mask=live, other=0).to(tl.int64)
        else:
            begin = bag * length
        tl.store(place_ptr + entry, (position - begin).to(tl.int32), mask=live)


def sort(
    bags: Bags, rows: int, padding: int, mode: str = "lookup", scale: Tensor | None = None, what: int = 0
) -> Segments:
    """The positions of a call, sorted stably by id. what: the code that invalid ids are reported with, 0 for none."""
    n, device = bags.n if bags.count else 0, bags.ids.device
    record = bags.record(what)
    keys = torch.empty(n, dtype=key_dtype(rows), device=device)
    if n == 0:
        return Segments(rows, keys, keys)
    blocks, block = (triton.cdiv(n, 1024),), min(1024, triton.next_power_of_2(n))
    limited = bags.constants["LAST"] and bags.constants["OFFSETS"]
    _lib.launch(
        segment_keys_kernel, blocks, keys, bags.ids, bags.offsets, keys, record, what, bags.count, n, rows,
        padding, LIMITED=limited, BLOCK=block,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    if mode == "lookup":
        return Segments(rows, keys, order)
    sizes = bags.sizes(mode, rows, padding)
    source = torch.empty_like(order)
    factor = torch.empty(n, device=device) if scale is not None or sizes is not None else None
    place = torch.empty(n, dtype=torch.int32, device=device) if mode == "max" else None
    _lib.launch(
        segment_entries_kernel, blocks, keys, order, bags.offsets, sizes, scale, source, factor, place,
        bags.count, bags.length, n, STEPS=bags.steps, OFFSETS=bags.constants["OFFSETS"], BLOCK=block,
    )  # fmt: skip
    return Segments(rows, keys, source, factor, place)
