"""Attention in plain torch. Autograd of these functions is the truth for gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._random import keep_mask, philox_words, seed_on

__all__ = ["attention", "attention_decode", "dropout_mask", "merge_attention", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """O = dropout(softmax(scale * Q K^T + mask)) V; a query that may attend to no key gets 0.

    An additive mask forbids a key with -inf or with the lowest finite number of its dtype.
    float16 and bfloat16 are computed in float32 and rounded once. Dropout keeps element e of the (..., Lq, Lk) weights,
    times 1 / (1 - p), iff `keep_mask` says so.
    """
    options = attn_mask, dropout_p, is_causal, scale, enable_gqa
    return attention_and_weights(query, key, value, *options, seed=seed)[0]


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention above, and its weights after dropout: (..., Lq, Dv), (..., Lq, Lk)."""
    dtype, (length, size) = query.dtype, query.shape[-2:]
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(length, key.shape[-2], dtype=torch.bool, device=query.device).tril()
    added = None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask, added = ~(attn_mask <= torch.finfo(attn_mask.dtype).min), attn_mask
    elif attn_mask is not None:
        # What no query may see must not be seen through 0 * NaN either.
        seen = torch.atleast_2d(attn_mask).any(-2).unsqueeze(-1)
        key, value = torch.where(seen, key, 0), torch.where(seen, value, 0)
    scores = (query * _scale(scale, size)) @ key.mT
    if added is not None:
        scores = scores + added
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf)
    alone = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.where(alone, 0, torch.where(alone, 0, scores).softmax(-1))
    if dropout_p > 0:
        keep = keep_mask(seed_on(seed, query.device), weights.shape, dropout_p)
        weights = torch.where(keep, weights * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0)
    return (weights @ value).to(dtype), weights.to(dtype)


