"""Bias, activation and dropout on csrc/cuda: layouts and outputs; see activation.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._extension import DTYPE_CODES, Extension

#: gated unit -> its gate's activation, and whether the gate is the first half
GATED = {
    "glu": ("sigmoid", False),
    "reglu": ("relu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "swiglu": ("silu", True),
    "bilinear": ("identity", True),
}


def _split(x: Tensor, activation: str) -> tuple[str, bool, list[int], int, int]:
    """The activation's name in csrc, whether it is a gate's, the output's shape, and where gate and up begin."""
    if activation not in GATED:
        return activation, False, list(x.shape), 0, 0
    name, gate_first = GATED[activation]
    half = x.shape[-1] // 2
    return name, True, [*x.shape[:-1], half], 0 if gate_first else half, half if gate_first else 0


def _rows(
    bias: Tensor | None, gated: bool, output: Sequence[int], *tensors: Tensor
) -> tuple[int, int, list[Tensor], list[int]]:
    """Rows and columns of the output, the tensors (copied where they have no such view) and their row strides.

    The columns are the last dimension; without a bias and a gate everything is one row, where the strides allow it.
    """
    size = torch.Size(output)
    if bias is None and not gated and all(t.is_contiguous() for t in tensors):
        return 1, size.numel(), list(tensors), [0] * len(tensors)
    cols = size[-1] if size else 1
    found = [_as_matrix(t) for t in tensors]
    return size.numel() // cols, cols, found, [t.stride(0) for t in found]


def _as_matrix(x: Tensor) -> Tensor:
    """x as (rows, columns) with adjacent columns, in place where its strides allow that."""
    width = x.shape[-1] if x.dim() else 1
    try:
        matrix = x.view(-1, width)
    except RuntimeError:
        return x.contiguous().view(-1, width)
    return matrix if matrix.stride(1) == 1 or width == 1 else matrix.contiguous()


def fused_forward(
    ext: Extension, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, alpha: float, p: float
) -> Tensor:
    name, gated, shape, gate, up = _split(x, activation)
    y = x.new_empty(shape)
    if y.numel():
        rows, cols, (x,), (stride,) = _rows(bias, gated, shape, x)
        ext.call(
            "fused_forward", x, None if bias is None else bias.contiguous(), seed, y, rows, cols, stride,
            gated, gate, up, name, alpha, 1.0 / (1.0 - p), round(p * 2.0**32), y.dtype,
        )  # fmt: skip
    return y


def fused_backward(
    ext: Extension, dy: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, alpha: float,
    p: float, output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_bias, need_y = output_mask
    name, gated, shape, gate, up = _split(x, activation)
    dx = x.new_empty(x.shape if need_x else 0)
    dbias = x.new_empty(bias.shape if need_bias and bias is not None else 0)
    y = x.new_empty(shape if need_y else 0)
    if dy.numel() == 0:
        return dx, dbias.zero_(), y
    if not (need_x or dbias.numel() or need_y):
        return dx, dbias, y
    rows, cols, (dy, x), (dy_stride, x_stride) = _rows(bias, gated, shape, dy, x)
    partial = None
    if dbias.numel():
        assert ext.module is not None
        parts = ext.module.fused_parts(rows, cols, DTYPE_CODES[x.dtype])
        partial = torch.empty((parts, dbias.numel()), dtype=torch.float64, device=x.device)
    ext.call(
        "fused_backward", dy, x, None if bias is None else bias.contiguous(), seed,
        dx if need_x else None, dbias if dbias.numel() else None, y if need_y else None, partial,
        rows, cols, dy_stride, x_stride, 2 * cols if gated else cols, gated, gate, up,
        name, alpha, 1.0 / (1.0 - p), round(p * 2.0**32), x.dtype,
    )  # fmt: skip
    return dx, dbias, y
