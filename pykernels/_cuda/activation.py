"""Activations on csrc/cuda: tensors to pointers, outputs, layouts. `ext`: the CUDA module, or its emulation on the CPU.

Dense tensors of any one memory format and rows with unit inner stride are read and written in place, at any alignment;
what fits neither is copied first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _layout
from ._extension import DTYPE_CODES, Extension
from ._fused import fused_backward, fused_forward

__all__ = [
    "fused_backward", "fused_forward", "gated_backward", "gated_forward", "glu_backward", "glu_forward",
    "parametric_backward", "parametric_forward", "rrelu_backward", "rrelu_forward", "unary_", "unary_backward",
    "unary_forward", "unsupported",
]  # fmt: skip


def unsupported(ext: Extension, x: Tensor) -> str | None:
    """Why `ext` cannot serve tensors of the dtype and device of x, or None."""
    if not ext.available:
        return ext.reason
    if x.dtype not in DTYPE_CODES:
        return f"the CUDA kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    device = "cpu" if ext.name == "_emulator_ext" else "cuda"
    if x.device.type != device:
        return f"{ext.name} serves {device} tensors, not {x.device.type} ones"
    return ext.device_reason(x.device)


def unary_forward(ext: Extension, x: Tensor, activation: str, alpha: float) -> Tensor:
    y = torch.empty_like(x)
    _unary_forward_into(ext, y, x, activation, alpha)
    return y


def unary_(ext: Extension, x: Tensor, activation: str, alpha: float) -> None:
    _unary_forward_into(ext, x, x, activation, alpha)


def _unary_forward_into(ext: Extension, y: Tensor, x: Tensor, activation: str, alpha: float) -> None:
    if x.numel() == 0:
        return
    view, (out,), (x,) = _layout.fit_rows([y], [x])
    y_stride, x_stride = view.strides
    ext.call("unary_forward", x, out, view.rows, view.cols, x_stride, y_stride, activation, alpha, x.dtype)
    if out is not y:
        y.copy_(out)


def unary_backward(ext: Extension, dy: Tensor, saved: Tensor, activation: str, alpha: float) -> Tensor:
    dx = torch.empty_like(saved)
    if dx.numel():
        view, _, (dy, saved) = _layout.fit_rows([dx], [dy, saved])
        dx_stride, dy_stride, saved_stride = view.strides
        ext.call(
            "unary_backward", dy, saved, dx, view.rows, view.cols, dy_stride, saved_stride, dx_stride,
            activation, alpha, dx.dtype,
        )  # fmt: skip
    return dx


def gated_forward(ext: Extension, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty_like(gate)
    _gated_forward_into(ext, y, gate, up, activation)
    return y


def _gated_forward_into(ext: Extension, y: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    if y.numel() == 0:
        return
    view, _, (gate, up) = _layout.fit_rows([y], [gate, up])
    y_stride, gate_stride, up_stride = view.strides
    ext.call(
        "gated_forward", gate, up, y, view.rows, view.cols, gate_stride, up_stride, y_stride, activation, y.dtype
    )  # fmt: skip


def gated_backward(
    ext: Extension, dy: Tensor, gate: Tensor, up: Tensor, activation: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate) if output_mask[0] else gate.new_empty(0)
    dup = torch.empty_like(up) if output_mask[1] else up.new_empty(0)
    if gate.numel() and any(output_mask):
        wanted = (dgate if output_mask[0] else None), (dup if output_mask[1] else None)
        _gated_backward_into(ext, *wanted, dy, gate, up, activation)
    return dgate, dup


def _gated_backward_into(
    ext: Extension, dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor, activation: str
) -> None:
    wanted = [t for t in (dgate, dup) if t is not None]
    view, outputs, (dy, gate, up) = _layout.fit_rows(wanted, [dy, gate, up])
    ext.call(
        "gated_backward", dy, gate, up,
        outputs[0] if dgate is not None else None, outputs[-1] if dup is not None else None,
        view.rows, view.cols, *view.strides[len(wanted):], view.strides[0], view.strides[len(wanted) - 1],
        activation, dy.dtype,
    )  # fmt: skip
    for tensor, out in zip(wanted, outputs, strict=True):
        if out is not tensor:
            tensor.copy_(out)


def _halves(fused: Tensor, dim: int, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of the tensor that holds both."""
    first, second = fused.chunk(2, dim)
    return (first, second) if gate_first else (second, first)