def _scale(scale: float | None, size: int) -> float:
    return scale if scale is not None else 1 / math.sqrt(size) if size else 1.0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    prefix_length: int | Tensor | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with every mask. With p = i + Lk - Lq (p = i for causal="top_left"), head h, batch b:

        t_ij = scale * <q_i, k_j>;  t = softcap * tanh(t / softcap)
        s_ij = t_ij + bias_ij - alibi_slopes_h * |p - j|        where key j is allowed for query i, else -inf
        allowed: mask_ij, key_padding_mask_j, a bias above its dtype's lowest number,
                 p - left <= j <= p + right,  and for causal  j <= max(p, prefix_length_b - 1)
        lse_i = log(exp(sink_h) + sum_j exp(s_ij));   out_i = sum_j dropout(exp(s_ij - lse_i)) v_j

    A query with no allowed key gives 0, and the lse -inf (the sink, if there is one). Keys and values that no query may
    see do not matter, even if NaN. float16 and bfloat16 are computed in float32 and rounded once.
    """
    options = causal, window, softcap, dropout_p, scale if scale is not None else _scale(None, query.shape[-1])
    if cu_seqlens_q is None or cu_seqlens_k is None:
        per_batch = bias, mask, key_padding_mask, prefix_length, alibi_slopes, sinks
        out, lse = _masked_attention(query, key, value, *per_batch, *options, seed, 0)
        return (out, lse) if return_lse else out
    outs, lses, start = [], [], 0
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        q, k, v = (
            x[ends[b] : ends[b + 1]].transpose(0, 1).unsqueeze(0)
            for x, ends in ((query, q_ends), (key, k_ends), (value, k_ends))
        )
        lengths = q.shape[2], k.shape[2]
        per_sequence: tuple[Any, ...] = (
            *(_sequence(x, b, lengths) for x in (bias, mask)),
            None if key_padding_mask is None else key_padding_mask[b : b + 1, : lengths[1]],
            prefix_length[b : b + 1] if isinstance(prefix_length, Tensor) else prefix_length,
            alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b],
            sinks,
        )
        out, lse = _masked_attention(q, k, v, *per_sequence, *options, seed, start)  # type: ignore[call-arg]
        start += math.prod(lengths) * query.shape[1]
        outs.append(out.squeeze(0).transpose(0, 1))
        lses.append(lse.squeeze(0).transpose(0, 1))
    # The empty slices keep the result right (and connected) for no sequence at all.
    out = torch.cat([*outs, value.new_empty(0, query.shape[1], value.shape[2])])
    lse = torch.cat([*lses, torch.empty(0, query.shape[1], dtype=_lse_dtype(query), device=query.device)])
    return (out, lse) if return_lse else out


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention(causal=True)` of each entry's queries over the first cache_lengths_b keys of its cache.

    With p = i + cache_lengths_b - Lq: query i sees keys p - left <= j <= p. With a block table key j of entry b is row
    j % block_size of block block_table[b, j // block_size]. num_splits changes nothing here.
    """
    dtype = query.dtype
    seen = None
    if block_table is not None:
        real = (block_table >= 0) & (block_table < key_cache.shape[0])  # those beyond a length may be anything
        blocks, seen = block_table.long().where(real, 0), real.repeat_interleave(key_cache.shape[2], 1)
        key_cache, value_cache = (
            (x if x.shape[0] else x.new_zeros(1, *x.shape[1:]))[blocks].transpose(1, 2).flatten(2, 3)
            for x in (key_cache, value_cache)
        )
    if dtype in (torch.float16, torch.bfloat16):
        query, key_cache, value_cache = query.float(), key_cache.float(), value_cache.float()
    if cache_lengths is None:
        cache_lengths = torch.full(query.shape[:1], key_cache.shape[2], device=query.device)
    rows = torch.arange(query.shape[2], device=query.device) - query.shape[2]
    place = (cache_lengths.long().unsqueeze(-1) + rows)[:, None, :, None]
    distance = torch.arange(key_cache.shape[2], device=query.device) - place
    allowed = distance <= 0
    if seen is not None:
        allowed = allowed & seen[:, None, None]
    if window is not None and window[0] >= 0:
        allowed = allowed & (distance >= -window[0])
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes.to(query.dtype).unsqueeze(-1).unsqueeze(-1) * distance.abs()
    scale = _scale(scale, query.shape[-1])
    options = False, None, softcap, 0.0, scale, None, 0
    out, lse = _masked_attention(
        query,
        key_cache,
        value_cache,
        bias,
        allowed,
        None,
        None,
        None,
        sinks,
        *options,
    )
    return (out.to(dtype), lse) if return_lse else out.to(dtype)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """lse = log(sum_n exp(lse_n)), out = sum_n exp(lse_n - lse) out_n: attention over disjoint sets of keys together.

    In float32 (float64 for float64); where every part has the lse -inf, 0 and -inf.
    """
    dtype = outs[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stacked = torch.stack([x.to(wide) for x in lses])
    nothing = (stacked == -torch.inf).all(0)
    lse = torch.where(nothing, 0, stacked).logsumexp(0)
    shares = torch.where(nothing, -torch.inf, stacked - lse).exp().unsqueeze(-1)
    parts = torch.stack([x.to(wide) for x in outs])
    # A part without keys has the share 0; its values, whatever they are, must not matter.
    out = torch.where(shares > 0, shares * parts, 0).sum(0)
    return out.to(dtype), torch.where(nothing, -torch.inf, lse)


def dropout_mask(
    query: Tensor,
    key: Tensor,
    dropout_p: float,
    *,
    seed: int | Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """What `attention` keeps with this seed: bool (B, H, Lq, Lk); with cu_seqlens one (H, Lq, Lk) for each sequence.

    Element (b, h, i, j) is kept iff the Philox word at its row-major offset is >= round(dropout_p * 2**32).
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _keep(seed_on(seed, query.device), (*query.shape[:3], key.shape[2]), dropout_p, 0)
    masks, start = [], 0
    for q, k in zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True):
        masks.append(_keep(seed_on(seed, query.device), (query.shape[1], q, k), dropout_p, start))
        start += query.shape[1] * q * k
    return masks


def _keep(seed: Tensor, shape: Sequence[int], p: float, start: int) -> Tensor:
    offsets = torch.arange(start, start + math.prod(shape), dtype=torch.int64, device=seed.device)
    return (philox_words(seed, offsets) >= round(p * 2.0**32)).reshape(tuple(shape))


def _sequence(x: Tensor | None, b: int, lengths: tuple[int, int]) -> Tensor | None:
    """A bias or mask for sequence b alone."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.dim())]
    x = x[b : b + 1] if x.shape[0] > 1 else x
    q, k = lengths
    return x[:, :, : q if x.shape[2] > 1 else 1, : k if x.shape[3] > 1 else 1]


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _allowed(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    prefix_length: int | Tensor | None,
    causal: bool | str,
    window: tuple[int, int] | None,
    distance: Tensor,
) -> Tensor:
    """bool, broadcastable to (B, H, Lq, Lk), four dimensions; distance = j - p, (Lq, Lk)."""
    allowed = torch.ones_like(distance, dtype=torch.bool)[None, None]
    if causal:
        below = distance <= 0
        if prefix_length is not None:
            prefix = prefix_length.reshape(-1, 1, 1, 1) if isinstance(prefix_length, Tensor) else prefix_length
            below = below | (torch.arange(k.shape[2], device=k.device) < prefix)
        allowed = allowed & below
    if window is not None:
        left, right = window
        allowed = allowed & (distance >= -left) if left >= 0 else allowed
        allowed = allowed & (distance <= right) if right >= 0 else allowed
    if mask is not None:
        allowed = allowed & mask
    if bias is not None:
        allowed = allowed & ~(bias <= torch.finfo(bias.dtype).min)
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None]
    return allowed


def _masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    prefix_length: int | Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool | str,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
    scale: float,
    seed: int | Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    wide = q.dtype
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    offset = 0 if causal == "top_left" else k.shape[2] - q.shape[2]
    rows = torch.arange(q.shape[2], device=q.device).unsqueeze(-1) + offset
    distance = torch.arange(k.shape[2], device=q.device) - rows
    allowed = _allowed(q, k, bias, mask, key_padding_mask, prefix_length, causal, window, distance)
    seen = allowed.any(-2).unsqueeze(-1)  # what no query may see must not be seen through 0 * NaN either
    k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
    scores = (q * scale) @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide).unsqueeze(-1).unsqueeze(-1) * distance.abs()
    if bias is not None:
        scores = scores + torch.where(bias <= torch.finfo(bias.dtype).min, 0, bias)
    scores = torch.where(allowed, scores, -torch.inf)
    alone = (scores == -torch.inf).all(-1, keepdim=True)
    safe = torch.where(alone, 0, scores)
    weights = torch.where(alone, 0, safe.softmax(-1))
    lse = safe.logsumexp(-1) if k.shape[2] else q.new_zeros(q.shape[:3])
    lse = torch.where(alone.squeeze(-1), -torch.inf, lse)
    if sinks is not None:
        sink = sinks.to(wide).unsqueeze(-1)
        partial, lse = lse, torch.where(alone.squeeze(-1), sink, torch.logaddexp(safe.logsumexp(-1), sink))
        weights = weights * torch.sigmoid(torch.where(alone.squeeze(-1), 0, partial) - sink).unsqueeze(-1)
    if dropout_p > 0:
        keep = _keep(seed_on(seed, q.device), weights.shape, dropout_p, start)
        weights = torch.where(keep, weights / (1 - dropout_p), 0)
    return (weights @ v).to(dtype), lse
