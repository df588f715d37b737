"""Decoding: the kernel over a part of the keys, and the one that merges parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dryrun import room
from ..rules import Entry, Rules

BATCH, KEY_HEADS, LENGTH, BLOCK = 2, 2, 4096, 16
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

#: (query heads a key head, queries)
ROWS = {"one": (4, 1), "several": (8, 4)}


def call(dtype: torch.dtype, size: int, rows: str, paged: bool, everything: bool) -> Callable[[], Any]:
    group, queries = ROWS[rows]
    heads = group * KEY_HEADS
    query = torch.empty(BATCH, heads, queries, size, dtype=dtype)
    shape = (BATCH * LENGTH // BLOCK, KEY_HEADS, BLOCK, size) if paged else (BATCH, KEY_HEADS, LENGTH, size)
    key, value = (torch.empty(shape, dtype=dtype) for _ in range(2))
    lengths = torch.full((BATCH,), LENGTH, dtype=torch.int32)
    table = torch.zeros(BATCH, LENGTH // BLOCK, dtype=torch.int32) if paged else None
    extras = (torch.empty(heads), torch.empty(heads), 1000, 30.0) if everything else (None, None, -1, 0.0)
    given = (query, key, value, lengths, table, *extras, 0.125, 4, 0)
    return lambda: room("attention").attention_decode(*given)


def entry(
    name: str,
    dtype: torch.dtype,
    size: int,
    rows: str = "one",
    paged: bool = False,
    everything: bool = False,
    targets: tuple[int, ...] = (90,),
) -> Entry:
    """warp_mma: with 16 to 32 rows it is the warp's own matrix instruction on every target."""
    half = dtype != FLOAT32
    return Entry(
        name=f"attention decode {name} {str(dtype)[6:]} {size}",
        launch=call(dtype, size, rows, paged, everything),
        rules={"attention_decode_merge_kernel": Rules(occupancy=0.5), "": Rules(warp_mma=half, copies=half, blocks=2)},
        targets=targets,
    )


ENTRIES = [
    entry("plain", BFLOAT16, 128, targets=(80, 90, 100)),
    entry("queries", BFLOAT16, 128, "several"),
    entry("paged", BFLOAT16, 64, paged=True, everything=True, targets=(80, 90)),
    entry("plain", BFLOAT16, 256),
    entry("plain", FLOAT32, 64, targets=(90, 100)),
    entry("paged", FLOAT32, 128, paged=True),
]