def glu_forward(ext: Extension, input: Tensor, dim: int, activation: str, gate_first: bool) -> Tensor:
    gate, up = _halves(input, dim, gate_first)
    y = input.new_empty(gate.shape)
    _gated_forward_into(ext, y, gate, up, activation)
    return y


def glu_backward(ext: Extension, dy: Tensor, input: Tensor, dim: int, activation: str, gate_first: bool) -> Tensor:
    dx = input.new_empty(input.shape)
    if dx.numel():
        _gated_backward_into(ext, *_halves(dx, dim, gate_first), dy, *_halves(input, dim, gate_first), activation)
    return dx


def rrelu_forward(ext: Extension, x: Tensor, lower: float, upper: float, seed: Tensor) -> Tensor:
    return rrelu_backward(ext, x, x, lower, upper, seed)


def rrelu_backward(ext: Extension, dy: Tensor, x: Tensor, lower: float, upper: float, seed: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    if dx.numel():
        view, _, (dy, x) = _layout.fit_rows([dx], [dy, x])
        dx_stride, dy_stride, x_stride = view.strides
        ext.call(
            "rrelu", dy, x, dx, seed, view.rows, view.cols, dy_stride, x_stride, dx_stride,
            lower, upper - lower, dx.dtype,
        )  # fmt: skip
    return dx


def _by_channel(
    output: Tensor, inputs: Sequence[Tensor], channels: int
) -> tuple[tuple[int, int, int], list[Tensor], list[int]]:
    """((outer, channels, inner), the inputs, copied where they have no such view, and an outer and a channel stride for
    the output and each input). The output is contiguous."""
    if channels == 1:
        view, _, tensors = _layout.fit_rows([output], inputs)
        return (view.rows, 1, view.cols), tensors, [s for stride in view.strides for s in (stride, 0)]
    inner = output.shape[2:].numel()
    tensors = [t if _layout.channel_strides(t, inner) else t.contiguous() for t in inputs]
    found = [_layout.channel_strides(t, inner) for t in (output, *tensors)]
    return (output.shape[0], channels, inner), tensors, [s for pair in found if pair for s in pair]


def parametric_forward(ext: Extension, x: Tensor, weight: Tensor, activation: str) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        sizes, (x,), (y_outer, y_channel, x_outer, x_channel) = _by_channel(y, [x], weight.numel())
        ext.call(
            "parametric_forward", x, weight.contiguous(), y, *sizes, x_outer, x_channel, y_outer, y_channel,
            activation, y.dtype,
        )  # fmt: skip
    return y


def parametric_backward(
    ext: Extension, dy: Tensor, x: Tensor, weight: Tensor, activation: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    need_x, need_weight = output_mask
    dx = x.new_empty(x.shape) if need_x else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    if x.numel() == 0:
        return dx, dweight.zero_()
    if not (need_x or need_weight):
        return dx, dweight
    if not need_x:
        x = x.contiguous()  # nothing is written in the layout of dx, but one layout must lead
    sizes, (dy, x), strides = _by_channel(dx if need_x else x, [dy, x], weight.numel())
    partial = None
    if need_weight:
        assert ext.module is not None
        parts = ext.module.parametric_parts(*sizes, DTYPE_CODES[x.dtype])
        partial = torch.empty((parts, sizes[1]), dtype=torch.float64, device=x.device)
    ext.call(
        "parametric_backward", dy, x, weight.contiguous(), dx if need_x else None,
        dweight if need_weight else None, partial, *sizes, *strides[2:], *strides[:2], activation, x.dtype,
    )  # fmt: skip
    return dx, dweight
