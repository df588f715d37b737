"""Losses over a row's own classes, over a shared sample and over all classes, on Triton.

Sums are taken in float32 and rounded once, gradients of class rows by sorted runs: no atomics, the same bits on every
run. Ids outside the classes add nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _lib, _segment
from . import _sampled_softmax_draw as draws
from . import _sampled_softmax_gather as gather
from . import _sampled_softmax_tiles as tiles
from ._sampled_softmax_tiles import Factors, Shared

__all__ = [
    "candidate_sample", "linear_rows_backward", "linear_rows_forward", "logistic_rows_forward", "row_gradient",
    "row_gradient_sparse", "sampled_rows_backward", "sampled_rows_backward_sparse", "sampled_rows_forward",
    "unsupported",
]  # fmt: skip

Mask = tuple[bool, bool, bool]


def unsupported(x: Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, or a call with these features, or None."""
    if features:
        return f"the Triton kernels of sampled_softmax do not serve {' and '.join(features)}"
    # a sampler is asked with its labels, and computes in float64 whatever they are
    return _lib.unsupported_tensor(x if x.is_floating_point() else x.new_empty(0, dtype=torch.float32))


def _by_class(values: Tensor, source: Tensor, ids: Tensor, factor: Tensor | None, rows: int) -> _segment.Segments:
    """Entries sorted stably by class: each adds factor * values[source] to the row of its id."""
    inside = (ids >= 0) & (ids < rows)
    keys = torch.where(inside, ids, rows).to(torch.int32 if rows < 2**31 else torch.int64)
    keys, order = torch.sort(keys, stable=True)
    return _segment.Segments(rows, keys, source[order], None if factor is None else factor[order])


def _dense(values: Tensor, segments: _segment.Segments, dtype: torch.dtype) -> Tensor:
    out = values.new_zeros((segments.rows, values.shape[1]), dtype=dtype)
    _segment.sum_rows(values, segments, out, None, False)
    return out


