"""The launches of `_attention_decode`: tiles, and into how many parts the keys are cut."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import _attended, _errors
from . import _attention_launch as launching
from . import _lib
from ._attention_decode import attention_decode_kernel, attention_decode_merge_kernel
from ._attention_place import Numbers, Rows


class Cache(NamedTuple):
    """limit: keys a sequence can have; blocks, block_size: of a paged cache."""

    limit: Any
    blocks: Any
    block_size: Any


class Decoding(NamedTuple):
    """rows: query rows of a program; keys: in a turn of its loop."""

    rows: int
    keys: int
    warps: int
    stages: int


def decoding_tiles(rows: int, widest: int, half: bool) -> Decoding:
    """Rows beyond one tile are for other programs, which read the keys again (from the L2 cache, side by side)."""
    height = min(max(triton.next_power_of_2(rows), 16), 64)
    keys = {64: 128, 128: 64, 256: 32}[max(widest, 64)]
    return Decoding(height, keys if half else max(keys // 4, 16), 4, 3 if half else 2)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    window_left: int,
    softcap: float,
    scale: float,
    num_splits: int,
    what: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse): the operator `attention_decode`."""
    batch, heads, lq, size = query.shape
    value_size = value_cache.shape[-1]
    widest = launching.padded(max(size, value_size))
    if widest > launching.WIDEST:
        raise NotImplementedError(
            f"attention_decode: the Triton kernels take head sizes up to {launching.WIDEST}, not {widest}"
        )
    out = _attended.rows_like(query, (batch, heads, lq, value_size))
    lse = query.new_empty((batch, heads, lq), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    limit = _attended.room_for_keys(key_cache, block_table)
    if limit > _attended.MOST_KEYS:
        raise NotImplementedError(f"attention_decode: the Triton kernels take up to 2^30 keys a sequence, not {limit}")
    query, key_cache, value_cache = (_adjacent(x) for x in (query, key_cache, value_cache))
    table = None
    if block_table is not None:
        block_table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
        table = Rows(block_table, block_table.stride(0), 0, 1)
    half = query.dtype != torch.float32
    rows = heads // kv_heads * lq
    tiles = decoding_tiles(rows, widest, half)
    row_tiles = triton.cdiv(rows, tiles.rows)
    owners = batch * kv_heads * row_tiles
    multiprocessors = _lib.device_properties(query.device).sm_count
    splits = num_splits or _attended.chosen_splits(owners, limit, tiles.keys, multiprocessors)
    part, top, total = _attended.parts(lse, splits, value_size)
    of_products, cap = _attended.factors(scale, softcap)
    slopes = None
    if alibi_slopes is not None:
        slopes = Rows(alibi_slopes.contiguous(), heads * (alibi_slopes.dim() - 1), 1, 0)
    _lib.launch(
        attention_decode_kernel, (owners, splits), query,
        q=launching.rows(query), k=launching.rows(key_cache), v=launching.rows(value_cache), out=launching.rows(out),
        lse_ptr=lse, part_ptr=part, top_ptr=top, total_ptr=total, table=table,
        lengths_ptr=None if cache_lengths is None else cache_lengths.contiguous(),
        sinks_ptr=None if sinks is None else sinks.contiguous(), slopes=slopes,
        record_ptr=_errors.record(query.device) if what else None, what=what,
        numbers=Numbers(
            of_products, cap if softcap else None, None, None, None
        ),
        cache=Cache(limit, key_cache.shape[0], block_size), heads=heads, group=heads // kv_heads, lq=lq,
        row_tiles=row_tiles, splits=splits, left=min(window_left, limit) if window_left >= 0 else None,
        D=size, DV=value_size, BLOCK_D=launching.padded(size), BLOCK_DV=launching.padded(value_size),
        BLOCK_Q=tiles.rows, BLOCK_K=tiles.keys, PRECISION=launching.precision(query, value_cache),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        _lib.launch(
            attention_decode_merge_kernel, (lse.numel(),), query,
            part, top, total, launching.rows(out), lse, heads, lq, splits,
            DV=value_size, BLOCK_DV=launching.padded(value_size), SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out, lse
