"""Attention: torch's scaled dot product attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._backends import explaining
from ...reference.attention import attention_and_weights as _reference_and_weights
from .. import _autocast, _check, _ids
from .._library import as_seed
from . import _arguments as arguments
from ._functions import ROOM, WIDE_HEADS, Masks, Options, run, run_plain
from .attend import default_scale

__all__ = ["scaled_dot_product_attention"]

_SHARED_DROPOUT = "dropout decisions shared by values of a larger batch"


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
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale * query key^T + mask) value`. As `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: Tensor[..., H, Lq, D], floating point; two or more dimensions.
        key: Tensor[..., Hkv, Lk, D] of query's dtype and device. Dimensions before the last two broadcast.
        value: Tensor[..., Hkv, Lk, Dv], likewise.
        attn_mask: broadcastable to (..., H, Lq, Lk). bool: True = may attend. Floating point (float32 or query's
            dtype): added to the scores, with gradient; -inf and the dtype's lowest number forbid.
        dropout_p: probability of dropping a weight; always active, pass 0.0 in evaluation.
        is_causal: query i may attend to key j iff j <= i (aligned at the **top left**, also where Lq != Lk). Not
            together with `attn_mask`.
        scale: default 1 / sqrt(D).
        enable_gqa: key and value may have fewer heads (dimension -3): a number that divides query's; each serves a
            group of consecutive query heads.
        seed: an int or one-element int64 tensor that fixes the dropout mask; None draws one from torch's generator.
        backend: see `pykernels.explain`.

    Returns:
        Tensor[..., H, Lq, Dv] of query's dtype, computed in float32 (float64 for float64) and rounded once. A query
        that may attend to no key (Lk = 0 too) gives 0, with zero gradients (torch: the mean of all values where the
        lowest number forbids). Keys and values that a bool mask hides from
        every query do not matter, even if NaN. Under autocast query, key and value are cast to its lower precision.

    Raises:
        TypeError: an argument is not a Tensor; a `seed` of another type.
        NotImplementedError: not floating point.
        RuntimeError: fewer than two dimensions; different dtypes or devices; shapes that do not fit; a mask of another
            dtype; `attn_mask` with `is_causal`; `dropout_p` outside [0, 1]; numbers of heads that do not divide.
        IndexError: `enable_gqa` with fewer than three dimensions.
        BackendError: the named backend cannot serve the call.
    """
    name = "scaled_dot_product_attention"
    if attn_mask is None and dropout_p == 0 and _nothing_to_check(query, key, value, enable_gqa) and not explaining():
        chosen = ROOM.resolve(name, backend, query)
        if chosen != "reference":
            used = default_scale(query) if scale is None else scale
            options = Options("top_left" if is_causal else "none", -1, -1, 0.0, 0.0, used)
            return run_plain(chosen, query, key, value, options)
    query, key, value = _tensors(name, query, key, value)
    if query.dim() == 4 and query.shape == key.shape == value.shape:  # nothing to broadcast, nothing to check
        batch = query.shape[:2]
        weights: tuple[int, ...] = (*batch, query.shape[2], query.shape[2])
    else:
        weights = _check_shapes(name, query, key, value, enable_gqa)
        batch = _batch(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(name, attn_mask, weights, query, is_causal)
    _check_dropout(name, dropout_p)
    shared = dropout_p > 0 and math.prod(batch) != math.prod(weights[:-2])
    wide = query.shape[-1] > 256 or value.shape[-1] > 256
    features = (*((_SHARED_DROPOUT,) if shared else ()), *((WIDE_HEADS,) if wide else ()))
    used = default_scale(query) if scale is None else scale
    if explaining():
        ROOM.explained = (query, value, key.shape[-2], (attn_mask, None, None, None), 0.0, dropout_p, used)
    chosen = ROOM.resolve(name, backend, query, *features)
    drawn = as_seed(seed, query, name) if dropout_p > 0 else None
    if chosen == "reference":
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, seed=drawn
        )
    q, k, v = _four_dimensions(query, key, value, batch, enable_gqa)
    mask = None if attn_mask is None else _four_dimensional_mask(attn_mask, batch)
    additive = mask is not None and mask.dtype != torch.bool
    options = Options(
        causal="top_left" if is_causal else "none",
        dropout_p=dropout_p,
        scale=used,
    )
    masks = Masks(mask=None if additive else mask, seed=drawn)
    out, _ = run(chosen, q, k, v, mask if additive else None, None, masks, options)
    return out if len(batch) == 2 else out.reshape(*batch, *out.shape[-2:])


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights (after dropout), which no fused kernel has: for `MultiheadAttention`."""
    name = "scaled_dot_product_attention"
    query, key, value = _tensors(name, query, key, value)
    _check_mask(name, attn_mask, _check_shapes(name, query, key, value, False), query, False)
    _check_dropout(name, dropout_p)
    ROOM.resolve(name, backend, query, "attention weights as a result")
    drawn = as_seed(None, query, name) if dropout_p > 0 else None
    return _reference_and_weights(query, key, value, attn_mask, dropout_p, seed=drawn)


def _nothing_to_check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the arguments are as in most calls: four dimensions that fit as they are, one dtype and device, no
    autocast."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor) and query.dim() == 4):
        return False
    shape, kv_shape = query.shape, key.shape
    if shape != kv_shape:  # another length; or fewer heads
        if key.dim() != 4 or shape[0] != kv_shape[0] or shape[3] != kv_shape[3]:
            return False
        if shape[1] != kv_shape[1] and not (enable_gqa and kv_shape[1] and shape[1] % kv_shape[1] == 0):
            return False
    return (
        kv_shape == value.shape
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _check.FLOATS
        and query.device == key.device == value.device
        and shape[3] <= 256
        and not (torch.is_autocast_enabled("cpu") if query.is_cpu else _autocast.enabled(query.device))
    )


def _tensors(name: str, *given: Any) -> list[Tensor]:
    tensors = arguments.query_key_value(name, *given)
    for label, x in zip(("query", "key", "value"), tensors, strict=True):
        if x.dim() < 2:
            raise RuntimeError(f"{name}(): argument '{label}' must have at least 2 dimensions, not {x.dim()}")
    return tensors


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """torch.broadcast_shapes, which takes 20 us, asked only where the shapes differ."""
    first = tuple(shapes[0])
    return first if all(tuple(shape) == first for shape in shapes) else tuple(torch.broadcast_shapes(*shapes))


def _batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The output's dimensions before the last two."""
    kept = 3 if enable_gqa else 2
    leading = _broadcast(*(x.shape[:-kept] for x in (query, key, value)))
    return (*leading, query.shape[-3]) if enable_gqa else leading


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, batch: tuple[int, ...], enable_gqa: bool
) -> tuple[Tensor, ...]:
    """(B, H, L, D) views, broadcast; a copy only where several batch dimensions cannot become one."""
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (x.repeat_interleave(batch[-1] // x.shape[-3], -3) for x in (key, value))
    found = []
    for x in (query, key, value):
        shape = (*batch[:-1], *x.shape[-3:]) if enable_gqa else (*batch, *x.shape[-2:])
        x = x if tuple(x.shape) == shape else x.expand(shape)
        found.append(x if x.dim() == 4 else x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4))
    return tuple(found)


def _four_dimensional_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    if len(batch) <= 2:
        return mask[(None,) * (4 - mask.dim())]
    mask = mask[(None,) * (len(batch) + 2 - mask.dim())]
    return mask.expand(*batch[:-1], *mask.shape[-3:]).flatten(0, -4)


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """Returns the shape of the weights."""
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"{name}(): argument 'key' must have query's head size {query.shape[-1]}, not {key.shape[-1]}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(f"{name}(): argument 'value' must have key's length {key.shape[-2]}, not {value.shape[-2]}")
    shapes = []
    for label, x in (("query", query), ("key", key), ("value", value)):
        batch = list(x.shape[:-2])
        if enable_gqa:
            if x.dim() < 3:
                raise IndexError(f"{name}(): argument '{label}' must have a head dimension (-3) with enable_gqa")
            if query.shape[-3] != batch[-1] and (batch[-1] == 0 or query.shape[-3] % batch[-1]):
                raise RuntimeError(
                    f"{name}(): argument '{label}' must have a number of heads that divides query's "
                    f"{query.shape[-3]}, not {batch[-1]}"
                )
            batch[-1] = query.shape[-3]
        shapes.append(tuple(batch))
    try:
        _broadcast(*shapes)
    except RuntimeError:
        given = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise RuntimeError(
            f"{name}(): query, key and value must broadcast in the dimensions before the last two; they have {given}"
        ) from None
    return (*_broadcast(*shapes[:2]), query.shape[-2], key.shape[-2])


def _check_mask(name: str, mask: Tensor | None, weights: tuple[int, ...], query: Tensor, is_causal: bool) -> None:
    if mask is None:
        return
    _check.tensor(name, "attn_mask", mask)
    if is_causal:
        raise RuntimeError(f"{name}(): argument 'attn_mask' must be None with is_causal=True")
    _ids.same_device(name, "attn_mask", mask, "query", query)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        allowed = " or ".join(dict.fromkeys(("torch.bool", "torch.float32", str(query.dtype))))
        raise RuntimeError(f"{name}(): argument 'attn_mask' must be {allowed}, not {mask.dtype}")
    try:
        fits = torch.broadcast_shapes(mask.shape, weights) == weights
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(
            f"{name}(): argument 'attn_mask' must be broadcastable to {tuple(weights)}, not {tuple(mask.shape)}"
        )


def _check_dropout(name: str, dropout_p: float) -> None:
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"{name}(): argument 'dropout_p' must be between 0 and 1, not {dropout_p}")