def _sparse(values: Tensor, segments: _segment.Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    segments, unique = _segment.adjacent(segments)
    out = values.new_empty((unique.numel(), values.shape[1]), dtype=dtype)
    _segment.sum_rows(values, segments, out, None, False)
    return unique.unsqueeze(0), out


def logistic_rows_forward(
    input: Tensor, weight: Tensor, ids: Tensor, signs: Tensor | None, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return gather.logistic(input, weight, ids, signs, gradients)


def _row_entries(dloss: Tensor, ids: Tensor, coefficient: Tensor, input: Tensor, rows: int) -> _segment.Segments:
    count = ids.shape[1]
    source = torch.arange(ids.numel(), device=ids.device) // max(count, 1)
    factor = (coefficient * dloss.unsqueeze(1)).reshape(-1)
    return _by_class(input, source, ids.reshape(-1), factor, rows)


def row_gradient(dloss: Tensor, input: Tensor, ids: Tensor, coefficient: Tensor, rows: int) -> Tensor:
    return _dense(input, _row_entries(dloss, ids, coefficient, input, rows), input.dtype)


def row_gradient_sparse(
    dloss: Tensor, input: Tensor, ids: Tensor, coefficient: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    return _sparse(input, _row_entries(dloss, ids, coefficient, input, rows), input.dtype)


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
    statistics = torch.zeros((batch, 2 + count), dtype=torch.float32, device=input.device)
    kept = statistics.new_empty((batch, sampled.shape[0]) if keep else (0,))
    if batch == 0:
        return statistics.new_empty(0), statistics, kept
    true = statistics[:, 2:]
    own_log = None if true_log is None else true_log.contiguous()
    gather.true_logits(input, weight, bias, labels.contiguous(), own_log, true)
    partial = tiles.forward(_sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits))
    if kind == "logistic":
        # softplus(z) - z / T of a label; F.softplus rounds to z beyond 20, which is exact there in float32
        own = torch.nn.functional.softplus(true) - true / count
        return own.sum(1) + partial[:, 0].sum(0), statistics, kept
    highest = torch.maximum(true.amax(1), partial[:, 0].amax(0))
    base = torch.where(highest == -torch.inf, 0, highest)
    total = (true - base[:, None]).exp().sum(1) + (partial[:, 1] * (partial[:, 0] - base).exp()).sum(0)
    statistics[:, 0], statistics[:, 1] = base, total
    return total.log() - (true - base[:, None]).mean(1), statistics, kept


def _sampled_gradients(
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
) -> tuple[Tensor, tuple[Tensor, _segment.Segments] | None, Tensor]:
    """Gradients of input and bias, and the entries that make weight's."""
    batch, count = labels.shape
    needs_bias = bias is not None and mask[2]
    nothing, rows = input.new_empty(0), weight.shape[0]
    dloss, labels, true = dloss.contiguous(), labels.contiguous(), statistics[:, 2:]
    if kind == "logistic":
        share = torch.sigmoid(true)
    else:
        share = (true - statistics[:, :1]).exp() / statistics[:, 1:2]
    own = (dloss.unsqueeze(1) * (share - 1 / count)).contiguous()
    shared = _sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
    of_sample = torch.zeros((shared.count, input.shape[1]), dtype=torch.float32, device=input.device)
    wanted = (mask[0], mask[1], needs_bias)
    dinput, dshared = None, None
    if batch:
        dinput, dshared = tiles.backward(shared, Factors(statistics, dloss), wanted, of_sample if mask[1] else None)
        if dinput is not None:
            gather.add_weighted_rows(dinput, weight, labels, own)
            dinput = dinput.to(input.dtype)
    elif mask[0]:
        dinput = torch.zeros_like(input)
    ids = torch.cat([labels.reshape(-1).long(), sampled.long()])
    dbias = nothing
    if needs_bias:
        shares = [own.reshape(-1), of_sample.new_zeros(shared.count) if dshared is None else dshared]
        values = torch.cat(shares).unsqueeze(1)
        entries = _by_class(values, torch.arange(ids.numel(), device=ids.device), ids, None, rows)
        dbias = _dense(values, entries, input.dtype).squeeze(1)
    entry = None
    if mask[1]:
        values = torch.cat([input.float(), of_sample])
        rows_of_labels = torch.arange(labels.numel(), device=ids.device) // count
        rows_of_sample = torch.arange(shared.count, device=ids.device) + batch
        factor = torch.cat([own.reshape(-1), torch.ones_like(of_sample[:, 0])])
        source = torch.cat([rows_of_labels, rows_of_sample])
        entry = values, _by_class(values, source, ids, factor, rows)
    return nothing if dinput is None else dinput, entry, dbias


def sampled_rows_backward(
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
    dinput, entries, dbias = _sampled_gradients(dloss, statistics, *given, output_mask)
    return dinput, input.new_empty(0) if entries is None else _dense(*entries, weight.dtype), dbias


def sampled_rows_backward_sparse(
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
    dinput, entries, dbias = _sampled_gradients(dloss, statistics, *given, output_mask)
    if entries is None:
        nothing = input.new_empty(0)
        return dinput, torch.empty((1, 0), dtype=torch.int64, device=input.device), nothing, dbias
    return dinput, *_sparse(*entries, weight.dtype), dbias


def _kept(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows count, and the class weight of each row's target (0 for the others), float32."""
    kept = target != ignore_index
    if class_weight is None:
        return kept, kept.float()
    inside = kept & (target >= 0) & (target < class_weight.shape[0])
    return kept, torch.where(inside, class_weight.float()[torch.where(inside, target, 0).long()], 0)


def linear_rows_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    batch, classes = input.shape[0], weight.shape[0]
    statistics = torch.empty((batch, 2), dtype=torch.float32, device=input.device)
    if batch == 0:
        return statistics.new_empty(0), statistics
    factors = None if class_weight is None else class_weight.contiguous()
    smooth = label_smoothing != 0
    shared = Shared(input, weight, bias, None, None, target.contiguous(), factors, "softmax", smooth)
    partial = tiles.forward(shared)
    highest = partial[:, 0].amax(0)
    base = torch.where(highest == -torch.inf, 0, highest)
    total = (partial[:, 1] * (partial[:, 0] - base).exp()).sum(0)
    kept, factor = _kept(target, class_weight, ignore_index)
    log = total.log()
    loss = (1 - label_smoothing) * factor * (log - (partial[:, 2].sum(0) - base))
    if smooth:
        parts = tiles.weights_of_parts(shared, partial.shape[0])
        offsets = torch.where(parts[:, None] == 0, 0, parts[:, None] * (partial[:, 0] - base))
        below = (partial[:, 3] + offsets).sum(0)
        loss = loss + label_smoothing / classes * (parts.sum() * log - below)
    if z_loss:
        loss = loss + z_loss * factor * (base + log).square()
    statistics[:, 0], statistics[:, 1] = base, total
    return torch.where(kept, loss, 0), statistics


def linear_rows_backward(
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
    classes, nothing = weight.shape[0], input.new_empty(0)
    kept, factor = _kept(target, class_weight, ignore_index)
    g = torch.where(kept, dloss, 0)
    own = (1 - label_smoothing) * g * factor
    scale, even = own, None
    if label_smoothing:
        even = (label_smoothing / classes) * g
        scale = scale + even * (classes if class_weight is None else class_weight.float().sum())
    if z_loss:
        scale = scale + 2 * z_loss * g * factor * (statistics[:, 0] + statistics[:, 1].log())
    factors = None if class_weight is None else class_weight.contiguous()
    shared = Shared(input, weight, bias, None, None, target.contiguous(), factors, "softmax")
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if output_mask[1] else None
    needs_bias = bias is not None and output_mask[2]
    dinput, dbias = torch.zeros_like(input, dtype=torch.float32) if output_mask[0] else None, None
    if input.shape[0]:
        wanted = (output_mask[0], output_mask[1], needs_bias)
        dinput, dbias = tiles.backward(shared, Factors(statistics, scale, own, even), wanted, dweight)
    elif needs_bias:
        dbias = input.new_zeros(classes)
    found = (dinput, dweight, dbias)
    return tuple(nothing if x is None else x.to(input.dtype) for x in found)  # type: ignore[return-value]


def candidate_sample(
    seed: Tensor,
    threshold: Tensor | None,
    alias: Tensor | None,
    kind: str,
    num_sampled: int,
    range_max: int,
    unique: bool,
) -> tuple[Tensor, Tensor]:
    return draws.sample(seed, threshold, alias, kind, num_sampled, range_max, unique)
