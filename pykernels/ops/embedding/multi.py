"""Bags over many tables in one launch: schema and fake of the operator, its autograd Function, the public function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import reference
from ..._backends import is_compiling
from .. import _check, _ids
from .._function import apply
from .._library import define
from .._pending import is_held, note, outside_graphs, table_of
from ._checks import (
    before,
    check_bags,
    check_mode,
    check_offsets,
    check_per_sample_weights,
    check_table,
    offsets_for_reference,
    report_code,
)
from ._functions import ROOM, BagGrad, bag_gradients, bag_positions

__all__ = ["embedding_bag_multi"]

_CODE = report_code("embedding_bag_multi", "indices", many=True)


def _fake_multi(
    ids: list[Tensor],
    offsets: list[Tensor | None],
    weights: list[Tensor],
    per_sample_weights: list[Tensor],
    mode: str,
    include_last_offset: bool,
    with_maxima: bool,
    what: int,
) -> tuple[Tensor, Tensor]:
    first = offsets[0]
    bags = ids[0].shape[0] if first is None else first.shape[0] - int(include_last_offset)
    shape = (bags, sum(weight.shape[1] for weight in weights))
    maxima = shape if mode == "max" and with_maxima else (0,)
    return weights[0].new_empty(shape), weights[0].new_empty(maxima, dtype=torch.int32)


embedding_bag_multi_forward = define(
    ROOM,
    # Lists of one length T >= 1 (per_sample_weights: T or 0). Columns of table t: [sum of D before t, + D of t).
    "embedding_bag_multi_forward(Tensor[] ids, Tensor?[] offsets, Tensor[] weights, Tensor[] per_sample_weights, "
    "str mode, bool include_last_offset, bool with_maxima, int what) -> (Tensor, Tensor)",
    _fake_multi,
)


class Bags(Function):
    """One bag of each table side by side, on every backend; its gradient is that of each table's bag."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[str, str, bool, int],
        offsets: tuple[Tensor | None, ...],
        noted: list[Any],
        *tensors: Tensor,
    ) -> Tensor:
        """tensors: T tables, T ids, T or no weights of the ids; options: backend, mode, include_last_offset, what."""
        backend, mode, last, what = options
        count = len(offsets)
        weights, ids, scales = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        keep = mode == "max" and any(ctx.needs_input_grad)
        out, maxima = embedding_bag_multi_forward[backend](ids, offsets, weights, scales, mode, last, keep, what)
        learned = [bool(scales) and ctx.needs_input_grad[3 + 2 * count + table] for table in range(count)]
        tables = [weight if learned[table] else None for table, weight in enumerate(weights)]
        ctx.save_for_backward(*tables, *ids, *scales, *offsets, maxima if keep else None)
        ctx.shapes, ctx.options, ctx.noted = [weight.shape for weight in weights], options, noted
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        backend, mode, last, _ = ctx.options
        count, saved = len(ctx.shapes), ctx.saved_tensors
        weights, ids, offsets, maxima = saved[:count], saved[count : 2 * count], saved[-1 - count : -1], saved[-1]
        scales = saved[2 * count : -1 - count] or (None,) * count
        needs = ctx.needs_input_grad[3:]
        dweights: list[Tensor | None] = []
        dscales: list[Tensor | None] = []
        column = 0
        for table, (rows, size) in enumerate(ctx.shapes):
            columns = slice(column, column + size)
            column += size
            mask = (needs[table], scales[table] is not None and needs[2 * count + table])
            dweight = dscale = None
            if any(mask):
                places = None if maxima is None else maxima[:, columns].contiguous()
                options = (backend, mode, last, -1, False, False, 0)
                found = (dy[:, columns], scales[table], ids[table], offsets[table], places, options)
                if mask[0] and note(ctx.noted[table], partial(bag_positions, *found)):
                    mask = (False, mask[1])
                gradients = BagGrad.apply if torch.is_grad_enabled() else bag_gradients
                fixed = (ids[table], offsets[table], places, rows, mask, options)
                dweight, dscale = gradients(found[0], weights[table], scales[table], *fixed)
            dweights.append(dweight)
            dscales.append(dscale)
        return None, None, None, *dweights, *(None,) * count, *(dscales if len(needs) > 2 * count else ())


