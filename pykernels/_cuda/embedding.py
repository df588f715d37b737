"""Lookup, bags and their gradients on csrc/cuda. `ext`: the CUDA module, or its emulation on the CPU.

Ids outside the table are skipped: they read as rows of zeros and add to no gradient. Tables and gradients of any
strides are read in place, 16 bytes at a time where their rows allow it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._segments import Segments, adjacent, key_dtype, ranked
from ._embedding_bags import Bags, flat
from ._embedding_quantized import embedding_bag_quantized_forward, quantize_rows_forward
from ._extension import DTYPE_CODES, Extension
from ._segment import either, partial, whole_vectors

__all__ = [
    "dot_interaction_backward", "dot_interaction_forward",
    "embedding_backward", "embedding_backward_sparse", "embedding_bag_backward", "embedding_bag_backward_sparse",
    "embedding_bag_backward_weights", "embedding_bag_forward", "embedding_bag_multi_forward",
    "embedding_bag_quantized_forward", "embedding_forward", "embedding_update", "quantize_rows_forward", "unsupported",
]  # fmt: skip


def unsupported(ext: Extension, x: Tensor, *features: str) -> str | None:
    """Why `ext` cannot serve tables of the dtype and device of x, or a call with these features, or None."""
    if not ext.available:
        return ext.reason
    quantised = "quantised rows" in features and x.dtype == torch.uint8
    refused = [feature for feature in features if feature != "quantised rows"]
    if x.dtype not in DTYPE_CODES and not quantised:
        return f"the CUDA kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    device = "cpu" if ext.name == "_emulator_ext" else "cuda"
    if x.device.type != device:
        return f"{ext.name} serves {device} tensors, not {x.device.type} ones"
    if refused:
        return f"the CUDA kernels of embedding do not serve {' and '.join(refused)}"
    return ext.device_reason(x.device)


def _lookup(ids: Tensor) -> Bags:
    return Bags(ids.reshape(-1, 1), None, False)


def _forward(
    ext: Extension,
    bags: Bags,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    maxima: Tensor | None,
    mode: str,
    padding: int,
    what: int,
) -> None:
    ext.call(
        "embedding_bag_forward", bags.ids, weight, bags.offsets, scale, out, maxima, bags.record(ext, what), what,
        bags.narrow, bags.count, bags.length, bags.n, bags.last, *weight.shape, padding, *weight.stride(), mode,
        weight.dtype,
    )  # fmt: skip


def embedding_forward(ext: Extension, ids: Tensor, weight: Tensor, what: int) -> Tensor:
    out = weight.new_empty((*ids.shape, weight.shape[1]))
    _forward(ext, _lookup(ids), weight, None, out, None, "lookup", -1, what)
    return out


def embedding_bag_forward(
    ext: Extension,
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
    scale = flat(per_sample_weights)
    _forward(ext, bags, weight, scale, out, maxima if wanted else None, mode, padding_idx, what)
    return out, maxima


def embedding_bag_backward_weights(
    ext: Extension,
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    bags = Bags(ids, offsets, include_last_offset)
    out = weight.new_empty(ids.shape)
    if bags.count == 0:
        return out.zero_()
    ext.call(
        "embedding_bag_backward_weights", dy, bags.ids, weight, bags.offsets,
        bags.sizes(ext, mode, weight.shape[0], padding_idx), out, bags.narrow, bags.count, bags.length, bags.n,
        bags.last, *weight.shape, padding_idx, *dy.stride(), *weight.stride(), weight.dtype,
    )  # fmt: skip
    return out


def _sort(
    ext: Extension, bags: Bags, rows: int, padding: int, mode: str, scale: Tensor | None, dtype: torch.dtype,
    what: int = 0,
) -> Segments:  # fmt: skip
    n, device = bags.n if bags.count else 0, bags.ids.device
    keys = torch.empty(n, dtype=key_dtype(rows), device=device)
    ext.call(
        "embedding_keys", bags.ids, bags.offsets, *either(keys), bags.record(ext, what), what, bags.narrow,
        bags.count, n, bags.last, rows, padding,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    if mode == "lookup" or n == 0:
        return Segments(rows, keys, order)
    sizes = bags.sizes(ext, mode, rows, padding)
    source = torch.empty_like(order)
    factor = torch.empty(n, device=device) if scale is not None or sizes is not None else None
    place = torch.empty(n, dtype=torch.int32, device=device) if mode == "max" else None
    ext.call(
        "embedding_entries", order, bags.offsets, sizes, flat(scale), source, factor, place, bags.count, bags.length,
        n, dtype,
    )  # fmt: skip
    return Segments(rows, keys, source, factor, place)


def _sum_rows(
    ext: Extension, dy: Tensor, segments: Segments, out: Tensor, maxima: Tensor | None, by_frequency: bool
) -> None:
    cols = dy.shape[1]
    length, left = partial(segments, cols)
    maxima = None if segments.place is None or maxima is None else maxima.contiguous()
    ext.call(
        "embedding_sum_rows", *either(segments.keys), segments.ranks, segments.source, segments.factor,
        segments.place, maxima, dy, out, left, segments.keys.numel(), segments.rows, cols, *dy.stride(), length,
        by_frequency, dy.dtype,
    )  # fmt: skip


def _dense(ext: Extension, dy: Tensor, segments: Segments, maxima: Tensor | None, by_frequency: bool) -> Tensor:
    out = dy.new_zeros((segments.rows, dy.shape[1]))
    _sum_rows(ext, dy, segments, out, maxima, by_frequency)
    return out


def _sparse(
    ext: Extension, dy: Tensor, segments: Segments, maxima: Tensor | None, by_frequency: bool
) -> tuple[Tensor, Tensor]:
    """The different ids, ascending, and their rows. Their number is a shape of the result, so it is read here."""
    segments, unique = adjacent(segments)
    values = dy.new_empty((unique.numel(), dy.shape[1]))
    _sum_rows(ext, dy, segments, values, maxima, by_frequency)
    return unique.unsqueeze(0), values


def embedding_backward(
    ext: Extension, dy: Tensor, ids: Tensor, rows: int, padding_idx: int, by_frequency: bool
) -> Tensor:
    segments = _sort(ext, _lookup(ids), rows, padding_idx, "lookup", None, dy.dtype)
    return _dense(ext, dy.reshape(ids.numel(), dy.shape[-1]), segments, None, by_frequency)


def embedding_backward_sparse(
    ext: Extension, dy: Tensor, ids: Tensor, rows: int, padding_idx: int, by_frequency: bool
) -> tuple[Tensor, Tensor]:
    segments = _sort(ext, _lookup(ids), rows, padding_idx, "lookup", None, dy.dtype)
    return _sparse(ext, dy.reshape(ids.numel(), dy.shape[-1]), segments, None, by_frequency)


def embedding_bag_backward(
    ext: Extension,
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
    segments = _sort(ext, bags, rows, padding_idx, mode, per_sample_weights, dy.dtype)
    return _dense(ext, dy, segments, maxima, by_frequency)


def embedding_bag_backward_sparse(
    ext: Extension,
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
    segments = _sort(ext, bags, rows, padding_idx, mode, per_sample_weights, dy.dtype)
    return _sparse(ext, dy, segments, maxima, by_frequency)


def embedding_update(
    ext: Extension,
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
    bags = _lookup(ids) if mode == "none" else Bags(ids, offsets, include_last_offset)
    lookup_or_mode = "lookup" if mode == "none" else mode
    segments = _sort(ext, bags, rows, padding_idx, lookup_or_mode, per_sample_weights, dy.dtype, what)
    dy = dy.reshape(bags.count, cols)
    length, left = partial(segments, cols)
    maxima = None if segments.place is None or maxima is None else maxima.contiguous()
    scale2, ranks = 1.0, None
    if rule == "rowwise_adagrad" and cols > 256:  # what one warp holds of a row, or twice that in vectors
        vector = 16 // weight.element_size()
        vectors = whole_vectors(weight, vector) and whole_vectors(dy, vector)
        if cols > (512 if vectors else 256):
            ranks = ranked(segments)[0].ranks
            second_state = dy.new_empty((segments.keys.numel(), -(-cols // 32)), dtype=torch.float32)
    if rule == "adam":
        lr, scale2 = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    ext.call(
        "embedding_update", *either(segments.keys), ranks, segments.source, segments.factor, segments.place, maxima, dy,
        weight, state, second_state, seed, left, segments.keys.numel(), rows, cols, *dy.stride(), weight.stride(0),
        length, by_frequency, rule, lr, weight_decay, eps, 1 - beta1, beta2, 1 - beta2, scale2, weight.dtype,
    )  # fmt: skip


def embedding_bag_multi_forward(
    ext: Extension,
    ids: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    per_sample_weights: Sequence[Tensor],
    mode: str,
    include_last_offset: bool,
    with_maxima: bool,
    what: int,
) -> tuple[Tensor, Tensor]:
    narrow = all(x.dtype == torch.int32 for x in ids)
    bags = [
        Bags(x if narrow else x.long(), o, include_last_offset and o is not None)
        for x, o in zip(ids, offsets, strict=True)
    ]
    weights = [w if w.stride(1) == 1 or w.shape[1] <= 1 else w.contiguous() for w in weights]
    scales = [scale.reshape(-1).contiguous() for scale in per_sample_weights]
    count, width = bags[0].count, sum(w.shape[1] for w in weights)
    out = weights[0].new_empty((count, width))
    wanted = mode == "max" and with_maxima
    maxima = out.new_empty(out.shape if wanted else (0,), dtype=torch.int32)
    record, fields, column, vectors = None, [], 0, True
    for table, (bag, weight) in enumerate(zip(bags, weights, strict=True)):
        record = bag.record(ext, what, table)
        starts, scale = bag.offsets, scales[table] if scales else None
        addresses = (0 if x is None else x.data_ptr() for x in (bag.ids, weight, starts, scale))
        fields.append((*addresses, bag.length, bag.n, *weight.shape, weight.stride(0), column))
        column += weight.shape[1]
        step = 16 // weight.element_size()
        vectors &= weight.data_ptr() % 16 == 0 and weight.shape[1] % step == 0 and weight.stride(0) % step == 0
    tensors = (*(bag.ids for bag in bags), *weights, *(bag.offsets for bag in bags), *scales)
    ext.call(
        "embedding_bag_multi_forward", torch.tensor(fields, device=out.device), out, maxima if wanted else None, record,
        what, len(weights), count, width, max(w.shape[1] for w in weights), narrow, include_last_offset, vectors, mode,
        out.dtype, reached=[x for x in tensors if x is not None],
    )  # fmt: skip
    return out, maxima


def _pairs(rows: int, self_interaction: bool) -> int:
    return rows * (rows + 1) // 2 if self_interaction else rows * (rows - 1) // 2


def dot_interaction_forward(ext: Extension, dense: Tensor, sparse: Tensor, self_interaction: bool) -> Tensor:
    (batch, cols), rows = dense.shape, sparse.shape[1] + 1
    pairs = _pairs(rows, self_interaction)
    out = dense.new_empty((batch, cols + pairs))
    ext.call(
        "dot_interaction_forward", dense, sparse, out, batch, rows, cols, pairs, *dense.stride(), *sparse.stride(),
        self_interaction, dense.dtype,
    )  # fmt: skip
    return out


def dot_interaction_backward(
    ext: Extension,
    dy: Tensor,
    dense: Tensor,
    sparse: Tensor,
    self_interaction: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    (batch, cols), rows = dense.shape, sparse.shape[1] + 1
    ddense = dense.new_empty(dense.shape if output_mask[0] else (0,))
    dsparse = sparse.new_empty(sparse.shape if output_mask[1] else (0,))
    if any(output_mask):
        ext.call(
            "dot_interaction_backward", dy, dense, sparse, ddense if output_mask[0] else None,
            dsparse if output_mask[1] else None, batch, rows, cols, _pairs(rows, self_interaction), *dy.stride(),
            *dense.stride(), *sparse.stride(), self_interaction, dense.dtype,
        )  # fmt: skip
    return ddense, dsparse
