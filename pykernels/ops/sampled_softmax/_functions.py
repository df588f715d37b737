"""The operators of the sampled_softmax room (schemas, fakes), and the autograd Functions over them.

Three families, all giving one loss for each row in the type sums are taken in (float32, float64 for float64); the
public functions reduce.

- `logistic_rows`: each row has its own few classes. The forward pass holds their rows, so it makes the gradients
  of `input` and of the logits too (for dloss = 1); the backward pass scales and sums.
- `sampled_rows`: classes that all rows share. Kept: `statistics` (B, 2 + T), for each row the largest logit m and the
  sum of exp(z - m) ("logistic": not used), then its T true logits; and, where `keep` says so, the logits of the sample.
- `linear_rows`: all classes. Kept: `statistics` (N, 2), m and the sum. Not m + log of the sum: at large logits its
  rounding would be the error of every probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _backends
from ...reference.sampled_softmax import linear, losses, samplers
from .._function import second_derivative, sparse_rows, whole
from .._library import LIBRARY, define
from .._pending import Positions, expects, note

ROOM = _backends.Room("sampled_softmax")

KEPT_LOGITS = 64 << 20
"""Bytes of float32 logits of shared samples that the native CPU kernels keep for backward rather than compute twice."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=wide(like.dtype))


def _fake_rows(input: Tensor, weight: Tensor, ids: Tensor, signs: Tensor | None, gradients: bool) -> Any:
    batch = input.shape[0]
    shapes = (ids.shape, input.shape) if gradients else ((0,), (0,))
    return _empty(input, batch), _empty(input, *shapes[0]), _empty(input, *shapes[1])


