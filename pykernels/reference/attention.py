"""Attention in plain torch. Autograd of these functions is the truth for gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._random import keep_mask

__all__ = ["scaled_dot_product_attention"]


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
    seed: Tensor | None = None,
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
    seed: Tensor | None = None,
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
        assert seed is not None
        keep = keep_mask(seed.to(query.device), weights.shape, dropout_p)
        weights = torch.where(keep, weights * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0)
    return (weights @ value).to(dtype), weights.to(dtype)


def _scale(scale: float | None, size: int) -> float:
    return scale if scale is not None else 1 / math.sqrt(size) if size else 1.0
