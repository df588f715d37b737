"""Losses over a row's own classes, over a shared sample and over all classes, and samplers, on csrc/cuda.

`ext`: the CUDA module, or its emulation on the CPU. Sums are taken in float32 and rounded once, gradients of class rows
by sorted runs: no atomics, the same bits on every run. Ids outside the classes add nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._sampled import Floor, Mask, Shared
from .._segments import Segments
from . import _sampled_softmax_tiles as tiles
from ._extension import DTYPE_CODES, Extension
from ._sampled_softmax_tiles import Slopes, narrow
from ._segment import either, partial

__all__ = [
    "candidate_sample", "linear_rows_backward", "linear_rows_forward", "logistic_rows_forward", "row_gradient",
    "row_gradient_sparse", "sampled_rows_backward", "sampled_rows_backward_sparse", "sampled_rows_forward",
    "unsupported",
]  # fmt: skip


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


class _Floor(Floor):
    def __init__(self, ext: Extension) -> None:
        self.ext = ext

    def sum_rows(self, values: Tensor, segments: Segments, out: Tensor) -> None:
        n, cols = segments.keys.numel(), values.shape[1]
        length, left = partial(segments, cols)
        keys, entries = either(segments.keys), (segments.ranks, segments.source, segments.factor)
        if values.dtype == out.dtype:
            self.ext.call(
                "embedding_sum_rows", *keys, *entries, None, None, values, out, left, n, segments.rows, cols,
                *values.stride(), length, False, out.dtype,
            )  # fmt: skip
        else:
            self.ext.call(
                "sampled_softmax_sum_rows", *keys, *entries, values, out, left, n, segments.rows, cols, length,
                out.dtype,
            )  # fmt: skip

    def true_logits(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, true_log: Tensor | None, out: Tensor
    ) -> None:
        self.ext.call(
            "sampled_softmax_true_logits", input, weight, bias, labels, true_log, out, narrow(labels), *input.shape,
            labels.shape[1], weight.shape[0], *input.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
            out.stride(0), input.dtype,
        )  # fmt: skip

    def losses(self, sample: Shared, statistics: Tensor) -> Tensor:
        batch, width = statistics.shape
        loss, found = statistics.new_empty(batch), tiles.forward(self.ext, sample)
        given = (batch, found.shape[0], width - 2, sample.kind == "logistic")
        self.ext.call("sampled_softmax_join_sample", found, statistics, loss, *given)
        return loss

    def slopes(self, dloss: Tensor, statistics: Tensor, count: int, kind: str) -> Tensor:
        own = dloss.new_empty((dloss.shape[0], count))
        self.ext.call("sampled_softmax_own", dloss, statistics, own, *own.shape, kind == "logistic")
        return own

    def gradients(
        self, sample: Shared, dloss: Tensor, statistics: Tensor, mask: Mask, drows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return tiles.backward(self.ext, sample, Slopes(dloss, statistics), mask, drows)

    def add_rows(self, out: Tensor, weight: Tensor, ids: Tensor, factor: Tensor) -> None:
        self.ext.call(
            "sampled_softmax_add_rows", weight, ids, factor, out, narrow(ids), *out.shape, ids.shape[1],
            weight.shape[0], *weight.stride(), weight.dtype,
        )  # fmt: skip


def row_gradient(ext: Extension, *given: Any) -> Tensor:
    return _Floor(ext).row_gradient(*given)


def row_gradient_sparse(ext: Extension, *given: Any) -> tuple[Tensor, Tensor]:
    return _Floor(ext).row_gradient_sparse(*given)


def sampled_rows_forward(ext: Extension, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Floor(ext).sampled_rows_forward(*given)


def sampled_rows_backward(ext: Extension, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Floor(ext).sampled_rows_backward(*given)


def sampled_rows_backward_sparse(ext: Extension, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _Floor(ext).sampled_rows_backward_sparse(*given)


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
