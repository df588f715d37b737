"""Bias, activation and dropout: one kernel each way for all activations and gated units, which come as constants.

The random words of dropout are addressed by the element's position in the output, so a tile makes its own and backward
makes them again. The bias gradient is a sum over rows in two stages of fixed order, as in _parametric.py: a program
adds its tiles and stores one row, then one kernel adds the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from ._parametric import PROGRAMS, sum_parts_kernel

#: gated unit -> its gate's activation, and whether the gate is the first half
GATED = {
    "glu": ("sigmoid", False),
    "reglu": ("relu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "swiglu": ("silu", True),
    "bilinear": ("identity", True),
}


@triton.jit
def _kept(seed, index, last):
    """Whether dropout keeps these elements; last: the threshold less one, which fits 32 bits where 2**32 does not."""
    return _lib.philox_word(seed, index) > tl.cast(last, tl.uint32)


@triton.jit
def _with_bias(x_ptrs, bias_ptrs, mask, bias_mask, BIAS: tl.constexpr):
    x = tl.load(x_ptrs, mask=mask).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptrs, mask=bias_mask).to(tl.float32)
    return x


@triton.jit
def _fused_fwd(
    x_ptrs, bias_ptrs, y_ptrs, up, seed_ptr, index, alpha, scale, last, mask, bias_mask,
    VALUE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = x_ptrs.dtype.element_ty == tl.float32
    y = VALUE(_with_bias(x_ptrs, bias_ptrs, mask, bias_mask, BIAS), alpha, PRECISE)
    if GATED:
        y *= _with_bias(x_ptrs + up, bias_ptrs + up, mask, bias_mask, BIAS)
    if DROP:
        y = tl.where(_kept(tl.load(seed_ptr), index, last), y * scale, 0.0)
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _place(number, col_tile, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int64 rows and columns of a tile, and whether all of them exist."""
    first_row, first_col = tl.cast(number, tl.int64) * ROWS, tl.cast(col_tile, tl.int64) * COLS
    row = (first_row + tl.arange(0, ROWS))[:, None]
    col = (first_col + tl.arange(0, COLS))[None, :]
    return row, col, (first_row + ROWS <= rows) & (first_col + COLS <= cols)


