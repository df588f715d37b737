"""Activations with a learnt parameter, one for all elements or one for each channel: prelu's slope, swish's beta.

The weight gradient is a sum over all elements of a channel, made in two stages of fixed order: a bounded number of
programs each add their tiles and store one row, then one kernel adds the rows. A single channel is thus spread over as
many programs as a thousand channels are. A lane adds its elements in float32 and the lanes are added in float64: a few
thousand additions that cost nothing, where float32 would lose the digits that a sum of mixed signs still has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

PROGRAMS = 1024  #: of a weight gradient, over all channels


class _Parametric(NamedTuple):
    value: Any
    gradient: Any
    weight_gradient: Any


_PARAMETRIC = {
    "prelu": _Parametric(_lib.leaky_relu_value, _lib.leaky_relu_gradient, _lib.prelu_weight_gradient),
    "swish": _Parametric(_lib.swish_value, _lib.swish_gradient, _lib.swish_weight_gradient),
}


@triton.jit
def _channel_tile(
    number, channel_tile, outer, inner, col_tiles, BY_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Tile `number` of channel `channel_tile`, or, where channels are the columns, of COLS of them. As _lib.tile."""
    if BY_COLUMN:
        first_row, first_col = tl.cast(number, tl.int64) * ROWS, channel_tile.to(tl.int64) * COLS
    else:
        first_row = tl.cast(number // col_tiles, tl.int64) * ROWS
        first_col = tl.cast(number % col_tiles, tl.int64) * COLS
    row = (first_row + tl.arange(0, ROWS))[:, None]
    col = (first_col + tl.arange(0, COLS))[None, :]
    return row, col, (first_row + ROWS <= outer) & (first_col + COLS <= inner)


@triton.jit
def _parametric_fwd(x_ptrs, weight_ptrs, y_ptrs, mask, weight_mask, VALUE: tl.constexpr):
    PRECISE: tl.constexpr = x_ptrs.dtype.element_ty == tl.float32
    x = tl.load(x_ptrs, mask=mask).to(tl.float32)
    weight = tl.load(weight_ptrs, mask=weight_mask).to(tl.float32)
    tl.store(y_ptrs, VALUE(x, weight, PRECISE).to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def parametric_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, outer, inner, channel_tiles, col_tiles, x_row, x_channel, y_row, y_channel,
    VALUE: tl.constexpr, BY_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) % channel_tiles
    number = tl.program_id(0) // channel_tiles
    row, col, whole = _channel_tile(number, channel, outer, inner, col_tiles, BY_COLUMN, ROWS, COLS)
    if BY_COLUMN:
        weight_ptrs = weight_ptr + col
        x_ptrs, y_ptrs = x_ptr + (row * x_row + col), y_ptr + (row * y_row + col)
    else:
        weight_ptrs = weight_ptr + channel
        x_ptrs = x_ptr + (row * x_row + channel.to(tl.int64) * x_channel + col)
        y_ptrs = y_ptr + (row * y_row + channel.to(tl.int64) * y_channel + col)
    if whole:
        _parametric_fwd(x_ptrs, weight_ptrs, y_ptrs, None, None, VALUE)
    else:
        mask = (row < outer) & (col < inner)
        _parametric_fwd(x_ptrs, weight_ptrs, y_ptrs, mask, col < inner if BY_COLUMN else None, VALUE)


@triton.jit
def _parametric_bwd(
    dy_ptrs, x_ptrs, dx_ptrs, weight, mask,
    GRADIENT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = x_ptrs.dtype.element_ty == tl.float32
    dy = tl.load(dy_ptrs, mask=mask).to(tl.float32)
    x = tl.load(x_ptrs, mask=mask).to(tl.float32)
    if NEED_X:
        tl.store(dx_ptrs, GRADIENT(dy, x, weight, PRECISE).to(dx_ptrs.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        return WEIGHT_GRADIENT(dy, x, weight, PRECISE)
    else:
        return x


@triton.jit
def parametric_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, outer, inner, channel_tiles, col_tiles, tiles, parts,
    dy_row, dy_channel, x_row, x_channel, dx_row, dx_channel,
    GRADIENT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    BY_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx, and this program's share of the weight gradient: row `part` of a (parts, channels) buffer.

    Every program walks its tiles in order and owns its elements of the buffer, so the sum has one order: no atomics.
    """
    channel = tl.program_id(0) % channel_tiles
    part = tl.program_id(0) // channel_tiles
    offset = channel.to(tl.int64)
    if BY_COLUMN:
        offset = offset * 0
        weight_col = channel.to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
        weight = tl.load(weight_ptr + weight_col, mask=weight_col < inner).to(tl.float32)
    else:
        weight = tl.load(weight_ptr + channel).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for number in range(part, tiles, parts):
        row, col, whole = _channel_tile(number, channel, outer, inner, col_tiles, BY_COLUMN, ROWS, COLS)
        dy_ptrs = dy_ptr + (row * dy_row + offset * dy_channel + col)
        x_ptrs = x_ptr + (row * x_row + offset * x_channel + col)
        dx_ptrs = dx_ptr + (row * dx_row + offset * dx_channel + col)
        if whole:
            total += _parametric_bwd(
                dy_ptrs, x_ptrs, dx_ptrs, weight, None, GRADIENT, WEIGHT_GRADIENT, NEED_X, NEED_WEIGHT
            )
        else:
            mask = (row < outer) & (col < inner)
            share = _parametric_bwd(
                dy_ptrs, x_ptrs, dx_ptrs, weight, mask, GRADIENT, WEIGHT_GRADIENT, NEED_X, NEED_WEIGHT
            )
            total += tl.where(mask, share, 0.0)
    if NEED_WEIGHT:
        if BY_COLUMN:
            partial_ptrs = partial_ptr + part.to(tl.int64) * inner + weight_col
            tl.store(partial_ptrs, tl.sum(total.to(tl.float64), 0, keep_dims=True), mask=weight_col < inner)
        else:
            tl.store(partial_ptr + part.to(tl.int64) * channel_tiles + channel, tl.sum(total.to(tl.float64)))


@triton.jit
def sum_parts_kernel(partial_ptr, out_ptr, parts, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[c] = sum of partial[:, c], always in the same order, rounded once."""
    col = (tl.program_id(0) * COLS + tl.arange(0, COLS)).to(tl.int64)
    total = tl.zeros((ROWS, COLS), tl.float64)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & (col < channels)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * channels + col[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=col < channels)


class _Channels(NamedTuple):
    """Tensors seen as (outer, channels, inner); strides holds each one's row and channel stride, flat."""

    outer: int
    channels: int
    inner: int
    strides: tuple[int, ...]
    constants: dict[str, Any]
    channel_tiles: int
    col_tiles: int
    tiles: int  #: for each channel tile


def _by_channel(output: Tensor, inputs: Sequence[Tensor], channels: int) -> tuple[_Channels, list[Tensor]]:
    """The view for a kernel; an input that has none is copied. The output is contiguous."""
    if channels == 1:
        view, _, tensors = _lib.fit_rows([output], inputs)
        outer, inner, by_column = view.rows, view.cols, False
        strides = tuple(s for stride in view.strides for s in (stride, 0))
    else:
        outer, inner = output.shape[0], output.shape[2:].numel()
        by_column = inner == 1
        tensors, strides = [], ()
        for t in [output, *inputs]:
            row, channel, element = _channel_strides(t, inner)
            if (channel if by_column else element) != 1:
                t = t.contiguous()
                row, channel, element = _channel_strides(t, inner)
            tensors.append(t)
            strides += (row, channel)
        tensors = tensors[1:]
    cols = channels if by_column else inner
    width = min(1024, triton.next_power_of_2(cols))
    height = min(1024 // width, triton.next_power_of_2(outer))
    constants = {"BY_COLUMN": by_column, "ROWS": height, "COLS": width}
    row_tiles, col_tiles = triton.cdiv(outer, height), triton.cdiv(cols, width)
    channel_tiles, tiles = (col_tiles, row_tiles) if by_column else (channels, row_tiles * col_tiles)
    return _Channels(outer, channels, cols, strides, constants, channel_tiles, col_tiles, tiles), tensors


def _channel_strides(x: Tensor, inner: int) -> tuple[int, ...]:
    """Strides of x as (outer, channels, inner), zeros where no such view exists."""
    try:
        return x.view(x.shape[0], x.shape[1], inner).stride()
    except RuntimeError:
        return (0, 0, 0)


def parametric_forward(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    view, (x,) = _by_channel(y, [x], weight.numel())
    y_row, y_channel, x_row, x_channel = view.strides
    _lib.launch(
        parametric_fwd_kernel, (view.channel_tiles * view.tiles,), x,
        x, weight.contiguous(), y, view.outer, view.inner, view.channel_tiles, view.col_tiles,
        x_row, x_channel, y_row, y_channel,
        VALUE=_PARAMETRIC[activation].value, **view.constants,
    )  # fmt: skip
    return y


def parametric_backward(
    dy: Tensor, x: Tensor, weight: Tensor, activation: str, output_mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    need_x, need_weight = output_mask
    dx = x.new_empty(x.shape) if need_x else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    if x.numel() == 0:
        return dx, dweight.zero_()
    if not any(output_mask):
        return dx, dweight
    if not need_x:
        x = x.contiguous()  # nothing is written in the layout of dx, but one layout must lead
    view, (dy, x) = _by_channel(dx if need_x else x, [dy, x], weight.numel())
    dx_row, dx_channel, dy_row, dy_channel, x_row, x_channel = view.strides
    # PROGRAMS depends on no device, so that the sum is the same everywhere
    parts = max(1, min(view.tiles, PROGRAMS // view.channel_tiles))
    partial = torch.empty((parts, view.channels) if need_weight else (1, 1), dtype=torch.float64, device=x.device)
    functions = _PARAMETRIC[activation]
    _lib.launch(
        parametric_bwd_kernel, (view.channel_tiles * parts,), x,
        dy, x, weight.contiguous(), dx if need_x else x, partial,
        view.outer, view.inner, view.channel_tiles, view.col_tiles, view.tiles, parts,
        dy_row, dy_channel, x_row, x_channel, dx_row, dx_channel,
        GRADIENT=functions.gradient, WEIGHT_GRADIENT=functions.weight_gradient, NEED_X=need_x, NEED_WEIGHT=need_weight,
        **view.constants,
    )  # fmt: skip
    if need_weight:
        width = min(128, triton.next_power_of_2(view.channels))
        _lib.launch(
            sum_parts_kernel, (triton.cdiv(view.channels, width),), x, partial, dweight, parts, view.channels,
            ROWS=1024 // width, COLS=width,
        )  # fmt: skip
    return dx, dweight
