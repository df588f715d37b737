"""Tensors of one shape as the CUDA kernels see them: rows of adjacent elements, each tensor with its own row stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """`rows` runs of `cols` adjacent elements; one row stride for each tensor, in elements."""

    rows: int
    cols: int
    strides: tuple[int, ...]


def as_rows(*tensors: Tensor) -> Rows | None:
    """One 2-D view that fits all the tensors (same shape, not empty), or None where there is none.

    Dimensions are taken in the order of the first tensor's strides, so dense tensors of one memory format are one row
    whatever the format.
    """
    first = tensors[0]
    runs: list[tuple[int, tuple[int, ...]]] = []
    for d in sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=lambda d: -first.stride(d)):
        size, strides = first.shape[d], tuple(t.stride(d) for t in tensors)
        if runs and runs[-1][1] == tuple(size * s for s in strides):
            size *= runs.pop()[0]
        runs.append((size, strides))
    nowhere = (0,) * len(tensors)
    if not runs:
        return Rows(1, 1, nowhere)
    if len(runs) > 2 or any(s != 1 for s in runs[-1][1]):
        return None
    return Rows(1, runs[0][0], nowhere) if len(runs) == 1 else Rows(runs[0][0], runs[1][0], runs[0][1])


def fit_rows(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Rows, list[Tensor], list[Tensor]]:
    """The view for a kernel, with new tensors in place of those that do not fit the first output's layout.

    The caller copies a replaced output back. An input is copied only where there is no other way (an expanded gradient,
    a transposed operand).
    """
    tensors, n = [*outputs, *inputs], len(outputs)
    whole = as_rows(*tensors)
    if whole is None:
        layout = tensors[0] if as_rows(tensors[0]) else torch.empty_like(tensors[0])
        tensors = [t if as_rows(layout, t) else _like(layout, t, i >= n) for i, t in enumerate(tensors)]
        whole = as_rows(*tensors)
    if whole is None:  # each fits the layout, but in rows of different lengths
        layout = torch.empty_like(layout)
        tensors = [t if as_rows(layout, t, layout) == as_rows(layout, layout, layout) else _like(layout, t, i >= n)
                   for i, t in enumerate(tensors)]  # fmt: skip
        whole = as_rows(*tensors)
    assert whole is not None, "a dense layout is one row"
    return whole, tensors[:n], tensors[n:]


def _like(layout: Tensor, t: Tensor, copy: bool) -> Tensor:
    new = torch.empty_like(layout)
    return new.copy_(t) if copy else new


def channel_strides(x: Tensor, inner: int) -> tuple[int, int] | None:
    """Strides of the outer dimension and of the channel of x seen as (outer, channels, inner) with adjacent inner
    elements (adjacent channels, where inner is 1), or None where x has no such view."""
    try:
        outer, channel, element = x.view(x.shape[0], x.shape[1], inner).stride()
    except RuntimeError:
        return None
    return (outer, channel) if (channel if inner == 1 else element) == 1 else None