@triton.jit
def fused_fwd_kernel(
    x_ptr, bias_ptr, seed_ptr, y_ptr, rows, cols, col_tiles, x_stride, gate, up, alpha, scale, last,
    VALUE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y is contiguous. gate and up: where the halves begin, up counted from gate."""
    number, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    row, col, whole = _place(number, col_tile, rows, cols, ROWS, COLS)
    index = row * cols + col
    x_ptrs, bias_ptrs = x_ptr + (row * x_stride + gate + col), bias_ptr + (gate + col)
    if whole:
        _fused_fwd(
            x_ptrs, bias_ptrs, y_ptr + index, up, seed_ptr, index, alpha, scale, last, None, None,
            VALUE, GATED, BIAS, DROP,
        )  # fmt: skip
    else:
        _fused_fwd(
            x_ptrs, bias_ptrs, y_ptr + index, up, seed_ptr, index, alpha, scale, last,
            (row < rows) & (col < cols), col < cols, VALUE, GATED, BIAS, DROP,
        )  # fmt: skip


@triton.jit
def _fused_bwd(
    dy_ptrs, x_ptrs, bias_ptrs, dx_ptrs, y_ptrs, up, seed_ptr, index, alpha, scale, last, mask, bias_mask,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr,
):  # fmt: skip
    """The gradients at the gate (or the only input) and at up."""
    PRECISE: tl.constexpr = x_ptrs.dtype.element_ty == tl.float32
    x = _with_bias(x_ptrs, bias_ptrs, mask, bias_mask, BIAS)
    dy = tl.load(dy_ptrs, mask=mask).to(tl.float32)
    if DROP:
        kept = _kept(tl.load(seed_ptr), index, last)
        dy = tl.where(kept, dy * scale, 0.0)
    if GATED:
        value = VALUE(x, alpha, PRECISE)
        other = _with_bias(x_ptrs + up, bias_ptrs + up, mask, bias_mask, BIAS)
        dx, dup = GRADIENT(dy * other, x, alpha, PRECISE), dy * value
        y = value * other
        if NEED_X:
            tl.store(dx_ptrs + up, dup.to(dx_ptrs.dtype.element_ty), mask=mask)
    else:
        dx = GRADIENT(dy, x, alpha, PRECISE)
        dup = dx
        if NEED_Y:
            y = VALUE(x, alpha, PRECISE)
    if NEED_X:
        tl.store(dx_ptrs, dx.to(dx_ptrs.dtype.element_ty), mask=mask)
    if NEED_Y:
        if DROP:
            y = tl.where(kept, y * scale, 0.0)
        tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)
    return dx, dup


@triton.jit
def fused_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, y_ptr, partial_ptr,
    rows, cols, col_tiles, tiles, parts, dy_stride, x_stride, dx_stride, gate, up, alpha, scale, last,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    NEED_X: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_Y: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx, y once more, and this program's share of the bias gradient: row `part` of a (parts, bias) buffer. dx has the
    halves where x has them, y is contiguous. Every program walks its tiles in order and owns its elements."""
    col_tile, part = tl.program_id(0) % col_tiles, tl.program_id(0) // col_tiles
    total = tl.zeros((ROWS, COLS), tl.float32)
    total_up = tl.zeros((ROWS, COLS), tl.float32)
    for number in range(part, tiles, parts):
        row, col, whole = _place(number, col_tile, rows, cols, ROWS, COLS)
        index = row * cols + col
        dy_ptrs = dy_ptr + (row * dy_stride + col)
        x_ptrs, bias_ptrs = x_ptr + (row * x_stride + gate + col), bias_ptr + (gate + col)
        dx_ptrs, y_ptrs = dx_ptr + (row * dx_stride + gate + col), y_ptr + index
        if whole:
            dx, dup = _fused_bwd(
                dy_ptrs, x_ptrs, bias_ptrs, dx_ptrs, y_ptrs, up, seed_ptr, index, alpha, scale, last, None, None,
                VALUE, GRADIENT, GATED, BIAS, DROP, NEED_X, NEED_Y,
            )  # fmt: skip
            if NEED_BIAS:
                total += dx
                if GATED:
                    total_up += dup
        else:
            mask = (row < rows) & (col < cols)
            dx, dup = _fused_bwd(
                dy_ptrs, x_ptrs, bias_ptrs, dx_ptrs, y_ptrs, up, seed_ptr, index, alpha, scale, last, mask, col < cols,
                VALUE, GRADIENT, GATED, BIAS, DROP, NEED_X, NEED_Y,
            )  # fmt: skip
            if NEED_BIAS:
                total += tl.where(mask, dx, 0.0)
                if GATED:
                    total_up += tl.where(mask, dup, 0.0)
    if NEED_BIAS:
        col = tl.cast(col_tile, tl.int64) * COLS + tl.arange(0, COLS)[None, :]
        width = cols * 2 if GATED else cols
        partial_ptrs = partial_ptr + (part.to(tl.int64) * width + gate + col)
        tl.store(partial_ptrs, tl.sum(total.to(tl.float64), 0, keep_dims=True), mask=col < cols)
        if GATED:
            tl.store(partial_ptrs + up, tl.sum(total_up.to(tl.float64), 0, keep_dims=True), mask=col < cols)


def _split(x: Tensor, activation: str) -> tuple[str, list[int], int, int]:
    """The activation's name in _lib, the output's shape, where the gate begins, and where up does, from there."""
    if activation not in GATED:
        return activation, list(x.shape), 0, 0
    name, gate_first = GATED[activation]
    half = x.shape[-1] // 2
    return name, [*x.shape[:-1], half], 0 if gate_first else half, half if gate_first else -half


def _rows(bias: Tensor | None, gated: bool, like: Tensor, *tensors: Tensor) -> tuple[int, int, list[Tensor], list[int]]:
    """Rows and columns of the output, the tensors (copied where they have no such view) and their row strides.

    The columns are the last dimension; without a bias and a gate everything is one row, where the strides allow it.
    """
    if bias is None and not gated and all(t.is_contiguous() for t in tensors):
        return 1, like.numel(), list(tensors), [0] * len(tensors)
    cols = like.shape[-1] if like.dim() else 1
    found = [_as_matrix(t) for t in tensors]
    return like.numel() // cols, cols, found, [t.stride(0) for t in found]


def _as_matrix(x: Tensor) -> Tensor:
    """x as (rows, columns) with adjacent columns, in place where its strides allow that."""
    width = x.shape[-1] if x.dim() else 1
    try:
        matrix = x.view(-1, width)
    except RuntimeError:
        return x.contiguous().view(-1, width)
    return matrix if matrix.stride(1) == 1 or width == 1 else matrix.contiguous()


def _tiles(rows: int, cols: int) -> tuple[int, int, dict[str, int]]:
    """Column tiles, row tiles, and the size of one, 1024 elements."""
    width = min(1024, triton.next_power_of_2(cols))
    height = min(1024 // width, triton.next_power_of_2(rows))
    return triton.cdiv(cols, width), triton.cdiv(rows, height), {"ROWS": height, "COLS": width}


def _dropout(p: float) -> tuple[float, int]:
    """The factor of what is kept, and the largest word that is dropped."""
    return 1.0 / (1.0 - p), max(round(p * 2.0**32) - 1, 0)


def fused_forward(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, alpha: float, p: float
) -> Tensor:
    name, shape, gate, up = _split(x, activation)
    y = x.new_empty(shape)
    if y.numel() == 0:
        return y
    rows, cols, (x,), (x_stride,) = _rows(bias, up != 0, y, x)
    col_tiles, row_tiles, constants = _tiles(rows, cols)
    value = _lib.tanh_value if name == "tanh" else _lib.ACTIVATIONS[name].value
    scale, last = _dropout(p)
    _lib.launch(
        fused_fwd_kernel, (col_tiles * row_tiles,), x,
        x, x if bias is None else bias.contiguous(), x if seed is None else seed, y,
        rows, cols, col_tiles, x_stride, gate, up, alpha, scale, last,
        VALUE=value, GATED=up != 0, BIAS=bias is not None, DROP=p > 0.0, **constants,
    )  # fmt: skip
    return y


def fused_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, alpha: float, p: float,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_bias, need_y = output_mask
    need_bias = need_bias and bias is not None
    name, shape, gate, up = _split(x, activation)
    dx = x.new_empty(x.shape if need_x else 0)
    dbias = x.new_empty(bias.shape if need_bias and bias is not None else 0)
    y = x.new_empty(shape if need_y else 0)
    if dy.numel() == 0:
        return dx, dbias.zero_(), y
    if not (need_x or need_bias or need_y):
        return dx, dbias, y
    rows, cols, (dy, x), (dy_stride, x_stride) = _rows(bias, up != 0, dy, dy, x)
    col_tiles, row_tiles, constants = _tiles(rows, cols)
    # PROGRAMS depends on no device, so that the sum is the same everywhere
    parts = max(1, min(row_tiles, PROGRAMS // col_tiles)) if need_bias else row_tiles
    partial = torch.empty((parts, dbias.numel()) if need_bias else (1, 1), dtype=torch.float64, device=x.device)
    value, gradient = (_lib.tanh_value, _lib.tanh_gradient) if name == "tanh" else _lib.ACTIVATIONS[name]
    scale, last = _dropout(p)
    _lib.launch(
        fused_bwd_kernel, (col_tiles * parts,), x,
        dy, x, x if bias is None else bias.contiguous(), x if seed is None else seed,
        dx if need_x else x, y if need_y else x, partial,
        rows, cols, col_tiles, row_tiles, parts, dy_stride, x_stride, 2 * cols if up else cols,
        gate, up, alpha, scale, last,
        VALUE=value, GRADIENT=gradient, GATED=up != 0, BIAS=bias is not None, DROP=p > 0.0,
        NEED_X=need_x, NEED_BIAS=need_bias, NEED_Y=need_y, **constants,
    )  # fmt: skip
    if need_bias:
        width = min(128, triton.next_power_of_2(dbias.numel()))
        _lib.launch(
            sum_parts_kernel, (triton.cdiv(dbias.numel(), width),), x, partial, dbias, parts, dbias.numel(),
            ROWS=1024 // width, COLS=width,
        )  # fmt: skip
    return dx, dbias, y
