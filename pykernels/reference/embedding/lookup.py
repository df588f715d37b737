"""Embedding lookup and pooled lookup in plain torch. Autograd of these functions is the truth for gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._rows import gather_rows

__all__ = ["embedding", "embedding_bag", "embedding_bag_multi"]


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """y[..., :] = weight[input[...], :].

    dweight[v] = s_v * (sum of dy over the positions with id v), s_v = 0 for `padding_idx`, 1 / (count of v in `input`)
    with `scale_grad_by_freq`, else 1. With `max_norm` the looked-up rows of norm n > max_norm are first multiplied, in
    place, by max_norm / (n + 1e-7).
    """
    ids = input.reshape(-1)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    rows = _rows(weight, ids, padding, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding is not None:
        rows = torch.where((ids == padding).unsqueeze(1), rows.detach(), rows)
    return rows.to(weight.dtype).reshape(input.shape + weight.shape[1:])


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """y[b] = reduction over the ids i of bag b that are not `padding_idx` of weight[i].

    sum:   y[b] = sum_i p_i weight[i];   mean: the same divided by the number n_b of such ids;   max: elementwise, ties
    give the first id the gradient. p_i is `per_sample_weights`, else 1. A bag without ids gives 0. Sums are taken in
    float32 (float64 for float64) and rounded once. `max_norm` and `scale_grad_by_freq` as in `embedding`.
    """
    ids = input.reshape(-1)
    bag, bags = bag_of_each(input, offsets, include_last_offset)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    rows = _rows(weight, ids, padding, max_norm, norm_type, scale_grad_by_freq, sparse)
    counted = torch.ones_like(bag, dtype=torch.bool) if padding is None else ids != padding
    if mode == "max":
        return _segment_max(rows, counted, bag, bags).to(weight.dtype)
    return pool(rows, counted, bag, bags, mode, per_sample_weights).to(weight.dtype)


def embedding_bag_multi(
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor | None] | None,
    weights: Sequence[Tensor],
    *,
    mode: str = "sum",
    per_sample_weights: Sequence[Tensor] | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """y = [bag(indices[0], weights[0]) | bag(indices[1], weights[1]) | ...], bag = `embedding_bag`: (B, sum of D)."""
    out = []
    for table, (ids, weight) in enumerate(zip(indices, weights, strict=True)):
        starts = None if offsets is None else offsets[table]
        scale = None if per_sample_weights is None else per_sample_weights[table]
        out.append(
            embedding_bag(
                ids, weight, starts, mode=mode, per_sample_weights=scale, include_last_offset=include_last_offset
            )
        )
    return torch.cat(out, 1)


def _rows(
    weight: Tensor,
    ids: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    """The looked-up rows, in float32 for a half-precision table, with the gradient scaled by frequency if asked."""
    if max_norm is not None:
        renormalise_(weight.detach(), ids, max_norm, norm_type)
    rows = gather_rows(weight, ids, sparse, padding_idx)
    if not scale_grad_by_freq:
        return rows
    counts = ids.new_zeros(weight.shape[0]).index_add(0, ids, torch.ones_like(ids))
    scale = 1 / counts.index_select(0, ids).to(rows.dtype).unsqueeze(1)
    # rows - rows.detach() is zero with the gradient of rows. Infinity minus infinity is not: those entries keep their
    # value, and the unscaled gradient.
    value = rows.detach()
    return torch.where(value.isfinite(), value + (rows - value) * scale, rows)


def renormalise_(weight: Tensor, ids: Tensor, max_norm: float, norm_type: float) -> None:
    """Scales the rows of these ids whose norm n > max_norm by max_norm / (n + 1e-7), in place; skips invalid ids."""
    if ids.numel() == 0 or weight.shape[0] == 0:
        return
    valid = (ids >= 0) & (ids < weight.shape[0])
    ids = torch.where(valid, ids, torch.where(valid, ids, 0).amax()).long()  # one that is written anyway
    rows = weight.index_select(0, ids).double()
    norms = torch.linalg.vector_norm(rows, norm_type, dim=1, keepdim=True)
    rows = torch.where((norms > max_norm) & valid.any(), rows * (max_norm / (norms + 1e-7)), rows)
    weight.index_copy_(0, ids, rows.to(weight.dtype))  # a repeated id writes the same values again


def pool(rows: Tensor, counted: Tensor, bag: Tensor, bags: int, mode: str, per_sample_weights: Tensor | None) -> Tensor:
    """Sums or means of the rows of each bag that are counted."""
    rows = torch.where(counted.unsqueeze(1), rows, 0)
    if per_sample_weights is not None:
        rows = rows * torch.where(counted, per_sample_weights.reshape(-1), 0).to(rows.dtype).unsqueeze(1)
    # One bag more than there are: it takes the ids beyond the last offset.
    out = rows.new_zeros(bags + 1, rows.shape[1]).index_add(0, bag, rows)[:bags]
    if mode == "mean":
        sizes = rows.new_zeros(bags + 1).index_add(0, bag, counted.to(rows.dtype))[:bags]
        out = out / sizes.clamp(min=1).unsqueeze(1)
    return out


def bag_of_each(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, int]:
    """The bag of each flat position (the number of bags where it lies beyond the last one), and the number of bags."""
    if offsets is None:
        bags = input.shape[0]
        return torch.arange(bags, device=input.device).unsqueeze(1).expand(input.shape).reshape(-1), bags
    positions = torch.arange(input.shape[0], device=input.device, dtype=offsets.dtype)
    bag = torch.searchsorted(offsets, positions, right=True) - 1
    if include_last_offset:
        return bag, offsets.shape[0] - 1
    return bag.clamp(min=0), offsets.shape[0]


def _segment_max(rows: Tensor, counted: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Elementwise maximum over each bag through the position of its first maximum (of its first NaN, if it has one)."""
    length = rows.shape[0]
    value = torch.where(counted.unsqueeze(1), rows.detach(), -torch.inf)
    index = bag.unsqueeze(1).expand(rows.shape)
    top = value.new_full((bags + 1, rows.shape[1]), -torch.inf).scatter_reduce(0, index, value, "amax")
    first_of_bag = (value == top.index_select(0, bag)) | value.isnan()
    position = torch.arange(length, device=rows.device).unsqueeze(1)
    candidate = torch.where(first_of_bag & counted.unsqueeze(1), position, length)
    first = index.new_full((bags + 1, rows.shape[1]), length).scatter_reduce(0, index, candidate, "amin")[:bags]
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).gather(0, first)  # row `length`: the empty bag's 0
