"""Which keys are seen at all where several masks decide together."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _attention_place as places
from . import _attention_tiles as tiles_of


@triton.jit
def attention_seen_kernel(
    seen_ptr, tiles, size, masks, numbers,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, LOWEST: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """seen (B, H, max_k) uint8: 1 where some query may see the key. A key that one mask hides from half of the queries
    and another from the rest is seen by none, and may hold NaN as any other. Reads every mask once, as `any` would."""
    tile, b, h = places.locate(tiles, size, True, False, BLOCK_K, SEQUENCES)
    place = places.here(b, h, size, masks, numbers, TOP_LEFT, SEQUENCES)
    j0 = tile * BLOCK_K
    j = j0 + tl.arange(0, BLOCK_K)
    in_step = tl.arange(0, BLOCK_Q)
    begin, full_begin, full_end, first, masked = tiles_of.query_tiles(
        j0, tl.minimum(j0 + BLOCK_K, place.lk), place, masks, True, BLOCK_Q
    )
    seen = tl.zeros((BLOCK_K,), tl.int32)
    for t in tl.range(0, masked):
        i = tiles_of.tile_start(t, begin, full_begin, full_end, first, BLOCK_Q, True) + in_step
        nothing = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        s = tiles_of.add_and_mask(nothing, i[None, :], j[:, None], place, masks, True, LOWEST)
        seen = tl.maximum(seen, tl.max((s != -float("inf")).to(tl.int32), 1))
    row = (place.b * size.heads + place.h) * size.max_k
    tl.store(seen_ptr + row + j, seen.to(tl.uint8), mask=j < place.lk)
