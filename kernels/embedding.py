"""Lookup, bags and their gradients on Triton.

Ids outside the table are skipped: they read as rows of zeros and add to no gradient. Sums are taken in float32 and
rounded once. Every result is the same bits on every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._segments import Segments, adjacent
from . import _embedding_forward as forward
from . import _lib
from . import _segment as segment
from ._embedding_forward import Bags
from ._embedding_interaction import dot_interaction_backward, dot_interaction_forward
from ._embedding_multi import embedding_bag_multi_forward
from ._embedding_quantized import embedding_bag_quantized_forward, quantize_rows_forward
from ._embedding_segment import sort
from ._embedding_update import Rule

__all__ = [
    "dot_interaction_backward",
    "dot_interaction_forward",
    "embedding_backward",
    "embedding_backward_sparse",
    "embedding_bag_backward",
    "embedding_bag_backward_sparse",
    "embedding_bag_backward_weights",
    "embedding_bag_forward",
    "embedding_bag_multi_forward",
    "embedding_bag_quantized_forward",
    "embedding_forward",
    "embedding_update",
    "quantize_rows_forward",
    "unsupported",
]  # fmt: skip


_SERVED = frozenset(("quantised rows", "samples of more than 160 KiB"))


def unsupported(x: Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tables of this device and dtype, or a call with these features, or None."""
    quantised = "quantised rows" in features and x.dtype == torch.uint8
    refused = [feature for feature in features if feature not in _SERVED]
    if refused:
        return f"the Triton kernels of embedding do not serve {' and '.join(refused)}"
    return _lib.unsupported_tensor(x.new_empty(0, dtype=torch.float32) if quantised else x)


def _lookup(ids: Tensor) -> Bags:
    """A lookup as bags of one id."""
    return Bags(ids.reshape(-1, 1), None, False)


def embedding_forward(ids: Tensor, weight: Tensor, what: int) -> Tensor:
    out = weight.new_empty((*ids.shape, weight.shape[1]))
    forward.forward(_lookup(ids), weight, None, out, None, "lookup", -1, what)
    return out


def embedding_bag_forward(
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    with_maxima: bool,
    what: int,
) -> tuple[Tensor, Tensor]:
    bags = Bags(ids, offsets, include_last_offset)
    out = weight.new_empty((bags.count, weight.shape[1]))
    wanted = mode == "max" and with_maxima
    maxima = weight.new_empty(out.shape if wanted else (0,), dtype=torch.int32)
    scale = None if per_sample_weights is None else per_sample_weights.reshape(-1).contiguous()
    forward.forward(bags, weight, scale, out, maxima if wanted else None, mode, padding_idx, what)
    return out, maxima


def embedding_backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int, by_frequency: bool) -> Tensor:
    return _dense(dy.reshape(ids.numel(), dy.shape[-1]), sort(_lookup(ids), rows, padding_idx), None, by_frequency)


def embedding_backward_sparse(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, by_frequency: bool
) -> tuple[Tensor, Tensor]:
    segments = sort(_lookup(ids), rows, padding_idx)
    return _sparse(dy.reshape(ids.numel(), dy.shape[-1]), segments, None, by_frequency)


def embedding_bag_backward(
    dy: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    maxima: Tensor | None,
    rows: int,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    by_frequency: bool,
) -> Tensor:
    bags = Bags(ids, offsets, include_last_offset)
    return _dense(dy, _sort_bags(bags, rows, padding_idx, mode, per_sample_weights), maxima, by_frequency)


def embedding_bag_backward_sparse(
    dy: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    maxima: Tensor | None,
    rows: int,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    by_frequency: bool,
) -> tuple[Tensor, Tensor]:
    bags = Bags(ids, offsets, include_last_offset)
    return _sparse(dy, _sort_bags(bags, rows, padding_idx, mode, per_sample_weights), maxima, by_frequency)


def embedding_bag_backward_weights(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    out = weight.new_empty(ids.shape)
    forward.backward_weights(dy, Bags(ids, offsets, include_last_offset), weight, out, mode, padding_idx)
    return out


def embedding_update(
    weight: Tensor,
    state: Tensor | None,
    second_state: Tensor | None,
    ids: Tensor,
    dy: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    maxima: Tensor | None,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    by_frequency: bool,
    rule: str,
    lr: float,
    weight_decay: float,
    eps: float,
    beta1: float,
    beta2: float,
    step: int,
    seed: Tensor | None,
    what: int,
) -> None:
    rows, cols = weight.shape
    chosen = Rule(rule, lr, weight_decay, eps, beta1, beta2, step, state, second_state, seed)
    if mode == "none":
        segments = sort(_lookup(ids), rows, padding_idx, what=what)
        dy = dy.reshape(ids.numel(), cols)
    else:
        bags = Bags(ids, offsets, include_last_offset)
        segments = _sort_bags(bags, rows, padding_idx, mode, per_sample_weights, what)
    segment.sum_rows(dy, segments, weight, maxima, by_frequency, chosen)


def _sort_bags(bags: Bags, rows: int, padding: int, mode: str, scale: Tensor | None, what: int = 0) -> Segments:
    scale = None if scale is None else scale.reshape(-1).contiguous()
    return sort(bags, rows, padding, mode, scale, what)


def _dense(dy: Tensor, segments: Segments, maxima: Tensor | None, by_frequency: bool) -> Tensor:
    out = dy.new_zeros((segments.rows, dy.shape[1]))
    segment.sum_rows(dy, segments, out, maxima, by_frequency)
    return out


def _sparse(dy: Tensor, segments: Segments, maxima: Tensor | None, by_frequency: bool) -> tuple[Tensor, Tensor]:
    segments, unique = adjacent(segments)
    values = dy.new_empty((unique.numel(), dy.shape[1]))
    segment.sum_rows(dy, segments, values, maxima, by_frequency)
    return unique.unsqueeze(0), values
