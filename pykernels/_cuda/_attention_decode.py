"""Decoding on csrc/cuda: the operator `attention_decode` of the attention room."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _attended, _errors
from . import _attention_arguments as launching
from ._extension import Extension

WIDEST, ROWS, KEYS = 256, 16, 64


def attention_decode(
    ext: Extension,
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
    batch, heads, lq, _ = query.shape
    widest = max(query.shape[-1], value_cache.shape[-1])
    if widest > WIDEST:
        raise NotImplementedError(
            f"attention_decode: the CUDA kernels take head sizes up to {WIDEST}; this one is {widest}"
        )
    out = _attended.rows_like(query, (batch, heads, lq, value_cache.shape[-1]))
    lse = query.new_empty((batch, heads, lq), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    _, kv_heads, block_size, _ = key_cache.shape
    limit = _attended.room_for_keys(key_cache, block_table)
    if limit > _attended.MOST_KEYS:
        raise NotImplementedError(f"attention_decode: the CUDA kernels take up to 2^30 keys a sequence, not {limit}")
    query, key_cache, value_cache = (launching.in_rows(x) for x in (query, key_cache, value_cache))
    if block_table is not None and block_table.stride(-1) != 1:
        block_table = block_table.contiguous()
    group = heads // kv_heads
    owners = batch * kv_heads * -(-group * lq // ROWS)
    splits = num_splits or _attended.chosen_splits(owners, limit, KEYS, ext.multiprocessors(query.device))
    written = launching.out_rows(out)
    size = written.shape[-1]
    parts = _attended.parts(lse, splits, size)
    cache_lengths = None if cache_lengths is None else cache_lengths.contiguous()
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    layout = (
        *launching.strides(query), *launching.strides(key_cache), *launching.strides(value_cache),
        *launching.strides(written), 0 if block_table is None else block_table.stride(0),
        heads if slopes is not None and slopes.dim() == 2 else 0,
        batch, heads, group, lq, limit, key_cache.shape[0], block_size, query.shape[-1], size,
        limit if window_left < 0 else min(window_left, limit), splits,
        int(cache_lengths is not None and cache_lengths.dtype == torch.int64),
        what, int(torch.get_float32_matmul_precision() == "highest"),
    )  # fmt: skip
    numbers = _attended.factors(scale, softcap)
    tensors = (
        query, key_cache, value_cache, cache_lengths, block_table, None if sinks is None else sinks.contiguous(),
        slopes, written, lse, *parts, _errors.record(query.device) if what else None,
    )  # fmt: skip
    ext.call("attention_decode", *tensors, layout, numbers, query.dtype)
    if splits > 1:
        ext.call("attention_decode_merge", *tensors, layout, numbers, query.dtype)
    launching.copy_back(out, written)
    return out, lse
