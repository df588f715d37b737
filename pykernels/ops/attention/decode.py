"""`attention_decode`: a few new queries of each sequence over its cache of keys and values. For inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _attended, _errors, reference
from ..._backends import is_compiling
from .. import _autocast, _check, _ids
from .._library import define
from . import _arguments as arguments
from ._functions import ROOM, WIDE_HEADS
from .attend import default_scale

__all__ = ["attention_decode"]

NAME = "attention_decode"
MANY_KEYS = "more than 2^30 keys a sequence"  # a feature that not every backend serves (see Room.resolve)
_LENGTHS = _errors.code(NAME, "cache_lengths", "block_table")


def _fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _attended.results(query, value_cache)[:2]


attention_decode_forward = define(
    ROOM,
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? cache_lengths, "
    "Tensor? block_table, Tensor? sinks, Tensor? alibi_slopes, SymInt window_left, float softcap, float scale, "
    "int num_splits, int what) -> (Tensor, Tensor)",
    _fake,
)


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor | None,
    *,
    block_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Any:
    """`attention(causal=True)` of the queries of each sequence b over the first cache_lengths_b rows of its cache.

    With p = i + cache_lengths_b - Lq the place of query i (the Lq queries are the last of the sequence; their own keys
    and values are in the cache already):

        t_ij  = softcap * tanh(scale * <q_i, k_j> / softcap)
        s_ij  = t_ij - alibi_slopes_h * (p - j)
        lse_i = log(exp(sinks_h) + sum_j exp(s_ij))
        out_i = sum_j exp(s_ij - lse_i) v_j

    Without softcap `t_ij = scale * <q_i, k_j>`. s_ij is -inf unless p - left <= j <= p.
    Keys and values are read once: all queries of all heads that share a key head go together. What lies beyond a
    length (or before every window) is not read, and neither are the entries of the block table for it.

    Args:
        query: Tensor[B, H, Lq, D], floating point; Lq is small (1, or a few that are tried at once).
        key_cache: Tensor[B, Hkv, S, D] of query's dtype; Hkv divides H, each serves H / Hkv consecutive query heads.
            With `block_table` Tensor[blocks, Hkv, block_size, D].
        value_cache: Tensor[B, Hkv, S, Dv] or Tensor[blocks, Hkv, block_size, Dv]; Dv may differ from D.
        cache_lengths: int32 or int64 Tensor[B], each in [0, S]; with `block_table` in [0, max_blocks * block_size].
            None: every cache is full.
        block_table: int32 Tensor[B, max_blocks]; key j of sequence b is row j % block_size of block
            block_table[b, j // block_size]. Sequences may share blocks.
        window: (left, right), as in `attention`; right has no meaning, as no query sees a later key.
        softcap, sinks, alibi_slopes, scale: as in `attention`, without gradient.
        num_splits: into how many parts a sequence's keys are cut, which are worked on side by side and then merged in
            order: 1 to 256. None chooses by the shapes (and on a GPU the number of its multiprocessors). For a given
            number results have the same bits on every run and for any number of threads.
        return_lse: return (out, lse).
        bounds_check: what happens to a length or an entry of the block table that is out of range. "error": on the CPU
            an IndexError before anything is read; on a GPU such a sequence has no keys, such a block is not seen, and
            the next checked call or `pykernels.check_errors()` raises, with no synchronisation here. "sync": the same,
            but on a GPU this call waits and raises. "none": on a GPU silently; native CPU code raises all the same.
        backend: see `pykernels.explain`.

    Returns:
        out: Tensor[B, H, Lq, Dv] of query's dtype, computed in float32 (float64 for float64) and rounded once; with
        `return_lse` also lse: float32 Tensor[B, H, Lq], natural logarithm. A query without keys (of an empty cache, or
        one of more queries than the cache has keys) gives 0 and lse -inf (or its sink). Under autocast query is cast
        to the cache's dtype.

    Raises:
        TypeError: an argument of another type.
        NotImplementedError: query not floating point.
        RuntimeError: different dtypes or devices; dimensions, shapes or numbers of heads that do not fit; block_table
            not int32; an argument that requires grad while gradients are recorded.
        ValueError: `window`, `softcap`, `num_splits` or `bounds_check` outside what is allowed above.
        IndexError: a length or an entry of the block table that is needed is out of range: position and value are
            named. On a GPU as `bounds_check` says.
        BackendError: the named backend cannot serve the call; those of GPUs have no room for more than 2^30 keys a
            sequence.

    Source: Dao et al., "Flash-Decoding" (2023); Kwon et al. (arXiv 2309.06180) for the paged cache.
    """
    plain = window is None and softcap is None and sinks is None and alibi_slopes is None and num_splits is None
    if plain and _nothing_to_check(query, key_cache, value_cache, cache_lengths, block_table):
        left, cap, splits = -1, 0.0, 0
        features: tuple[str, ...] = ()
    else:
        query, key_cache, value_cache = _tensors(query, key_cache, value_cache)
        heads, batch = query.shape[1], query.shape[0]
        _check_cache(query, key_cache, value_cache, block_table is not None)
        _check_lengths(query, cache_lengths, block_table)
        if alibi_slopes is not None:
            alibi_slopes = arguments.per_head(NAME, "alibi_slopes", alibi_slopes, ((heads,), (batch, heads)), query)
        if sinks is not None:
            sinks = arguments.per_head(NAME, "sinks", sinks, ((heads,),), query)
        left, _ = arguments.window_bounds(NAME, window)
        cap = 0.0 if softcap is None else arguments.positive(NAME, "softcap", softcap)
        splits = _splits(num_splits)
        if torch.is_grad_enabled():
            _refuse_gradients(query=query, key_cache=key_cache, value_cache=value_cache)
            _refuse_gradients(sinks=sinks, alibi_slopes=alibi_slopes)
        features = (WIDE_HEADS,) if max(query.shape[-1], value_cache.shape[-1]) > 256 else ()
        if _attended.room_for_keys(key_cache, block_table) > _attended.MOST_KEYS:
            features += (MANY_KEYS,)
    used = default_scale(query) if scale is None else _check.number(NAME, "scale", scale)
    chosen = ROOM.resolve(NAME, backend, query, *features)
    _ids.before(NAME, bounds_check)
    if bounds_check != "none" and chosen != "cpu":  # the native kernels look for themselves
        cache_lengths, block_table = _checked(chosen, query, key_cache, cache_lengths, block_table, left)
    if chosen == "reference":
        return reference.attention_decode(
            query,
            key_cache,
            value_cache,
            cache_lengths,
            block_table=block_table,
            window=(left, 0),
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            scale=used,
            return_lse=return_lse,
        )
    sinks = None if sinks is None else sinks.float()
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.float()
    what = 0 if bounds_check == "none" else _LENGTHS
    out, lse = attention_decode_forward[chosen](
        query, key_cache, value_cache, cache_lengths, block_table, sinks, alibi_slopes, left, cap, used, splits, what
    )
    _ids.after(bounds_check)
    return (out, lse) if return_lse else out


def _nothing_to_check(query: Any, key: Any, value: Any, lengths: Any, table: Any) -> bool:
    """Whether the arguments are as in most calls: shapes that fit as they are, one dtype and device, no gradient, no
    autocast. What is not sure is left to the checks."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor) and query.dim() == 4):
        return False
    shape, cache, device = query.shape, key.shape, query.device
    if key.dim() != 4 or cache != value.shape or shape[3] != cache[3] or shape[3] > 256:
        return False
    if shape[1] != cache[1] and (cache[1] == 0 or shape[1] % cache[1]):
        return False
    room = cache[2]
    if table is None:
        if shape[0] != cache[0]:
            return False
    else:
        if not isinstance(table, Tensor) or table.dtype != torch.int32 or table.dim() != 2:
            return False
        if table.shape[0] != shape[0] or table.device != device:
            return False
        room *= table.shape[1]
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            return False
        if lengths.dim() != 1 or lengths.shape[0] != shape[0] or lengths.device != device:
            return False
    return (
        room <= _attended.MOST_KEYS
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _check.FLOATS
        and device == key.device == value.device
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not (torch.is_autocast_enabled("cpu") if query.is_cpu else _autocast.enabled(device))
    )


def _tensors(query: Any, key_cache: Any, value_cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    for label, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        _check.tensor(NAME, label, x)
    _check.floating(NAME, "query", query)
    if query.dtype != key_cache.dtype and key_cache.is_floating_point() and _autocast.enabled(query.device):
        query = query.to(key_cache.dtype)
    for label, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        _check.same(NAME, label, x, "query", query)
    return query, key_cache, value_cache


def _check_cache(query: Tensor, key_cache: Tensor, value_cache: Tensor, paged: bool) -> None:
    layouts = {
        "query": "(batch, heads, length, head size)",
        "cache": "(blocks, heads, block size, head size)" if paged else "(batch, heads, length, head size)",
    }
    for label, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if x.dim() != 4:
            layout = layouts[label.rsplit("_", 1)[-1]]
            raise RuntimeError(f"{NAME}(): argument '{label}' must have the dimensions {layout}, not {tuple(x.shape)}")
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    argument = f"{NAME}(): argument 'key_cache'"
    if key_cache.shape[-1] != query.shape[-1]:
        raise RuntimeError(f"{argument} must have query's head size {query.shape[-1]}, not {key_cache.shape[-1]}")
    if value_cache.shape[:-1] != key_cache.shape[:-1]:
        raise RuntimeError(
            f"{NAME}(): argument 'value_cache' must have key_cache's shape {tuple(key_cache.shape[:-1])} before the "
            f"head size, not {tuple(value_cache.shape[:-1])}"
        )
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise RuntimeError(f"{argument} must have a number of heads that divides query's {heads}, not {kv_heads}")
    if not paged and key_cache.shape[0] != query.shape[0]:
        raise RuntimeError(f"{argument} must have query's batch size {query.shape[0]}, not {key_cache.shape[0]}")


def _check_lengths(query: Tensor, cache_lengths: Any, block_table: Any) -> None:
    batch = query.shape[0]
    if cache_lengths is not None:
        _check.tensor(NAME, "cache_lengths", cache_lengths)
        _ids.integers(NAME, "cache_lengths", cache_lengths)
        _ids.same_device(NAME, "cache_lengths", cache_lengths, "query", query)
        if tuple(cache_lengths.shape) != (batch,):
            given = tuple(cache_lengths.shape)
            raise RuntimeError(f"{NAME}(): argument 'cache_lengths' must have the shape ({batch},), not {given}")
    if block_table is None:
        return
    _check.tensor(NAME, "block_table", block_table)
    _ids.same_device(NAME, "block_table", block_table, "query", query)
    if block_table.dtype != torch.int32:
        raise RuntimeError(f"{NAME}(): argument 'block_table' must be int32, not {block_table.dtype}")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        given = tuple(block_table.shape)
        raise RuntimeError(f"{NAME}(): argument 'block_table' must have the shape ({batch}, max_blocks), not {given}")


def _splits(given: Any) -> int:
    """0 where the backend chooses."""
    if given is None:
        return 0
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{NAME}(): argument 'num_splits' must be int or None, not {type(given).__name__}")
    if not 1 <= given <= _attended.MOST_SPLITS:
        raise ValueError(f"{NAME}(): argument 'num_splits' must be in [1, {_attended.MOST_SPLITS}], not {given}")
    return given


def _refuse_gradients(**tensors: Tensor | None) -> None:
    for label, x in tensors.items():
        if x is not None and x.requires_grad:
            raise RuntimeError(
                f"{NAME}(): argument '{label}' requires grad, and this function has no backward; call it under "
                "torch.no_grad(), or `attention`"
            )


def _checked(
    backend: str, query: Tensor, key_cache: Tensor, lengths: Tensor | None, table: Tensor | None, left: int
) -> tuple[Tensor | None, Tensor | None]:
    """Lengths and block table, looked at where that waits for nothing, as the native kernels do: of the table what is
    needed. In graphs on the CPU the reference's are; other kernels report."""
    graph = backend == "reference" and query.is_cpu and is_compiling()
    if not graph and not (query.is_cpu and _ids.readable(query)):
        return lengths, table
    size = key_cache.shape[2]
    limit = size if table is None else size * table.shape[1]
    if lengths is None:
        lengths = torch.full((query.shape[0],), limit, device=query.device)
    elif graph:
        lengths = _ids.checked(backend, "error", NAME, "cache_lengths", lengths, limit + 1)
    else:
        _ids.in_range(NAME, "cache_lengths", lengths, limit + 1)
    if table is None or table.numel() == 0:
        return lengths, table
    start = torch.arange(table.shape[1], device=query.device) * size
    last = lengths.unsqueeze(-1)
    needed = start < last
    if left >= 0:
        needed = needed & (start + size > last - query.shape[2] - min(left, limit))
    used, blocks = torch.where(needed, table, 0), max(key_cache.shape[0], 1)
    if graph:
        return lengths, _ids.checked(backend, "error", NAME, "block_table", used, blocks)
    _ids.in_range(NAME, "block_table", used, blocks)
    return lengths, table