def _unique(values: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty((1, found), dtype=torch.int64), values.new_empty((found, values.shape[1]))


def _masked(mask: Any, input: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Empty tensors like those that need a gradient; without elements for the others."""
    given = zip(mask, (input, *others), strict=False)
    return [x.new_empty(x.shape) if needed and x is not None else input.new_empty(0) for needed, x in given]


def _fake_sampled(input: Tensor, weight: Tensor, bias: Any, labels: Tensor, sampled: Tensor, *more: Any) -> Any:
    batch, keep = input.shape[0], more[-1]
    kept = (batch, sampled.shape[0]) if keep else (0,)
    return _empty(input, batch), _empty(input, batch, 2 + labels.shape[1]), _empty(input, *kept)


def _fake_sampled_sparse(*arguments: Any) -> Any:
    input, weight, bias, mask = *arguments[3:6], arguments[-1]
    dinput, dweight, dbias = _masked(mask, input, weight, bias)
    found = _unique(weight) if mask[1] else (dweight.new_empty((1, 0), dtype=torch.int64), dweight)
    return dinput, *found, dbias


_ROWS = "Tensor input, Tensor weight, Tensor ids, Tensor? signs"
_SAMPLED = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor labels, Tensor sampled, Tensor? true_log, Tensor? sampled_log, "
    "str kind, bool remove_hits"
)
_LINEAR = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, float z_loss"
)

logistic_rows_forward = define(
    ROOM, f"logistic_rows_forward({_ROWS}, bool gradients) -> (Tensor, Tensor, Tensor)", _fake_rows
)
row_gradient = define(
    ROOM,
    "row_gradient(Tensor dloss, Tensor input, Tensor ids, Tensor coefficient, SymInt rows) -> Tensor",
    lambda dloss, input, ids, coefficient, rows: input.new_empty((rows, input.shape[1])),
)
row_gradient_sparse = define(
    ROOM,
    "row_gradient_sparse(Tensor dloss, Tensor input, Tensor ids, Tensor coefficient, SymInt rows) -> (Tensor, Tensor)",
    lambda dloss, input, *more: _unique(input),
)
sampled_rows_forward = define(
    ROOM, f"sampled_rows_forward({_SAMPLED}, bool keep) -> (Tensor, Tensor, Tensor)", _fake_sampled
)
sampled_rows_backward = define(
    ROOM,
    f"sampled_rows_backward(Tensor dloss, Tensor statistics, Tensor logits, {_SAMPLED}, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *arguments: tuple(_masked(arguments[-1], *arguments[3:6])),
)
sampled_rows_backward_sparse = define(
    ROOM,
    f"sampled_rows_backward_sparse(Tensor dloss, Tensor statistics, Tensor logits, {_SAMPLED}, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_sampled_sparse,
)
linear_rows_forward = define(
    ROOM,
    f"linear_rows_forward({_LINEAR}) -> (Tensor, Tensor)",
    lambda input, *more: (_empty(input, input.shape[0]), _empty(input, input.shape[0], 2)),
)
linear_rows_backward = define(
    ROOM,
    f"linear_rows_backward(Tensor dloss, Tensor statistics, {_LINEAR}, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    lambda *arguments: tuple(_masked(arguments[-1], *arguments[2:5])),
)

_SAMPLE = (
    "(Tensor seed, Tensor? threshold, Tensor? alias, str kind, SymInt num_sampled, SymInt range_max, bool unique) "
    "-> (Tensor, Tensor)"
)


def _fake_sample(seed: Tensor, threshold: Any, alias: Any, kind: str, num_sampled: int, *more: Any) -> Any:
    return seed.new_empty(num_sampled), seed.new_empty(())


candidate_sample = define(ROOM, f"candidate_sample{_SAMPLE}", _fake_sample)
# The reference too is an operator here: how often its loop runs depends on the draws, which no graph can hold.
LIBRARY.define(f"candidate_sample.reference{_SAMPLE}")
torch.library.register_fake("pykernels::candidate_sample.reference", _fake_sample, lib=LIBRARY)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("candidate_sample.reference", samplers.sample, _key)
candidate_sample["reference"] = torch.ops.pykernels.candidate_sample.reference


Forward = Callable[..., tuple[Tensor, ...]]
Gradients = Callable[..., tuple["Tensor | None", ...]]


def _function(
    name: str, forward: Forward, gradients: Gradients, reference: Callable[..., Tensor], learned: int, tensors: int
) -> type[Function]:
    """A Function `apply(backend, sparse, table, *tensors, *options)` -> loss of each row.

    Args:
        forward: (backend, needed, *tensors, *options) -> (loss, *kept for backward).
        gradients: (backend, sparse, table, mask, dloss, kept, *tensors, *options) -> gradients of the first `learned`
            tensors. table: what an optimizer that steps the rows of `weight` itself takes notes in, or None.
        reference: (*tensors, *options) -> the same loss; its derivatives serve second derivatives.
    """

    class Gradient(Function):
        @staticmethod
        def forward(ctx: Any, backend: str, mask: tuple[bool, ...], dloss: Tensor, count: int, *rest: Any) -> Any:
            kept, arguments = rest[:count], rest[count:]
            ctx.save_for_backward(dloss, *arguments[:tensors])
            ctx.mask, ctx.options, ctx.count = mask, arguments[tensors:], count
            return gradients(backend, False, None, mask, dloss, kept, *arguments)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            dloss, *given = ctx.saved_tensors
            places = [i for i, x in enumerate(given[:learned]) if x is not None]
            wanted = [i for i in places if ctx.mask[i]]

            def first(dloss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
                by_place = dict(zip(places, inputs, strict=True))

                def loss(*chosen: Tensor) -> Tensor:
                    changed = {**by_place, **dict(zip(wanted, chosen, strict=True))}
                    full = [changed.get(i, x) for i, x in enumerate(given)]
                    return reference(*full, *ctx.options)

                found: tuple[Tensor, ...] = torch.func.vjp(loss, *(by_place[i] for i in wanted))[1](dloss)
                return found

            primals = (dloss, *(given[i] for i in places))
            second = second_derivative(first, primals, tuple(cotangents[i] for i in wanted))
            of_given: list[Tensor | None] = [None] * tensors
            for i, value in zip(places, second[1:], strict=True):
                of_given[i] = value
            return None, None, second[0], None, *(None,) * ctx.count, *of_given, *(None,) * len(ctx.options)

    class Loss(Function):
        @staticmethod
        def forward(ctx: Any, backend: str, sparse: bool, table: Any, *arguments: Any) -> Tensor:
            needed = any(ctx.needs_input_grad)
            loss, *kept = forward(backend, needed, *arguments)
            ctx.backend, ctx.sparse, ctx.table, ctx.count = backend, sparse, table, len(kept)
            ctx.options = arguments[tensors:]
            ctx.save_for_backward(*arguments[:tensors], *kept)
            return loss

        @staticmethod
        def backward(ctx: Any, dloss: Tensor) -> Any:
            saved = ctx.saved_tensors
            given, kept, options = saved[:tensors], saved[tensors:], ctx.options
            mask = ctx.needs_input_grad[3 : 3 + learned]
            if torch.is_grad_enabled():
                found = Gradient.apply(ctx.backend, mask, dloss, ctx.count, *kept, *given, *options)
                if ctx.sparse and mask[1]:
                    found = (found[0], found[1].to_sparse(1), *found[2:])
            else:
                found = gradients(ctx.backend, ctx.sparse, ctx.table, mask, dloss, kept, *given, *options)
            grads = (g if m else None for g, m in zip(found, mask, strict=True))
            return None, None, None, *grads, *(None,) * (tensors - learned + len(options))

    Loss.__name__ = Loss.__qualname__ = name
    Gradient.__name__ = Gradient.__qualname__ = f"{name}Grad"
    return Loss


def _rows_forward(backend: str, needed: bool, *arguments: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = logistic_rows_forward[backend](*arguments, needed)
    return found


def _bags(dloss: Tensor, input: Tensor, ids: Tensor, padded: bool, coefficient: Tensor) -> Positions:
    """The gradient of the table as that of a sum of weighted bags: row i of `input` goes to ids[i], by the slopes."""
    slopes = (coefficient * dloss.unsqueeze(1)).to(input.dtype)
    if not padded:
        return Positions(ids, input, per_sample_weights=slopes, mode="sum")
    inside = ids >= 0
    ends = inside.sum(1).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return Positions(ids[inside], input, offsets, slopes[inside], mode="sum", include_last_offset=True)


def _rows_gradients(
    backend: str,
    sparse: bool,
    table: Any,
    mask: tuple[bool, ...],
    dloss: Tensor,
    kept: tuple[Tensor, ...],
    input: Tensor,
    weight: Tensor,
    ids: Tensor,
    signs: Tensor | None,
) -> tuple[Tensor | None, ...]:
    coefficient, unit = kept
    dinput = (unit * dloss.unsqueeze(1)).to(input.dtype) if mask[0] else None
    dweight = None
    if mask[1] and note(table, lambda: _bags(dloss, input, ids, signs is not None, coefficient)):
        pass
    elif mask[1] and sparse:
        found = row_gradient_sparse[backend](dloss, input, ids, coefficient, weight.shape[0])
        dweight = sparse_rows(found, weight.shape[0])
    elif mask[1]:
        dweight = row_gradient[backend](dloss, input, ids, coefficient, weight.shape[0])
    return dinput, dweight


def _sampled_forward(backend: str, needed: bool, *arguments: Any) -> tuple[Tensor, ...]:
    input, sampled = arguments[0], arguments[4]
    small = 4 * input.shape[0] * sampled.shape[0] <= KEPT_LOGITS
    keep = needed and backend == "cpu" and input.dtype == torch.float32 and small
    found: tuple[Tensor, ...] = sampled_rows_forward[backend](*arguments, keep)
    return found


def _sampled_gradients(
    backend: str,
    sparse: bool,
    table: Any,
    mask: tuple[bool, ...],
    dloss: Tensor,
    kept: tuple[Tensor, ...],
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    if mask[1] and (sparse or expects(table)):
        dinput, ids, values, dbias = sampled_rows_backward_sparse[backend](dloss, *kept, *arguments, mask)
        if note(table, lambda: Positions(ids[0], values)):
            return dinput, None, dbias
        return dinput, sparse_rows((ids, values), arguments[1].shape[0]), dbias
    return sampled_rows_backward[backend](dloss, *kept, *arguments, mask)


def _linear_forward(backend: str, needed: bool, *arguments: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = linear_rows_forward[backend](*arguments)
    return found


def _linear_gradients(
    backend: str,
    sparse: bool,
    table: Any,
    mask: tuple[bool, ...],
    dloss: Tensor,
    kept: tuple[Tensor, ...],
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    return linear_rows_backward[backend](dloss, *kept, *arguments, mask)


LogisticRows = _function("LogisticRows", _rows_forward, _rows_gradients, losses.logistic_rows, 2, 4)
SampledRows = _function("SampledRows", _sampled_forward, _sampled_gradients, losses.sampled_rows, 3, 7)
SparseLogisticRows, SparseSampledRows = whole(LogisticRows), whole(SampledRows)
LinearRows = _function("LinearRows", _linear_forward, _linear_gradients, linear.linear_rows, 3, 5)
