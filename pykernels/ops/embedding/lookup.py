"""Embedding lookup and pooled lookup: torch's functions, strict about ids and offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from ..._backends import is_compiling
from ...reference.embedding.lookup import renormalise_
from .. import _check, _ids
from .._function import apply
from .._pending import is_held, outside_graphs, table_of
from ._checks import (
    before,
    check_bags,
    check_mode,
    check_offsets,
    check_padding,
    check_per_sample_weights,
    check_table,
    offsets_for_reference,
    report_code,
)
from ._functions import ROOM, Bag, Lookup, SparseBag, SparseLookup, embedding_bag_forward, embedding_forward

__all__ = ["embedding", "embedding_bag"]

_LOOKUP, _BAG = report_code("embedding"), report_code("embedding_bag")


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Looks up rows of a table: `output[..., :] = weight[input[...], :]`. As `torch.nn.functional.embedding`.

    Args:
        input: ids, int32 or int64, any shape.
        weight: Tensor[V, D], any dtype; gradients of float16 and bfloat16 tables are summed in float32.
        padding_idx: the row of this id (negative counts from V) is returned like any other but gets no gradient.
        max_norm: rows of `input`'s ids whose norm is larger are first scaled to this norm, **in place in `weight`**.
        norm_type: p of that norm.
        scale_grad_by_freq: divide each row's gradient by the number of times its id is in `input`. Served with
            `sparse=True` too, where torch refuses it.
        sparse: give `weight` a row-sparse gradient (`torch.sparse_coo`). The native kernels make it coalesced: each id
            once, in ascending order.
        bounds_check: what happens to an id outside [0, V). "error": on the CPU an IndexError before anything is
            written; on a GPU it gives zeros and no gradient, and the next checked call or `pykernels.check_errors()`
            raises, with no synchronisation here. "sync": the same, but on a GPU this call waits and raises. "none": on
            a GPU it gives zeros silently; native CPU code raises all the same (its check guards memory).
        backend: see `pykernels.explain`.

    Returns:
        Tensor[*input.shape, D] of `weight`'s dtype. Under autocast as given.

    Raises:
        TypeError: `input` or `weight` is not a Tensor, `padding_idx` is not an int.
        RuntimeError: `input` is not int32 or int64; `weight` is not 2-D, or not floating point with `max_norm` or
            `scale_grad_by_freq`; different devices.
        AssertionError: `padding_idx` is outside [-V, V).
        IndexError: an id is outside [0, V): position and value are named, before `max_norm` writes anything. On a GPU
            as `bounds_check` says; by the reference backend there, torch's device-side assertion.
        BackendError: the named backend cannot serve the call.
    """
    if is_compiling() and is_held(weight):
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return outside_graphs(embedding, input, weight, *options, bounds_check=bounds_check, backend=backend)
    check_table("embedding", input, weight, max_norm, scale_grad_by_freq)
    if padding_idx is not None:
        check_padding("embedding", padding_idx, weight.shape[0])
    backend = ROOM.resolve("embedding", backend, weight)
    what = before("embedding", bounds_check, _LOOKUP)
    if max_norm is not None or (what and backend != "cpu"):  # the native kernels look for themselves before they write
        _ids.in_range("embedding", "input", input, weight.shape[0])
    if backend == "reference":
        return reference.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None:
        renormalise_(weight.detach(), input.reshape(-1), max_norm, norm_type)
    if torch.is_grad_enabled() and weight.requires_grad:
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        frozen = (backend, padding, scale_grad_by_freq, sparse, what)
        result: Tensor = apply(SparseLookup if sparse else Lookup, weight, input, frozen, table_of(weight))
    else:
        result = embedding_forward[backend](input, weight, what)
    _ids.after(bounds_check)
    return result


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
    *,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Looks up rows and reduces them bag by bag. As `torch.nn.functional.embedding_bag`.

    `output[b] = reduction over i of per_sample_weights[i] * weight[input[i]]`, i running over the positions of bag b
    whose id is not `padding_idx`. A bag without such a position gives 0 in every mode; "mean" divides by their number;
    of equal maxima the first gets the gradient; a NaN in a bag makes its maximum NaN.

    Args:
        input: ids, int32 or int64: Tensor[B, L], B bags of L, or Tensor[N], bags one after the other.
        weight: Tensor[V, D], floating point.
        offsets: int32 or int64 Tensor[B] (Tensor[B + 1] with `include_last_offset`), the position where each bag
            begins; only with, and required by, 1-D `input`.
        max_norm, norm_type, scale_grad_by_freq, sparse: as in `embedding`; the last two not with mode "max". (torch
            2.13's CPU code divides by the count of another id of the call; here each row has its own.)
        mode: "sum", "mean" or "max".
        per_sample_weights: Tensor of `input`'s shape and `weight`'s dtype, with gradient; for "sum" and, where torch
            refuses it, "mean".
        include_last_offset: the last element of `offsets` is the end of the last bag; ids beyond it are in no bag.
        padding_idx: this id (negative counts from V) is left out of every bag and gets no gradient.
        bounds_check: as in `embedding`; on a GPU offsets that are wrong are taken as clamped, and reported, too.
        backend: see `pykernels.explain`.

    Returns:
        Tensor[B, D] of `weight`'s dtype; sums are taken in float32 (float64 for float64). Under autocast as given.

    Raises:
        TypeError: an argument is not a Tensor, `padding_idx` is not an int.
        ValueError: `input` is not 1-D or 2-D, `weight` not 2-D; `offsets` missing, not 1-D, or given with 2-D input;
            `per_sample_weights` not of `input`'s shape; unknown `mode`; "max" with `sparse` or `scale_grad_by_freq`;
            offsets that decrease (torch returns garbage).
        NotImplementedError: `per_sample_weights` with mode "max".
        RuntimeError: wrong dtypes; different devices; `padding_idx` outside [-V, V); empty `offsets` with
            `include_last_offset`; offsets that do not begin with 0 or exceed N.
        IndexError: an id is outside [0, V), named with its position before anything is written. (torch: RuntimeError.)
            Values of ids and offsets on a GPU: as `bounds_check` says.
        BackendError: the named backend cannot serve the call.
    """
    name = "embedding_bag"
    if is_compiling() and is_held(weight):
        options = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        more = {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
        return outside_graphs(
            embedding_bag, input, weight, *options, **more, bounds_check=bounds_check, backend=backend
        )
    check_table(name, input, weight, max_norm, scale_grad_by_freq)
    _check.floating(name, "weight", weight)
    check_bags(name, input, offsets, include_last_offset)
    check_mode(name, mode, scale_grad_by_freq, sparse)
    check_per_sample_weights(name, per_sample_weights, input, weight, mode)
    if padding_idx is not None:
        check_padding(name, padding_idx, weight.shape[0])
    backend = ROOM.resolve(name, backend, weight)
    what = before(name, bounds_check, _BAG)
    if max_norm is not None or (what and backend != "cpu"):  # the native kernels look for themselves before they write
        check_offsets(name, input, offsets)
        _ids.in_range(name, "input", input, weight.shape[0])
    if backend == "reference":
        return reference.embedding_bag(
            input,
            weight,
            offsets_for_reference(name, input, offsets),
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if max_norm is not None:
        renormalise_(weight.detach(), input.reshape(-1), max_norm, norm_type)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    learned = weight.requires_grad or (per_sample_weights is not None and per_sample_weights.requires_grad)
    if torch.is_grad_enabled() and learned:
        frozen = (backend, mode, include_last_offset, padding, scale_grad_by_freq, sparse, what)
        result: Tensor = apply(
            SparseBag if sparse else Bag, weight, per_sample_weights, input, offsets, frozen, table_of(weight)
        )
    else:
        result = embedding_bag_forward[backend](
            input, weight, offsets, per_sample_weights, mode, include_last_offset, padding, False, what
        )[0]
    _ids.after(bounds_check)
    return result
