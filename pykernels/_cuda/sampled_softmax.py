"""Losses over a row's own classes, over a shared sample and over all classes, and samplers, on csrc/cuda.

`ext`: the CUDA module, or its emulation on the CPU. Sums are taken in float32 and rounded once, gradients of class rows
by sorted runs: no atomics, the same bits on every run. Ids outside the classes add nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _sampled_softmax_tiles as tiles
from ._extension import DTYPE_CODES, Extension
from ._sampled_softmax_tiles import Shared, Slopes, narrow
from ._segment import Segments, adjacent, either, key_dtype, partial

__all__ = [
    "candidate_sample", "linear_rows_backward", "linear_rows_forward", "logistic_rows_forward", "row_gradient",
    "row_gradient_sparse", "sampled_rows_backward", "sampled_rows_backward_sparse", "sampled_rows_forward",
    "unsupported",
]  # fmt: skip

Mask = tuple[bool, bool, bool]
Entries = tuple[Tensor, Segments]


def unsupported(ext: Extension, x: Tensor, *features: str) -> str | None:
    """Why `ext` cannot serve tensors of the dtype and device of x, or a call with these features, or None."""
    if not ext.available:
        return ext.reason
    if x.is_floating_point() and x.dtype not in DTYPE_CODES:  # a sampler is asked with its labels
        return f"the CUDA kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    device = "cpu" if ext.name == "_emulator_ext" else "cuda"
    if x.device.type != device:
        return f"{ext.name} serves {device} tensors, not {x.device.type} ones"
    if features:
        return f"the CUDA kernels of sampled_softmax do not serve {' and '.join(features)}"
    return ext.device_reason(x.device)


def _by_class(source: Tensor, ids: Tensor, factor: Tensor | None, rows: int) -> Segments:
    """Entries sorted stably by class: each adds factor * values[source] to the row of its id."""
    keys = torch.where((ids >= 0) & (ids < rows), ids, rows).to(key_dtype(rows))
    keys, order = torch.sort(keys, stable=True)
    return Segments(rows, keys, source[order], None if factor is None else factor[order])


def _sum_rows(ext: Extension, values: Tensor, segments: Segments, out: Tensor) -> None:
    n, cols = segments.keys.numel(), values.shape[1]
    length, left = partial(segments, cols)
    keys, entries = either(segments.keys), (segments.ranks, segments.source, segments.factor)
    if values.dtype == out.dtype:
        ext.call(
            "embedding_sum_rows", *keys, *entries, None, None, values, out, left, n, segments.rows, cols,
            *values.stride(), length, False, out.dtype,
        )  # fmt: skip
    else:
        ext.call(
            "sampled_softmax_sum_rows", *keys, *entries, values, out, left, n, segments.rows, cols, length, out.dtype
        )


def _dense(ext: Extension, values: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    out = values.new_zeros((segments.rows, values.shape[1]), dtype=dtype)
    _sum_rows(ext, values, segments, out)
    return out


def _sparse(ext: Extension, values: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    segments, unique = adjacent(segments)
    out = values.new_empty((unique.numel(), values.shape[1]), dtype=dtype)
    _sum_rows(ext, values, segments, out)
    return unique.unsqueeze(0), out


def logistic_rows_forward(
    ext: Extension, input: Tensor, weight: Tensor, ids: Tensor, signs: Tensor | None, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty(input.shape[0], dtype=torch.float32, device=input.device)
    coefficient = loss.new_empty(ids.shape if gradients else (0,))
    unit = loss.new_empty(input.shape if gradients else (0,))
    ids = ids.contiguous()
    ext.call(
        "sampled_softmax_logistic", input, weight, ids, None if signs is None else signs.to(torch.int8).contiguous(),
        loss, coefficient if gradients else None, unit if gradients else None, narrow(ids), *input.shape, ids.shape[1],
        weight.shape[0], *input.stride(), *weight.stride(), input.dtype,
    )  # fmt: skip
    return loss, coefficient, unit


def _row_entries(dloss: Tensor, ids: Tensor, coefficient: Tensor, rows: int) -> Segments:
    source = torch.arange(ids.numel(), device=ids.device) // max(ids.shape[1], 1)
    return _by_class(source, ids.reshape(-1), (coefficient * dloss.unsqueeze(1)).reshape(-1), rows)


def row_gradient(ext: Extension, dloss: Tensor, input: Tensor, ids: Tensor, coefficient: Tensor, rows: int) -> Tensor:
    return _dense(ext, input, _row_entries(dloss, ids, coefficient, rows), input.dtype)


def row_gradient_sparse(
    ext: Extension, dloss: Tensor, input: Tensor, ids: Tensor, coefficient: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    return _sparse(ext, input, _row_entries(dloss, ids, coefficient, rows), input.dtype)


def _sample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
) -> Shared:
    hits = labels.contiguous() if remove_hits else labels.new_empty((1, 0))
    log = None if sampled_log is None else sampled_log.contiguous()
    return Shared(input, weight, bias, sampled.contiguous(), log, hits, None, kind)


def sampled_rows_forward(
    ext: Extension,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    true_log: Tensor | None,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = labels.shape
    statistics = torch.empty((batch, 2 + count), dtype=torch.float32, device=input.device)
    loss, kept = statistics.new_empty(batch), statistics.new_empty((batch, sampled.shape[0]) if keep else (0,))
    if batch == 0:
        return loss, statistics, kept
    labels, logistic = labels.contiguous(), kind == "logistic"
    ext.call(
        "sampled_softmax_true_logits", input, weight, bias, labels,
        None if true_log is None else true_log.contiguous(), statistics[:, 2:], narrow(labels), *input.shape, count,
        weight.shape[0], *input.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        statistics.stride(0), input.dtype,
    )  # fmt: skip
    shared = _sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
    found = tiles.forward(ext, shared)
    ext.call("sampled_softmax_join_sample", found, statistics, loss, batch, found.shape[0], count, logistic)
    return loss, statistics, kept


def _sampled_gradients(
    ext: Extension,
    dloss: Tensor,
    statistics: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
    mask: Mask,
) -> tuple[Tensor, Entries | None, Tensor]:
    """Gradients of input and bias, and the entries that make weight's."""
    (batch, count), (rows, cols) = labels.shape, weight.shape
    needs_bias, nothing, device = bias is not None and mask[2], input.new_empty(0), input.device
    dloss, labels, statistics = dloss.contiguous(), labels.contiguous(), statistics.contiguous()
    shared = _sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
    own = torch.empty((batch, count), dtype=torch.float32, device=device)
    values = own.new_empty((batch + shared.count, cols)) if mask[1] else None
    dinput, dshared = torch.zeros_like(input, dtype=torch.float32), own.new_zeros(shared.count)
    if values is not None:
        values[:batch] = input
        if batch == 0:
            values.zero_()
    if batch:
        ext.call("sampled_softmax_own", dloss, statistics, own, batch, count, kind == "logistic")
        of_sample = None if values is None else values[batch:]
        found = tiles.backward(ext, shared, Slopes(dloss, statistics), (mask[0], mask[1], needs_bias), of_sample)
        dshared = dshared if found[1] is None else found[1]
        if found[0] is not None:
            dinput = found[0]
            ext.call(
                "sampled_softmax_add_rows", weight, labels, own, dinput, narrow(labels), batch, cols, count, rows,
                *weight.stride(), weight.dtype,
            )  # fmt: skip
    ids = torch.cat([labels.reshape(-1).long(), sampled.long()])
    dbias, entries = nothing, None
    if needs_bias:
        shares = torch.cat([own.reshape(-1), dshared]).unsqueeze(1)
        by_class = _by_class(torch.arange(ids.numel(), device=device), ids, None, rows)
        dbias = _dense(ext, shares, by_class, input.dtype).squeeze(1)
    if values is not None:
        source = torch.arange(labels.numel() + shared.count, device=device)
        source = torch.where(source < labels.numel(), source // max(count, 1), source - (labels.numel() - batch))
        entries = values, _by_class(source, ids, torch.cat([own.reshape(-1), torch.ones_like(dshared)]), rows)
    return dinput.to(input.dtype) if mask[0] else nothing, entries, dbias


def sampled_rows_backward(
    ext: Extension,
    dloss: Tensor,
    statistics: Tensor,
    logits: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    true_log: Tensor | None,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
    dinput, entries, dbias = _sampled_gradients(ext, dloss, statistics, *given, output_mask)
    return dinput, input.new_empty(0) if entries is None else _dense(ext, *entries, weight.dtype), dbias


def sampled_rows_backward_sparse(
    ext: Extension,
    dloss: Tensor,
    statistics: Tensor,
    logits: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    true_log: Tensor | None,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
    dinput, entries, dbias = _sampled_gradients(ext, dloss, statistics, *given, output_mask)
    if entries is None:
        nothing = input.new_empty(0)
        return dinput, torch.empty((1, 0), dtype=torch.int64, device=input.device), nothing, dbias
    return dinput, *_sparse(ext, *entries, weight.dtype), dbias


def _all_classes(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, smooth: bool
) -> tuple[Shared, Tensor | None]:
    """And the sum of the class weights, where it is needed and not their number."""
    factors = None if class_weight is None else class_weight.float().contiguous()
    total = factors.sum() if factors is not None and smooth else None
    return Shared(input, weight, bias, None, None, target.contiguous(), factors, "softmax"), total


def linear_rows_forward(
    ext: Extension,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    batch = input.shape[0]
    statistics = torch.empty((batch, 2), dtype=torch.float32, device=input.device)
    loss = statistics.new_empty(batch)
    if batch:
        smooth = label_smoothing != 0
        shared, total = _all_classes(input, weight, bias, target, class_weight, smooth)
        found = tiles.forward(ext, shared, smooth)
        ext.call(
            "sampled_softmax_join_all", found, shared.labels, shared.factors, total, statistics, loss,
            narrow(shared.labels), batch, found.shape[0], weight.shape[0], ignore_index, label_smoothing, z_loss,
        )  # fmt: skip
    return loss, statistics


def linear_rows_backward(
    ext: Extension,
    dloss: Tensor,
    statistics: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if output_mask[1] else None
    needs_bias = bias is not None and output_mask[2]
    dinput = torch.zeros_like(input) if output_mask[0] else None
    dbias = input.new_zeros(weight.shape[0]) if needs_bias else None
    if input.shape[0]:
        shared, total = _all_classes(input, weight, bias, target, class_weight, label_smoothing != 0)
        slopes = Slopes(dloss.contiguous(), statistics.contiguous(), total, ignore_index, label_smoothing, z_loss)
        dinput, dbias = tiles.backward(ext, shared, slopes, (output_mask[0], output_mask[1], needs_bias), dweight)
    found = (dinput, dweight, dbias)
    return tuple(input.new_empty(0) if x is None else x.to(input.dtype) for x in found)


def candidate_sample(
    ext: Extension,
    seed: Tensor,
    threshold: Tensor | None,
    alias: Tensor | None,
    kind: str,
    num_sampled: int,
    range_max: int,
    unique: bool,
) -> tuple[Tensor, Tensor]:
    """Nothing is asked of the device: with `unique` the kernel itself draws until it has found enough."""
    ids, tries = torch.full_like(seed, -1).expand(num_sampled).clone(), torch.full_like(seed[0], num_sampled)
    slots: Any = None
    if unique and num_sampled:
        size = 1 << (2 * (num_sampled + 1024) - 1).bit_length()  # the kernel draws 1024 at a time
        slots = torch.full((size, 2), -1, dtype=torch.int64, device=seed.device)
    ext.call(
        "sampled_softmax_draw", seed, None if threshold is None else threshold.contiguous(),
        None if alias is None else alias.contiguous(), slots, ids, tries, num_sampled, range_max,
        0 if slots is None else slots.shape[0], math.log(range_max + 1), kind,
    )  # fmt: skip
    return ids, tries
