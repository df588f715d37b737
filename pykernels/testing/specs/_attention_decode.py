"""The contract of `attention_decode`, and its benchmark rows."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..spec import Case, Input

Shape = tuple[int, ...]


def case(
    label: str,
    query: Shape,
    cache: Shape,
    value_size: int | None = None,
    blocks: int | None = None,
    more: dict[str, Input] | None = None,
    layout: str = "contiguous",
    scales: tuple[float, float] = (1.0, 1.0),
    **options: Any,
) -> Case:
    """cache: (B, Hkv, S, D); with `blocks` as many blocks of it, which the table takes in any order and repeats."""
    size, heads, length = cache[3], cache[1], cache[2]
    shape, limit = cache, length
    inputs = {"query": Input(query, scale=scales[0], layout=layout, grad=False)}
    table = {}
    if blocks is not None:
        shape, across = (blocks, heads, length, size), cache[0]
        limit = across * length
        table["block_table"] = Input((query[0], across), "ids", high=blocks, dtype=torch.int32)
    inputs["key_cache"] = Input(shape, scale=scales[1], layout=layout, grad=False)
    inputs["value_cache"] = Input((*shape[:3], value_size or size), layout=layout, grad=False)
    inputs["cache_lengths"] = Input((query[0],), "ids", high=limit + 1, dtype=torch.int32)
    return Case(label, {**inputs, **table, **(more or {})}, options)


def cases() -> tuple[Case, ...]:
    """For paged ones the first number of `cache` is the width of the table."""
    slopes = {"alibi_slopes": Input((4,), "uniform", grad=False)}
    sinks = {"sinks": Input((4,), grad=False)}
    q, c = (3, 4, 1, 8), (3, 2, 40, 8)
    long = {"cache_lengths": Input((2,), "ids", high=301)}
    everything: dict[str, Any] = {"window": (9, -1), "softcap": 2.0, "scale": 0.5, "return_lse": True}
    found = [
        case("sample", (2, 4, 2, 8), (2, 2, 13, 8), return_lse=True, num_splits=2),
        case("plain", q, c),
        case("lse", (5, 4, 3, 16), (5, 4, 7, 16), return_lse=True),
        case("long", (2, 2, 1, 64), (2, 2, 300, 64), more=long),
        case("split", (2, 6, 1, 64), (2, 2, 300, 64), 40, more=long, num_splits=3, return_lse=True),
        case("more splits than keys", (2, 2, 1, 16), (2, 1, 5, 16), num_splits=7, return_lse=True),
        case("queries", (2, 4, 5, 16), (2, 2, 150, 16), num_splits=2),
        case("many rows", (2, 20, 2, 16), (2, 1, 70, 16)),
        case("wide", (2, 2, 2, 256), (2, 1, 33, 256)),
        case("odd", (2, 6, 1, 59), (2, 2, 70, 59), 33),
        case("window", (3, 4, 3, 16), (3, 4, 150, 16), window=(20, 0), num_splits=2),
        case("softcap", q, c, softcap=1.5, scale=1.0),
        case("sinks", q, c, more=sinks, return_lse=True, num_splits=2),
        case("alibi", (3, 4, 2, 8), c, more=slopes),
        case("alibi-batch", q, c, more={"alibi_slopes": Input((3, 4), "uniform", grad=False)}),
        case("everything", (3, 4, 2, 8), c, more={**sinks, **slopes}, num_splits=3, **everything),
        case("paged", (3, 4, 1, 16), (5, 2, 16, 16), blocks=9, return_lse=True),
        case("paged-odd", (3, 4, 3, 16), (4, 2, 7, 16), 24, blocks=6, num_splits=2),
        case("paged-everything", (3, 4, 2, 8), (3, 2, 16, 8), blocks=7, more={**sinks, **slopes}, **everything),
        case("sharp", q, c, scales=(5.0, 3.0)),
        case("scale-0", q, c, scale=0.0),
        case("scale-negative", q, c, scale=-0.3),
        case("no-batch", (0, 4, 1, 8), (0, 2, 40, 8)),
        case("no-query", (3, 4, 0, 8), c, return_lse=True),
        case("no-cache", q, (3, 2, 0, 8), return_lse=True),
    ]
    found += [
        case(layout, (3, 4, 2, 8), c, layout=layout) for layout in ("transposed", "rows", "offset", "every_other")
    ]
    return tuple(found)


def gathered(cache: Tensor, table: Tensor | None) -> Tensor:
    """A cache in blocks as (B, Hkv, S, D)."""
    return cache if table is None else cache[table.long()].transpose(1, 2).flatten(2, 3)


@functools.lru_cache(maxsize=4)
def _seen(queries: int, keys: int, lengths: tuple[int, ...]) -> Tensor:
    """bool (B, 1, Lq, S); kept, so that a timed peer is not charged for making it."""
    place = torch.tensor(lengths).unsqueeze(-1) + torch.arange(queries) - queries
    return (torch.arange(keys) <= place.unsqueeze(-1)).unsqueeze(1)


def dense(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    **options: Any,
) -> Any:
    """torch's scaled_dot_product_attention with a dense mask over the gathered cache, where that can say it; else the
    reference."""
    bare = not set(options) - {"scale"} and options.get("scale") != 0  # there torch gives NaN
    if not bare or not key_cache.numel() or not query.numel() or int(cache_lengths.min()) < query.shape[2]:
        given = (query, key_cache, value_cache, cache_lengths)
        return reference.attention_decode(*given, block_table=block_table, **options)
    key, value = gathered(key_cache, block_table), gathered(value_cache, block_table)
    mask = _seen(query.shape[2], key.shape[2], tuple(cache_lengths.tolist()))
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=options.get("scale"), enable_gqa=gqa)


def moved(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """The keys and values up to each length, once; queries and the output."""
    size = torch.finfo(dtype).bits // 8
    lengths = case.make(torch.float32)["cache_lengths"]
    query, key, value = (case.inputs[name].shape for name in ("query", "key_cache", "value_cache"))
    rows = int(lengths.sum()) * key[1]
    return {"forward": (rows * (key[3] + value[3]) + math.prod(query[:-1]) * (query[3] + value[3])) * size}


def flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    lengths = case.make(torch.float32)["cache_lengths"]
    query, value = case.inputs["query"].shape, case.inputs["value_cache"].shape
    return {"forward": 2 * int(lengths.sum()) * query[1] * query[2] * (query[3] + value[3])}


def _full(label: str, query: Shape, cache: Shape, lengths: tuple[int, ...], blocks: int | None = None) -> Case:
    """With given lengths: what a benchmark row moves should not be drawn."""
    made = case(label, query, cache, blocks=blocks)
    return Case(label, {**made.inputs, "cache_lengths": Fixed((len(lengths),), dtype=torch.int32, values_=lengths)})


@dataclass(frozen=True)
class Fixed(Input):
    """These numbers."""

    values_: tuple[int, ...] = ()

    def make(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> Tensor:
        return torch.tensor(self.values_, dtype=self.dtype, device=device)


#: Caches past the share of the processor's cache that one tenant gets; the last is ragged, its lengths add up to half.
BENCH = (
    _full("8 heads of 64, 4 x 8192", (4, 8, 1, 64), (4, 8, 8192, 64), (8192,) * 4),
    _full("32 heads on 8 of 128, 2 x 8192", (2, 32, 1, 128), (2, 8, 8192, 128), (8192,) * 2),
    _full("the same, in blocks of 16", (2, 32, 1, 128), (512, 8, 16, 128), (8192,) * 2, 1024),
    _full("the same, 4 queries", (2, 32, 4, 128), (2, 8, 8192, 128), (8192,) * 2),
    _full("32 heads on 8 of 128, ragged", (4, 32, 1, 128), (4, 8, 8192, 128), (8192, 1000, 7000, 192)),
)
