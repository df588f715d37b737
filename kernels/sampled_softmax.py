"""Losses over a row's own classes, over a shared sample and over all classes, on Triton.

Sums are taken in float32 and rounded once, gradients of class rows by sorted runs: no atomics, the same bits on every
run. Ids outside the classes add nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._sampled import Floor, Mask, Shared
from .._segments import Segments
from . import _lib, _segment
from . import _sampled_softmax_draw as draws
from . import _sampled_softmax_gather as gather
from . import _sampled_softmax_tiles as tiles
from ._sampled_softmax_tiles import Factors

__all__ = [
    "candidate_sample", "linear_rows_backward", "linear_rows_forward", "logistic_rows_forward", "row_gradient",
    "row_gradient_sparse", "sampled_rows_backward", "sampled_rows_backward_sparse", "sampled_rows_forward",
    "unsupported",
]  # fmt: skip


def unsupported(x: Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, or a call with these features, or None."""
    if features:
        return f"the Triton kernels of sampled_softmax do not serve {' and '.join(features)}"
    # a sampler is asked with its labels, and computes in float64 whatever they are
    return _lib.unsupported_tensor(x if x.is_floating_point() else x.new_empty(0, dtype=torch.float32))


class _Floor(Floor):
    def sum_rows(self, values: Tensor, segments: Segments, out: Tensor) -> None:
        _segment.sum_rows(values, segments, out, None, False)

    def true_logits(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, true_log: Tensor | None, out: Tensor
    ) -> None:
        gather.true_logits(input, weight, bias, labels, true_log, out)

    def losses(self, sample: Shared, statistics: Tensor) -> Tensor:
        true, partial = statistics[:, 2:], tiles.forward(sample)
        if sample.kind == "logistic":
            # softplus(z) - z / T of a label; F.softplus rounds to z beyond 20, which is exact there in float32
            own = torch.nn.functional.softplus(true) - true / true.shape[1]
            return own.sum(1) + partial[:, 0].sum(0)
        highest = torch.maximum(true.amax(1), partial[:, 0].amax(0))
        base = torch.where(highest == -torch.inf, 0, highest)
        total = (true - base[:, None]).exp().sum(1) + (partial[:, 1] * (partial[:, 0] - base).exp()).sum(0)
        statistics[:, 0], statistics[:, 1] = base, total
        return total.log() - (true - base[:, None]).mean(1)

    def slopes(self, dloss: Tensor, statistics: Tensor, count: int, kind: str) -> Tensor:
        true = statistics[:, 2:]
        share = torch.sigmoid(true) if kind == "logistic" else (true - statistics[:, :1]).exp() / statistics[:, 1:2]
        return (dloss.unsqueeze(1) * (share - 1 / count)).contiguous()

    def gradients(
        self, sample: Shared, dloss: Tensor, statistics: Tensor, mask: Mask, drows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return tiles.backward(sample, Factors(statistics, dloss), mask, drows)

    def add_rows(self, out: Tensor, weight: Tensor, ids: Tensor, factor: Tensor) -> None:
        gather.add_weighted_rows(out, weight, ids, factor)


_floor = _Floor()
row_gradient, row_gradient_sparse = _floor.row_gradient, _floor.row_gradient_sparse
sampled_rows_forward, sampled_rows_backward = _floor.sampled_rows_forward, _floor.sampled_rows_backward
sampled_rows_backward_sparse = _floor.sampled_rows_backward_sparse


def logistic_rows_forward(
    input: Tensor, weight: Tensor, ids: Tensor, signs: Tensor | None, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return gather.logistic(input, weight, ids, signs, gradients)


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
    shared = Shared(input, weight, bias, None, None, target.contiguous(), factors, "softmax")
    partial = tiles.forward(shared, smooth)
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
