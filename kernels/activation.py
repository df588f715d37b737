"""Activations on Triton: one unary kernel and one gated kernel each way; the functors come as constants.

Every kernel moves its bytes once, in 128-bit accesses for any length, with int64 offsets and float32 arithmetic.
Tensors that are dense in any one memory format, or rows with unit inner stride (the halves of a fused projection), are
read and written in place; what fits neither is copied first. Activations with a learnt parameter are in
_parametric.py, fusion with bias and dropout in _fused.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from ._fused import fused_backward, fused_forward
from ._parametric import parametric_backward, parametric_forward

__all__ = [
    "fused_backward", "fused_forward", "gated_backward", "gated_forward", "glu_backward", "glu_forward",
    "parametric_backward", "parametric_forward", "rrelu_backward", "rrelu_forward", "unary_", "unary_backward",
    "unary_forward", "unsupported",
]  # fmt: skip

#: What a unary backward is given: the output for these, the input for all others.
_GRADIENT_OF_OUTPUT = {
    "sigmoid": _lib.sigmoid_gradient_of_output,
    "tanh": _lib.tanh_gradient_of_output,
    "relu": _lib.relu_gradient,
}


def unsupported(x: Tensor) -> str | None:
    """Why this backend cannot serve tensors of the dtype and device of x, or None."""
    return _lib.unsupported_tensor(x)


@triton.jit
def _unary_fwd(x_ptrs, y_ptrs, mask, alpha, VALUE: tl.constexpr):
    PRECISE: tl.constexpr = x_ptrs.dtype.element_ty == tl.float32
    x = tl.load(x_ptrs, mask=mask).to(tl.float32)
    tl.store(y_ptrs, VALUE(x, alpha, PRECISE).to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def unary_fwd_kernel(
    x_ptr, y_ptr, rows, cols, x_stride, y_stride, alpha,
    VALUE: tl.constexpr, FLAT: tl.constexpr, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, whole = _lib.tile(rows, cols, FLAT, ROW_AXIS, ROWS, COLS)
    x_ptrs = x_ptr + (row * x_stride + col)
    y_ptrs = y_ptr + (row * y_stride + col)
    if whole:
        _unary_fwd(x_ptrs, y_ptrs, None, alpha, VALUE)
    else:
        _unary_fwd(x_ptrs, y_ptrs, _lib.tile_mask(row, col, rows, cols, FLAT), alpha, VALUE)


@triton.jit
def _unary_bwd(dy_ptrs, saved_ptrs, dx_ptrs, mask, alpha, GRADIENT: tl.constexpr):
    PRECISE: tl.constexpr = saved_ptrs.dtype.element_ty == tl.float32
    dy = tl.load(dy_ptrs, mask=mask).to(tl.float32)
    saved = tl.load(saved_ptrs, mask=mask).to(tl.float32)
    tl.store(dx_ptrs, GRADIENT(dy, saved, alpha, PRECISE).to(dx_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def unary_bwd_kernel(
    dy_ptr, saved_ptr, dx_ptr, rows, cols, dy_stride, saved_stride, dx_stride, alpha,
    GRADIENT: tl.constexpr, FLAT: tl.constexpr, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, whole = _lib.tile(rows, cols, FLAT, ROW_AXIS, ROWS, COLS)
    dy_ptrs = dy_ptr + (row * dy_stride + col)
    saved_ptrs = saved_ptr + (row * saved_stride + col)
    dx_ptrs = dx_ptr + (row * dx_stride + col)
    if whole:
        _unary_bwd(dy_ptrs, saved_ptrs, dx_ptrs, None, alpha, GRADIENT)
    else:
        mask = _lib.tile_mask(row, col, rows, cols, FLAT)
        _unary_bwd(dy_ptrs, saved_ptrs, dx_ptrs, mask, alpha, GRADIENT)


@triton.jit
def _gated_fwd(gate_ptrs, up_ptrs, y_ptrs, mask, VALUE: tl.constexpr):
    PRECISE: tl.constexpr = gate_ptrs.dtype.element_ty == tl.float32
    gate = tl.load(gate_ptrs, mask=mask).to(tl.float32)
    up = tl.load(up_ptrs, mask=mask).to(tl.float32)
    tl.store(y_ptrs, (VALUE(gate, 1.0, PRECISE) * up).to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def gated_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, rows, cols, gate_stride, up_stride, y_stride,
    VALUE: tl.constexpr, FLAT: tl.constexpr, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, whole = _lib.tile(rows, cols, FLAT, ROW_AXIS, ROWS, COLS)
    gate_ptrs = gate_ptr + (row * gate_stride + col)
    up_ptrs = up_ptr + (row * up_stride + col)
    y_ptrs = y_ptr + (row * y_stride + col)
    if whole:
        _gated_fwd(gate_ptrs, up_ptrs, y_ptrs, None, VALUE)
    else:
        _gated_fwd(gate_ptrs, up_ptrs, y_ptrs, _lib.tile_mask(row, col, rows, cols, FLAT), VALUE)


@triton.jit
def _gated_bwd(
    dy_ptrs, gate_ptrs, up_ptrs, dgate_ptrs, dup_ptrs, mask,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = gate_ptrs.dtype.element_ty == tl.float32
    dy = tl.load(dy_ptrs, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptrs, mask=mask).to(tl.float32)
    if NEED_GATE:
        up = tl.load(up_ptrs, mask=mask).to(tl.float32)
        dgate = GRADIENT(dy * up, gate, 1.0, PRECISE)
        tl.store(dgate_ptrs, dgate.to(dgate_ptrs.dtype.element_ty), mask=mask)
    if NEED_UP:
        dup = dy * VALUE(gate, 1.0, PRECISE)
        tl.store(dup_ptrs, dup.to(dup_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def gated_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    rows, cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr,
    FLAT: tl.constexpr, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, whole = _lib.tile(rows, cols, FLAT, ROW_AXIS, ROWS, COLS)
    dy_ptrs = dy_ptr + (row * dy_stride + col)
    gate_ptrs = gate_ptr + (row * gate_stride + col)
    up_ptrs = up_ptr + (row * up_stride + col)
    dgate_ptrs = dgate_ptr + (row * dgate_stride + col)
    dup_ptrs = dup_ptr + (row * dup_stride + col)
    if whole:
        _gated_bwd(dy_ptrs, gate_ptrs, up_ptrs, dgate_ptrs, dup_ptrs, None, VALUE, GRADIENT, NEED_GATE, NEED_UP)
    else:
        mask = _lib.tile_mask(row, col, rows, cols, FLAT)
        _gated_bwd(dy_ptrs, gate_ptrs, up_ptrs, dgate_ptrs, dup_ptrs, mask, VALUE, GRADIENT, NEED_GATE, NEED_UP)


@triton.jit
def _rrelu(dy_ptrs, x_ptrs, out_ptrs, mask, lower, span, seed, index):
    x = tl.load(x_ptrs, mask=mask).to(tl.float32)
    dy = tl.load(dy_ptrs, mask=mask).to(tl.float32)
    slope = lower + span * _lib.philox_uniform(seed, index)
    tl.store(out_ptrs, tl.where(x <= 0.0, slope * dy, dy).to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def rrelu_kernel(
    dy_ptr, x_ptr, out_ptr, seed_ptr, rows, cols, dy_stride, x_stride, out_stride, lower, span,
    FLAT: tl.constexpr, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx of rrelu; with dy = x it is the forward, slope * x below 0 and x above. The output is contiguous."""
    row, col, whole = _lib.tile(rows, cols, FLAT, ROW_AXIS, ROWS, COLS)
    dy_ptrs = dy_ptr + (row * dy_stride + col)
    x_ptrs = x_ptr + (row * x_stride + col)
    index = row * out_stride + col
    seed = tl.load(seed_ptr)
    if whole:
        _rrelu(dy_ptrs, x_ptrs, out_ptr + index, None, lower, span, seed, index)
    else:
        mask = _lib.tile_mask(row, col, rows, cols, FLAT)
        _rrelu(dy_ptrs, x_ptrs, out_ptr + index, mask, lower, span, seed, index)


