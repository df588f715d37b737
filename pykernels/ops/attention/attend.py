"""`attention`: every mask, bias and layout in one function; and what goes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._backends import explaining
from .. import _check, _ids
from .._library import as_seed
from . import _arguments as arguments
from ._functions import ROOM, WIDE_HEADS, Masks, Options, run, run_plain

__all__ = ["attention", "dropout_mask", "merge_attention"]


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
    bounds_check: str = "error",
    backend: str | None = None,
) -> Any:
    """`softmax(mask(cap(scale * Q K^T) + bias)) V` with every kind of mask, in any combination.

    With p = i + Lk - Lq (p = i for `causal="top_left"`) the place of query i among the keys:

        t_ij  = softcap * tanh(scale * <q_i, k_j> / softcap)
        s_ij  = t_ij + bias_ij - alibi_slopes_h * |p - j|
        lse_i = log(exp(sinks_h) + sum_j exp(s_ij))
        out_i = sum_j dropout(exp(s_ij - lse_i)) v_j

    Without softcap `t_ij = scale * <q_i, k_j>`. s_ij is -inf where query i may not attend to key j; it may where all of
    these hold: `mask_ij`; `key_padding_mask_j`; with `window` p - left <= j <= p + right; with `causal` j <= p, or
    j < prefix_length.

    Args:
        query: Tensor[B, H, Lq, D], floating point.
        key: Tensor[B, Hkv, Lk, D] of query's dtype; Hkv divides H, each serves H / Hkv consecutive query heads.
        value: Tensor[B, Hkv, Lk, Dv]; Dv may differ from D.
        bias: added to the scores, **with gradient**; broadcastable to (B, H, Lq, Lk), of float32 or query's dtype. -inf
            and its dtype's lowest number forbid a key.
        mask: bool, broadcastable to (B, H, Lq, Lk); True = may attend.
        key_padding_mask: bool Tensor[B, Lk]; True = real token. (`nn.MultiheadAttention` has it the other way round.)
        causal: False, "bottom_right" (True means this: the last query sees the last key) or "top_left" (query i sees
            the keys up to i; this is what `scaled_dot_product_attention` and torch mean by is_causal).
        prefix_length: int or int Tensor[B]; with `causal`, keys below it are seen by every query (prefix LM).
        window: (left, right), how far before and after p keys are seen; -1: unbounded.
        alibi_slopes: floating-point Tensor[H] or Tensor[B, H].
        softcap: positive; bounds the scores. None: no cap (where others write 0).
        sinks: floating-point Tensor[H], a logit a head that takes part in the softmax and has no value; with gradient.
        dropout_p: in [0, 1); always active, pass 0.0 in evaluation. Element (b, h, i, j) is decided by the seed and its
            position alone, whatever the backend: `dropout_mask` gives the decisions.
        scale: default 1 / sqrt(D).
        cu_seqlens_q, cu_seqlens_k: int Tensor[B + 1], ends of the sequences in packed tensors, starting with 0; both or
            neither. Then query is Tensor[total_q, H, D], key Tensor[total_k, Hkv, D], value Tensor[total_k, Hkv, Dv],
            and (B, H, Lq, Lk) above stands for (B, H, max_seqlen_q, max_seqlen_k).
        max_seqlen_q, max_seqlen_k: lengths of the longest. Only a bias or mask needs them; where they are not given
            they are then read from the ends, which on a GPU waits for it.
        return_lse: return (out, lse), both differentiable.
        seed: an int or one-element int64 tensor that fixes the dropout mask; None draws one from torch's generator.
        bounds_check: what happens to wrong numbers in `cu_seqlens_*` and to negative ones in `prefix_length`. "error":
            on the CPU a ValueError before anything is computed; on a GPU the kernels keep to the packed length (and
            take a negative prefix for 0), and the next checked call or `pykernels.check_errors()` raises, with no
            synchronisation here. "sync": on a GPU this call waits and raises. "none": on a GPU nobody looks.
        backend: see `pykernels.explain`.

    Returns:
        out: Tensor[B, H, Lq, Dv] (packed: Tensor[total_q, H, Dv]) of query's dtype, computed in float32 (float64 for
        float64) and rounded once; with `return_lse` also lse: float32 Tensor[B, H, Lq] (packed: Tensor[total_q, H]),
        natural logarithm. A query that may attend to no key gives 0, lse -inf (or its sink) and zero gradients. Keys
        and values that no query may see do not matter, even if NaN. Under autocast query, key and value are cast to its
        lower precision.

    Raises:
        TypeError: an argument of another type.
        NotImplementedError: query not floating point.
        RuntimeError: different dtypes or devices; dimensions, shapes or numbers of heads that do not fit; a bias, mask
            or key_padding_mask of another dtype; one of cu_seqlens_q and cu_seqlens_k alone; max_seqlen_* without them.
        ValueError: `causal`, `window`, `softcap`, `dropout_p`, `prefix_length`, `max_seqlen_*` or the numbers in
            `cu_seqlens_*` outside what is allowed above (on a GPU as `bounds_check` says); unknown `bounds_check`.
        BackendError: the named backend cannot serve the call.

    Source: Dao, "FlashAttention-2" (arXiv 2307.08691); Raffel et al. (arXiv 1910.10683) for the prefix LM; Press et al.
    (arXiv 2108.12409) for ALiBi; Gemma 2 (arXiv 2408.00118) for the cap; Xiao et al. (arXiv 2309.17453) for sinks.
    """
    name = "attention"
    _ids.before(name, bounds_check)
    query, key, value = arguments.query_key_value(name, query, key, value)
    packed = arguments.packed(name, cu_seqlens_q, cu_seqlens_k)
    arguments.shapes(name, query, key, value, packed)
    heads = query.shape[1]
    if packed:
        cu_seqlens_q, cu_seqlens_k = arguments.both_sequences(name, cu_seqlens_q, cu_seqlens_k, query, key)
        batch = cu_seqlens_q.shape[0] - 1
        limits = (0, 0)
        if any(x is not None for x in (bias, mask, key_padding_mask, max_seqlen_q, max_seqlen_k)):
            limits = (
                arguments.longest(name, "max_seqlen_q", max_seqlen_q, cu_seqlens_q),
                arguments.longest(name, "max_seqlen_k", max_seqlen_k, cu_seqlens_k),
            )
    else:
        for label, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if longest is not None:
                raise RuntimeError(f"{name}(): argument '{label}' must be None without cu_seqlens, not {longest}")
        batch, limits = query.shape[0], (query.shape[2], key.shape[2])
    weights = (batch, heads, *limits)
    if bias is not None:
        bias = arguments.four_dimensions(name, "bias", bias, weights, query)
        arguments.bias_dtype(name, "bias", bias, query)
    if mask is not None:
        mask = arguments.four_dimensions(name, "mask", mask, weights, query)
        arguments.boolean(name, "mask", mask)
    if key_padding_mask is not None:
        _check.tensor(name, "key_padding_mask", key_padding_mask)
        arguments.boolean(name, "key_padding_mask", key_padding_mask)
        _ids.same_device(name, "key_padding_mask", key_padding_mask, "query", query)
        if tuple(key_padding_mask.shape) != (batch, limits[1]):
            given = tuple(key_padding_mask.shape)
            raise RuntimeError(
                f"{name}(): argument 'key_padding_mask' must have the shape {(batch, limits[1])}, not {given}"
            )
    features = []
    if alibi_slopes is not None:
        alibi_slopes = arguments.per_head(name, "alibi_slopes", alibi_slopes, ((heads,), (batch, heads)), query)
        if torch.is_grad_enabled() and alibi_slopes.requires_grad:
            features.append("gradient of alibi_slopes")
    if max(query.shape[-1], value.shape[-1]) > 256:
        features.append(WIDE_HEADS)
    if sinks is not None:
        sinks = arguments.per_head(name, "sinks", sinks, ((heads,),), query)
    options = Options(
        arguments.alignment(name, causal),
        *arguments.window_bounds(name, window),
        0.0 if softcap is None else arguments.positive(name, "softcap", softcap),
        arguments.probability(name, "dropout_p", dropout_p),
        default_scale(query) if scale is None else _check.number(name, "scale", scale),
    )
    prefix = arguments.prefix_lengths(name, prefix_length, batch, query)
    if explaining():
        keys = key.shape[0 if packed else 2]
        terms = (bias, mask, key_padding_mask, alibi_slopes)
        ROOM.explained = (query, value, keys, terms, options.softcap, options.dropout_p, options.scale)
    chosen = ROOM.resolve(name, backend, query, *features)
    if packed:
        given = (chosen, bounds_check, name)
        cu_seqlens_q = _ids.checked(*given, "cu_seqlens_q", cu_seqlens_q, query.shape[0], "ends")
        cu_seqlens_k = _ids.checked(*given, "cu_seqlens_k", cu_seqlens_k, key.shape[0], "ends")
    if prefix is not None and isinstance(prefix_length, Tensor):
        prefix = _ids.checked(chosen, bounds_check, name, "prefix_length", prefix, 2**63 - 1, "counts", fill=0)
    drawn = as_seed(seed, query, name) if options.dropout_p > 0 else None
    if chosen != "reference":
        alibi_slopes = None if alibi_slopes is None else alibi_slopes.detach().float()
        sinks = None if sinks is None else sinks.float()
    masks = Masks(mask, key_padding_mask, prefix, alibi_slopes, cu_seqlens_q, cu_seqlens_k, drawn)
    if chosen != "reference" and not return_lse and bias is None and sinks is None and all(x is None for x in masks):
        return run_plain(chosen, query, key, value, options)
    out, lse = run(chosen, query, key, value, bias, sinks, masks, options)
    _ids.after(bounds_check)
    return (out, lse) if return_lse else out


def default_scale(query: Tensor) -> float:
    """1 / sqrt(D)."""
    return 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`lse = log(sum_n exp(lse_n))`, `out = sum_n exp(lse_n - lse) out_n`: over disjoint sets of keys.

    What `attention(..., return_lse=True)` gives for parts of the keys (of a split cache, of the ranks of a context
    parallel group) becomes what it gives for all of them. Differentiable in everything. Sinks belong to one part only.

    Args:
        outs: one or more Tensor[..., D] of one shape and dtype.
        lses: as many Tensor[...] (out's shape without D).
        backend: plain torch ("reference") serves this function.

    Returns:
        out of outs' dtype, lse float32 (float64 for float64); 0 and -inf where every part has the lse -inf.

    Raises:
        TypeError: not sequences of tensors.   ValueError: no part, or not as many lses as outs.
        RuntimeError: shapes, dtypes or devices that do not fit.
        BackendError: another backend is named.
    """
    name = "merge_attention"
    for label, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, Sequence):
            raise TypeError(f"{name}(): argument '{label}' must be a sequence of tensors, not {type(given).__name__}")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{name}(): outs and lses must be as many, at least one, not {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        _check.tensor(name, "outs", out)
        _check.tensor(name, "lses", lse)
        _check.same(name, "outs", out, "outs[0]", outs[0])
        _ids.same_device(name, "lses", lse, "outs[0]", outs[0])
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise RuntimeError(
                f"{name}(): arguments 'outs' and 'lses' must have one shape, and that without its last dimension, "
                f"not {tuple(out.shape)} and {tuple(lse.shape)} beside {tuple(outs[0].shape)}"
            )
    ROOM.resolve(name, backend, outs[0], "merge_attention")
    return reference.merge_attention(outs, lses)


def dropout_mask(
    query: Tensor,
    key: Tensor,
    dropout_p: float,
    *,
    seed: int | Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """What `attention(query, key, ..., dropout_p=dropout_p, seed=seed)` keeps: True = kept, then times 1 / (1 - p).

    Element (b, h, i, j) is kept iff the first word of Philox4x32-10 with the seed as key and the element's row-major
    index as counter is at least round(dropout_p * 2**32). Packed sequences count on, one after another.

    Args:
        query: Tensor[B, H, Lq, D]; only its shape matters, as of key: Tensor[B, Hkv, Lk, D]. Packed: as in `attention`.
        backend: plain torch ("reference") serves this function.

    Returns:
        bool Tensor[B, H, Lq, Lk]; with cu_seqlens a list of one bool Tensor[H, Lq, Lk] for each sequence.

    Raises:
        TypeError: an argument that is not a Tensor, another `seed`.   RuntimeError: dimensions that do not fit; one of
            cu_seqlens_q and cu_seqlens_k alone.
        ValueError: `dropout_p` outside [0, 1); numbers in `cu_seqlens_*` as in `attention`.
        BackendError: another backend is named.
    """
    name = "dropout_mask"
    p = arguments.probability(name, "dropout_p", dropout_p)
    for label, x in (("query", query), ("key", key)):
        _check.tensor(name, label, x)
    packed = arguments.packed(name, cu_seqlens_q, cu_seqlens_k)
    arguments.shapes(name, query, key, key, packed)
    if packed:
        cu_seqlens_q, cu_seqlens_k = arguments.both_sequences(name, cu_seqlens_q, cu_seqlens_k, query, key)
    ROOM.resolve(name, backend, query, "dropout_mask")
    given = as_seed(seed, query, name)
    return reference.dropout_mask(query, key, p, seed=given, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