def embedding_bag_multi(
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor | None] | None,
    weights: Sequence[Tensor],
    *,
    mode: str = "sum",
    per_sample_weights: Sequence[Tensor] | None = None,
    include_last_offset: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """The bags of T tables side by side: `[bag(indices[0], weights[0]) | ... | bag(indices[T-1], weights[T-1])]`.

    bag is `embedding_bag`; all tables are served by one launch, and their outputs are written where they belong.

    Args:
        indices: T tensors of ids, int32 or int64: each Tensor[B, L] (L may differ) or Tensor[N] with offsets.
        offsets: T tensors (None for a table whose indices are 2-D), as in `embedding_bag`; None where all are 2-D.
        weights: T tables, Tensor[V_t, D_t] of one dtype and device. A table may be in the list more than once.
        mode: "sum", "mean" or "max", of all tables.
        per_sample_weights: T tensors, each of its indices' shape and the tables' dtype, with gradient; not with "max".
        include_last_offset: as in `embedding_bag`.
        bounds_check: as in `embedding`.
        backend: see `pykernels.explain`.

    Returns:
        Tensor[B, D_0 + ... + D_(T-1)] of the tables' dtype.

    Raises:
        ValueError: lists of different lengths or none at all; tables that give different numbers of bags; as
            `embedding_bag`.
        TypeError, RuntimeError, NotImplementedError, IndexError, BackendError: as `embedding_bag`; of ids and offsets
            the number of the table is named with the position.
    """
    name = "embedding_bag_multi"
    if is_compiling() and is_held(*weights):
        return outside_graphs(
            embedding_bag_multi,
            indices,
            offsets,
            weights,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            bounds_check=bounds_check,
            backend=backend,
        )
    starts = _check_lists(indices, offsets, weights, per_sample_weights, mode, include_last_offset)
    backend = ROOM.resolve(name, backend, weights[0])
    what = before(name, bounds_check, _CODE)
    if what and backend != "cpu":  # the native kernels look for themselves before they write
        for table, (ids, weight) in enumerate(zip(indices, weights, strict=True)):
            check_offsets(name, ids, starts[table])
            _ids.in_range(name, f"indices[{table}]", ids, weight.shape[0])
    if backend == "reference":
        return reference.embedding_bag_multi(
            indices,
            [offsets_for_reference(name, ids, start) for ids, start in zip(indices, starts, strict=True)],
            weights,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
        )
    scales = tuple(per_sample_weights or ())
    learned = any(tensor.requires_grad for tensor in (*weights, *scales))
    if torch.is_grad_enabled() and learned:
        options = (backend, mode, include_last_offset, what)
        noted = [table_of(weight) for weight in weights]
        result: Tensor = apply(Bags, options, starts, noted, *weights, *indices, *scales)
    else:
        result = embedding_bag_multi_forward[backend](
            indices, starts, weights, scales, mode, include_last_offset, False, what
        )[0]
    _ids.after(bounds_check)
    return result


def _check_lists(
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor | None] | None,
    weights: Sequence[Tensor],
    per_sample_weights: Sequence[Tensor] | None,
    mode: str,
    include_last_offset: bool,
) -> tuple[Tensor | None, ...]:
    name, count = "embedding_bag_multi", len(weights)
    if count == 0:
        raise ValueError(f"{name}(): argument 'weights' must hold at least one table")
    for argument, value in (("indices", indices), ("offsets", offsets), ("per_sample_weights", per_sample_weights)):
        if value is not None and len(value) != count:
            one = "; of ids Tensor[B, T], one a table, make ids.split(1, dim=1)" if isinstance(value, Tensor) else ""
            raise ValueError(
                f"{name}(): argument '{argument}' must have the length {count} of weights, not {len(value)}{one}"
            )
    starts = (None,) * count if offsets is None else tuple(offsets)
    check_mode(name, mode, False, False)
    bags = []
    for table, (ids, weight) in enumerate(zip(indices, weights, strict=True)):
        check_table(name, ids, weight, None, True, "indices")
        _check.same(name, "weights", weight, "weights[0]", weights[0])
        check_bags(name, ids, starts[table], include_last_offset, "indices")
        scale = None if per_sample_weights is None else per_sample_weights[table]
        check_per_sample_weights(name, scale, ids, weight, mode, "indices")
        start = starts[table]
        bags.append(ids.shape[0] if start is None else start.shape[0] - int(include_last_offset))
        if bags[table] != bags[0]:
            raise ValueError(f"{name}(): table {table} has {bags[table]} bags, table 0 has {bags[0]}; they must agree")
    return starts