def unary_forward(x: Tensor, activation: str, alpha: float) -> Tensor:
    y = torch.empty_like(x)
    _unary_forward_into(y, x, activation, alpha)
    return y


def unary_(x: Tensor, activation: str, alpha: float) -> None:
    _unary_forward_into(x, x, activation, alpha)


def _unary_forward_into(y: Tensor, x: Tensor, activation: str, alpha: float) -> None:
    if x.numel() == 0:
        return
    value = _lib.tanh_value if activation == "tanh" else _lib.ACTIVATIONS[activation].value
    view, (out,), (x,) = _lib.fit_rows([y], [x])
    tiles = _lib.tile_rows(view.rows, view.cols)
    y_stride, x_stride = view.strides
    _lib.launch(
        unary_fwd_kernel, tiles.programs, x, x, out, view.rows, view.cols, x_stride, y_stride, alpha,
        VALUE=value, **tiles.constants,
    )  # fmt: skip
    if out is not y:
        y.copy_(out)


def unary_backward(dy: Tensor, saved: Tensor, activation: str, alpha: float) -> Tensor:
    dx = torch.empty_like(saved)
    if dx.numel() == 0:
        return dx
    gradient = _GRADIENT_OF_OUTPUT.get(activation) or _lib.ACTIVATIONS[activation].gradient
    view, _, (dy, saved) = _lib.fit_rows([dx], [dy, saved])
    tiles = _lib.tile_rows(view.rows, view.cols)
    dx_stride, dy_stride, saved_stride = view.strides
    _lib.launch(
        unary_bwd_kernel, tiles.programs, dx,
        dy, saved, dx, view.rows, view.cols, dy_stride, saved_stride, dx_stride, alpha,
        GRADIENT=gradient, **tiles.constants,
    )  # fmt: skip
    return dx


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty_like(gate)
    _gated_forward_into(y, gate, up, activation)
    return y


