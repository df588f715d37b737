"""The operators of lookup and bags (schemas, fakes), and their two autograd Functions.

Kernels on a GPU skip ids outside the table (rows of zeros, no gradient) and take offsets as clamped to
[previous, number of ids]; forward ones report the first such id or offset as `what` (see pykernels/_errors.py; 0: not
at all), backward ones nothing. Native CPU kernels raise and ignore `what`.

Gradients are linear in dy, so what is kept for backward is ids (and, for mode "max", where the maxima are); the table
only where `per_sample_weights` need a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _backends, reference
from .._function import second_derivative, sparse_rows, whole
from .._library import define
from .._pending import Positions, note

ROOM = _backends.Room("embedding")


def _fake_rows(dy: Tensor, rows: int) -> Tensor:
    return dy.new_empty((rows, dy.shape[-1]))


def _fake_sparse(dy: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    unique = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty((1, unique), dtype=torch.int64), dy.new_empty((unique, dy.shape[-1]))


def _fake_bag(
    ids: Tensor, weight: Tensor, offsets: Tensor | None, scale: Tensor | None, mode: str, last: bool, *more: Any
) -> tuple[Tensor, Tensor]:
    shape = (ids.shape[0] if offsets is None else offsets.shape[0] - int(last), weight.shape[1])
    _, with_maxima, _ = more
    maxima = shape if mode == "max" and with_maxima else (0,)
    return weight.new_empty(shape), weight.new_empty(maxima, dtype=torch.int32)


embedding_forward = define(
    ROOM,
    "embedding_forward(Tensor ids, Tensor weight, int what) -> Tensor",
    lambda ids, weight, what: weight.new_empty((*ids.shape, weight.shape[1])),
)
embedding_backward = define(
    ROOM,
    "embedding_backward(Tensor dy, Tensor ids, SymInt rows, int padding_idx, bool by_frequency) -> Tensor",
    lambda dy, ids, rows, *options: _fake_rows(dy, rows),
)
embedding_backward_sparse = define(
    ROOM,
    "embedding_backward_sparse(Tensor dy, Tensor ids, SymInt rows, int padding_idx, bool by_frequency) "
    "-> (Tensor, Tensor)",
    lambda dy, ids, *options: _fake_sparse(dy, ids),
)
embedding_bag_forward = define(
    ROOM,
    "embedding_bag_forward(Tensor ids, Tensor weight, Tensor? offsets, Tensor? per_sample_weights, str mode, "
    "bool include_last_offset, int padding_idx, bool with_maxima, int what) -> (Tensor, Tensor)",
    _fake_bag,
)
embedding_bag_backward = define(
    ROOM,
    "embedding_bag_backward(Tensor dy, Tensor ids, Tensor? offsets, Tensor? per_sample_weights, Tensor? maxima, "
    "SymInt rows, str mode, bool include_last_offset, int padding_idx, bool by_frequency) -> Tensor",
    lambda dy, ids, offsets, per_sample_weights, maxima, rows, *options: _fake_rows(dy, rows),
)
embedding_bag_backward_sparse = define(
    ROOM,
    "embedding_bag_backward_sparse(Tensor dy, Tensor ids, Tensor? offsets, Tensor? per_sample_weights, "
    "Tensor? maxima, SymInt rows, str mode, bool include_last_offset, int padding_idx, bool by_frequency) "
    "-> (Tensor, Tensor)",
    lambda dy, ids, *options: _fake_sparse(dy, ids),
)
embedding_bag_backward_weights = define(
    ROOM,
    "embedding_bag_backward_weights(Tensor dy, Tensor ids, Tensor weight, Tensor? offsets, str mode, "
    "bool include_last_offset, int padding_idx) -> Tensor",
    lambda dy, ids, weight, *options: weight.new_empty(ids.shape),
)


def _by_frequency(table: Tensor, ids: Tensor) -> Tensor:
    """Each row divided by how often its id was given."""
    ids = ids.reshape(-1)
    counts = ids.new_zeros(table.shape[0]).index_add(0, ids, torch.ones_like(ids))
    return table / counts.clamp(min=1).unsqueeze(1).to(table.dtype)


# backend, padding (-1: none), scale by frequency, sparse, what (code of the ids, for reports of invalid ones)
LookupOptions = tuple[str, int, bool, bool, int]


class LookupGrad(Function):
    """The dense dweight as a function of dy. Linear: its own backward is a lookup."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, ids: Tensor, rows: int, options: LookupOptions) -> Tensor:
        backend, padding, by_frequency, _, _ = options
        ctx.save_for_backward(ids)
        ctx.options = options
        dweight: Tensor = embedding_backward[backend](dy, ids, rows, padding, by_frequency)
        return dweight

    @staticmethod
    def backward(ctx: Any, ddweight: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        _, padding, by_frequency, _, _ = ctx.options
        if by_frequency:
            ddweight = _by_frequency(ddweight, ids)
        ddy = reference.embedding(ids, ddweight)
        if padding >= 0:
            ddy = torch.where((ids == padding).unsqueeze(-1), 0, ddy)
        return ddy, None, None, None


class Lookup(Function):
    """Rows of a table, on every backend; keeps the ids."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, options: LookupOptions, table: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.options, ctx.rows, ctx.table = options, weight.shape[0], table
        y: Tensor = embedding_forward[options[0]](ids, weight, options[4])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        backend, padding, by_frequency, sparse, _ = ctx.options
        if torch.is_grad_enabled():
            dweight = LookupGrad.apply(dy, ids, ctx.rows, ctx.options)
            return dweight.to_sparse(1) if sparse else dweight, None, None, None
        skipped = padding if padding >= 0 else None
        if ctx.table and note(
            ctx.table, lambda: Positions(ids, dy, None, None, None, None, False, skipped, by_frequency)
        ):
            return None, None, None, None
        if sparse:
            found = embedding_backward_sparse[backend](dy, ids, ctx.rows, padding, by_frequency)
            return sparse_rows(found, ctx.rows), None, None, None
        return embedding_backward[backend](dy, ids, ctx.rows, padding, by_frequency), None, None, None


# backend, mode, include_last_offset, padding (-1: none), scale by frequency, sparse, what
BagOptions = tuple[str, str, bool, int, bool, bool, int]


def bag_gradients(
    dy: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    maxima: Tensor | None,
    rows: int,
    mask: tuple[bool, bool],
    options: BagOptions,
) -> tuple[Tensor | None, Tensor | None]:
    backend, mode, last, padding, by_frequency, sparse, _ = options
    dweight = dscale = None
    if mask[0] and sparse:
        found = embedding_bag_backward_sparse[backend](
            dy, ids, offsets, scale, maxima, rows, mode, last, padding, by_frequency
        )
        dweight = sparse_rows(found, rows)
    elif mask[0]:
        dweight = embedding_bag_backward[backend](
            dy, ids, offsets, scale, maxima, rows, mode, last, padding, by_frequency
        )
    if mask[1]:
        dscale = embedding_bag_backward_weights[backend](dy, ids, weight, offsets, mode, last, padding)
    return dweight, dscale


def bag_positions(
    dy: Tensor, scale: Tensor | None, ids: Tensor, offsets: Tensor | None, maxima: Tensor | None, options: BagOptions
) -> Positions:
    _, mode, last, padding, by_frequency, _, _ = options
    return Positions(ids, dy, offsets, scale, maxima, mode, last, padding if padding >= 0 else None, by_frequency)


class BagGrad(Function):
    """(dense dweight, dper_sample_weights) as a function of dy, and of the table and weights where both matter."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: Tensor | None, scale: Tensor | None, *fixed: Any) -> Any:
        ids, offsets, maxima, _, mask, options = fixed
        ctx.save_for_backward(dy, weight, scale, ids, offsets, maxima)
        ctx.mask, ctx.options = mask, options
        return bag_gradients(dy, weight, scale, *fixed)

    @staticmethod
    def backward(ctx: Any, ddweight: Tensor | None, ddscale: Tensor | None) -> Any:
        dy, weight, scale, ids, offsets, maxima = ctx.saved_tensors
        _, mode, last, padding, by_frequency, _, _ = ctx.options
        options = {"mode": mode, "include_last_offset": last, "padding_idx": None if padding < 0 else padding}
        if mode == "max":
            return _at_maxima(ddweight, maxima, ids, offsets), *(None,) * 8
        if weight is None:
            if by_frequency:
                ddweight = _by_frequency(ddweight, ids)
            ddy = reference.embedding_bag(ids, ddweight, offsets, per_sample_weights=scale, **options)
            return ddy, *(None,) * 8

        def first(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            def bags(*chosen: Tensor) -> Tensor:
                given = iter(chosen)
                table, factors = (next(given) if m else x for m, x in zip(ctx.mask, inputs, strict=True))
                return reference.embedding_bag(
                    ids, table, offsets, scale_grad_by_freq=by_frequency, per_sample_weights=factors, **options
                )

            wanted = (x for m, x in zip(ctx.mask, inputs, strict=True) if m)
            grads: tuple[Tensor, ...] = torch.func.vjp(bags, *wanted)[1](dy)
            return grads

        cotangents = tuple(g for m, g in zip(ctx.mask, (ddweight, ddscale), strict=True) if m)
        return *second_derivative(first, (dy, weight, scale), cotangents), *(None,) * 6


def _at_maxima(table: Tensor, maxima: Tensor, ids: Tensor, offsets: Tensor | None) -> Tensor:
    """(bags, D): each column of the row that held the bag's maximum; 0 for a bag without ids."""
    if ids.numel() == 0:
        return table.new_zeros(maxima.shape)
    bags = maxima.shape[0]
    starts = torch.arange(bags, device=ids.device) * ids.shape[1] if offsets is None else offsets[:bags]
    positions = (starts.unsqueeze(1) + maxima.clamp(min=0)).clamp(max=ids.numel() - 1)
    return torch.where(maxima < 0, 0, table.gather(0, ids.reshape(-1)[positions].long()))


class Bag(Function):
    """Bags of rows, on every backend."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor | None,
        ids: Tensor,
        offsets: Tensor | None,
        options: BagOptions,
        table: Any,
    ) -> Tensor:
        backend, mode, last, padding, _, _, what = options
        needs = ctx.needs_input_grad
        out, maxima = embedding_bag_forward[backend](
            ids, weight, offsets, scale, mode, last, padding, mode == "max" and needs[0], what
        )
        ctx.save_for_backward(weight if needs[1] else None, scale, ids, offsets, maxima if mode == "max" else None)
        ctx.rows, ctx.options, ctx.table = weight.shape[0], options, table
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, scale, ids, offsets, maxima = ctx.saved_tensors
        mask, options = ctx.needs_input_grad[:2], ctx.options
        if not torch.is_grad_enabled():
            if (
                mask[0]
                and ctx.table
                and note(ctx.table, lambda: bag_positions(dy, scale, ids, offsets, maxima, options))
            ):
                mask = (False, mask[1])
            grads = bag_gradients(dy, weight, scale, ids, offsets, maxima, ctx.rows, mask, options)
            return *grads, None, None, None, None
        sparse = options[5]
        dense = (*options[:5], False, options[6])
        dweight, dscale = BagGrad.apply(dy, weight, scale, ids, offsets, maxima, ctx.rows, mask, dense)
        return dweight.to_sparse(1) if sparse and mask[0] else dweight, dscale, None, None, None, None


SparseLookup, SparseBag = whole(Lookup), whole(Bag)
