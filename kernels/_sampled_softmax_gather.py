"""Losses of a row's own classes: one kernel gathers rows, takes their products and makes the gradients at once.

A program owns some rows of `input`, whole, in registers, and walks all of their classes together, four at a time: all
four gathers come before a store, so that they are in flight at once. What a gathered row adds to the gradient of
`input` is added while it is there; it is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib


@triton.jit
def softplus(x, PRECISE: tl.constexpr):
    """log(1 + exp(x)), with relative accuracy where exp(x) is small."""
    e = _lib.exp(-tl.abs(x), PRECISE)
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def gathered(weight_ptr, ids_ptr, row, k, live, count, classes, col, cols, weight_row, weight_col):
    """Class k of each row, in float32, and whether there is one: ids below 0 fill up the paths of a tree."""
    id = tl.load(ids_ptr + row * count + k, mask=live & (k < count), other=-1).to(tl.int64)
    exists = (id >= 0) & (id < classes)
    place = weight_ptr + id[:, None] * weight_row + col[None, :] * weight_col
    return tl.load(place, mask=exists[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32), exists


@triton.jit
def logistic_fwd_kernel(
    x_ptr, weight_ptr, ids_ptr, signs_ptr, loss_ptr, coefficient_ptr, unit_ptr,
    rows, cols, count, classes, x_row, x_col, weight_row, weight_col, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """loss = sum_k softplus(-s z_k), z_k = x . w_k; coefficient: its derivative by z_k; unit = sum_k coefficient w_k"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS).to(tl.int64)
    live = row < rows
    used = live[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :] * x_col, mask=used, other=0.0).to(tl.float32)
    loss = tl.zeros((ROWS,), tl.float32)
    unit = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, count, 4):
        found = ()
        signs = ()
        for u in tl.static_range(4):
            k = first + u
            found += (gathered(weight_ptr, ids_ptr, row, k, live, count, classes, col, cols, weight_row, weight_col),)
            if signs_ptr is not None:
                sign = tl.load(signs_ptr + row * count + k, mask=live & (k < count), other=1).to(tl.float32)
            else:
                sign = tl.where(k == 0, 1.0, -1.0) + tl.zeros((ROWS,), tl.float32)
            signs += (sign,)
        for u in tl.static_range(4):
            w, exists = found[u]
            z = tl.sum(x * w, 1) * signs[u]
            loss += tl.where(exists, softplus(-z, True), 0.0)
            if coefficient_ptr is not None:
                coefficient = tl.where(exists, -signs[u] * _lib.sigmoid(-z, True), 0.0)
                at = coefficient_ptr + row * count + (first + u)
                tl.store(at, coefficient, mask=live & (first + u < count))
                unit += coefficient[:, None] * w
    tl.store(loss_ptr + row, loss, mask=live)
    if coefficient_ptr is not None:
        tl.store(unit_ptr + row[:, None] * cols + col[None, :], unit, mask=used)


@triton.jit
def true_logits_kernel(
    x_ptr, weight_ptr, bias_ptr, labels_ptr, log_ptr, out_ptr,
    rows, cols, count, classes, x_row, x_col, weight_row, weight_col, bias_step, out_row,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[i, t] = x_i . w[labels_it] + bias[labels_it] - log_it"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS).to(tl.int64)
    live = row < rows
    used = live[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :] * x_col, mask=used, other=0.0).to(tl.float32)
    for t in range(0, count):
        w, exists = gathered(weight_ptr, labels_ptr, row, t, live, count, classes, col, cols, weight_row, weight_col)
        z = tl.sum(x * w, 1)
        if bias_ptr is not None:
            label = tl.load(labels_ptr + row * count + t, mask=live, other=0).to(tl.int64)
            z += tl.load(bias_ptr + label * bias_step, mask=exists, other=0.0).to(tl.float32)
        if log_ptr is not None:
            z -= tl.load(log_ptr + row * count + t, mask=live, other=0.0)
        tl.store(out_ptr + row * out_row + t, z, mask=live)


@triton.jit
def weighted_rows_kernel(
    weight_ptr, ids_ptr, factor_ptr, out_ptr, rows, cols, count, classes, weight_row, weight_col,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out_i += sum_t factor_it w[ids_it], float32"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS).to(tl.int64)
    live = row < rows
    used = live[:, None] & (col < cols)[None, :]
    out = out_ptr + row[:, None] * cols + col[None, :]
    total = tl.load(out, mask=used, other=0.0)
    for t in range(0, count):
        w, _ = gathered(weight_ptr, ids_ptr, row, t, live, count, classes, col, cols, weight_row, weight_col)
        total += tl.load(factor_ptr + row * count + t, mask=live, other=0.0)[:, None] * w
    tl.store(out, total, mask=used)


def tile(rows: int, cols: int) -> tuple[tuple[int], dict[str, int]]:
    """(grid, constants): eight elements of each row in a thread of four warps, one 128-bit access in half precision."""
    width = max(16, triton.next_power_of_2(cols))
    height = max(1, min(1024 // width, 64, triton.next_power_of_2(rows)))
    warps = min(16, max(1, width * height // 256))
    return (triton.cdiv(rows, height),), {"ROWS": height, "COLS": width, "num_warps": warps}


def logistic(
    input: Tensor, weight: Tensor, ids: Tensor, signs: Tensor | None, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = input.shape
    loss = torch.empty(rows, dtype=torch.float32, device=input.device)
    coefficient, unit = (
        torch.empty(shape, dtype=torch.float32, device=input.device)
        for shape in ((ids.shape, input.shape) if gradients else ((0,), (0,)))
    )
    if rows:
        grid, constants = tile(rows, cols)
        _lib.launch(
            logistic_fwd_kernel, grid, input, input, weight, ids.contiguous(),
            None if signs is None else signs.contiguous(), loss, coefficient if gradients else None, unit,
            rows, cols, ids.shape[1], weight.shape[0], *input.stride(), *weight.stride(), **constants,
        )  # fmt: skip
    return loss, coefficient, unit


def true_logits(
    input: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, true_log: Tensor | None, out: Tensor
) -> None:
    """out: (B, T), of any row stride."""
    rows, cols = input.shape
    if rows and labels.shape[1]:
        grid, constants = tile(rows, cols)
        _lib.launch(
            true_logits_kernel, grid, input, input, weight, bias, labels, true_log, out, rows, cols, labels.shape[1],
            weight.shape[0], *input.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), out.stride(0),
            **constants,
        )  # fmt: skip


def add_weighted_rows(out: Tensor, weight: Tensor, ids: Tensor, factor: Tensor) -> None:
    rows, cols = out.shape
    if rows and ids.shape[1]:
        grid, constants = tile(rows, cols)
        _lib.launch(
            weighted_rows_kernel, grid, out, weight, ids, factor, out, rows, cols, ids.shape[1], weight.shape[0],
            *weight.stride(), **constants,
        )  # fmt: skip