def _gated_forward_into(y: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    if y.numel() == 0:
        return
    view, _, (gate, up) = _lib.fit_rows([y], [gate, up])
    tiles = _lib.tile_rows(view.rows, view.cols)
    y_stride, gate_stride, up_stride = view.strides
    _lib.launch(
        gated_fwd_kernel, tiles.programs, y, gate, up, y, view.rows, view.cols, gate_stride, up_stride, y_stride,
        VALUE=_lib.ACTIVATIONS[activation].value, **tiles.constants,
    )  # fmt: skip


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, output_mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate) if output_mask[0] else gate.new_empty(0)
    dup = torch.empty_like(up) if output_mask[1] else up.new_empty(0)
    if gate.numel() and any(output_mask):
        wanted = (dgate if output_mask[0] else None), (dup if output_mask[1] else None)
        _gated_backward_into(*wanted, dy, gate, up, activation)
    return dgate, dup


def _gated_backward_into(
    dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor, activation: str
) -> None:
    wanted = [t for t in (dgate, dup) if t is not None]
    view, outputs, (dy, gate, up) = _lib.fit_rows(wanted, [dy, gate, up])
    tiles = _lib.tile_rows(view.rows, view.cols)
    # an output that is not wanted is never stored to: any pointer and stride will do
    dgate_out, dgate_stride = outputs[0], view.strides[0]
    dup_out, dup_stride = outputs[-1], view.strides[len(wanted) - 1]
    functions = _lib.ACTIVATIONS[activation]
    _lib.launch(
        gated_bwd_kernel, tiles.programs, dy, dy, gate, up, dgate_out, dup_out,
        view.rows, view.cols, *view.strides[len(wanted):], dgate_stride, dup_stride,
        VALUE=functions.value, GRADIENT=functions.gradient, NEED_GATE=dgate is not None, NEED_UP=dup is not None,
        **tiles.constants,
    )  # fmt: skip
    for tensor, out in zip(wanted, outputs, strict=True):
        if out is not tensor:
            tensor.copy_(out)


def _halves(fused: Tensor, dim: int, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of the tensor that holds both."""
    first, second = fused.chunk(2, dim)
    return (first, second) if gate_first else (second, first)


def glu_forward(input: Tensor, dim: int, activation: str, gate_first: bool) -> Tensor:
    gate, up = _halves(input, dim, gate_first)
    y = input.new_empty(gate.shape)
    _gated_forward_into(y, gate, up, activation)
    return y


def glu_backward(dy: Tensor, input: Tensor, dim: int, activation: str, gate_first: bool) -> Tensor:
    dx = input.new_empty(input.shape)
    if dx.numel():
        _gated_backward_into(*_halves(dx, dim, gate_first), dy, *_halves(input, dim, gate_first), activation)
    return dx


def rrelu_forward(x: Tensor, lower: float, upper: float, seed: Tensor) -> Tensor:
    return rrelu_backward(x, x, lower, upper, seed)


def rrelu_backward(dy: Tensor, x: Tensor, lower: float, upper: float, seed: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx
    view, _, (dy, x) = _lib.fit_rows([dx], [dy, x])
    tiles = _lib.tile_rows(view.rows, view.cols)
    dx_stride, dy_stride, x_stride = view.strides
    _lib.launch(
        rrelu_kernel, tiles.programs, dx, dy, x, dx, seed, view.rows, view.cols, dy_stride, x_stride, dx_stride,
        lower, upper - lower, **tiles.constants,
        enable_fp_fusion=False,  # the slope is rounded twice on every backend: same bits
    )  # fmt: skip
    return dx
