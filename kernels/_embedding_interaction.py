"""DLRM's pairwise interaction: concatenation, products of all pairs, lower triangle, in one kernel each way.

A sample's features are the rows of x: the dense ones first, then the sparse ones, read from where they are. Neither the
concatenation nor a square of products is ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib


@triton.jit
def features_at(dense, sparse, row, col, rows, cols):
    """Features `row` (R, 1) of a sample in columns `col` (1, C); dense and sparse: pointer to the sample, strides."""
    dense_ptr, dense_col = dense
    sparse_ptr, sparse_row, sparse_col = sparse
    used = col < cols
    first = tl.load(dense_ptr + col * dense_col + row * 0, mask=(row == 0) & used, other=0.0)
    others = tl.load(
        sparse_ptr + (row - 1) * sparse_row + col * sparse_col, mask=(row > 0) & (row < rows) & used, other=0.0
    )
    return tl.where(row == 0, first, others)


@triton.jit
def pair_at(i, j, SELF: tl.constexpr):
    """Where the product of features i and j < i (with SELF: j <= i) is among the products."""
    return (i * (i + 1) // 2 if SELF else i * (i - 1) // 2) + j


@triton.jit
def interaction_fwd_kernel(
    dense_ptr, sparse_ptr, out_ptr, rows, cols, width, dense_b, dense_d, sparse_b, sparse_f, sparse_d,
    SELF: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A sample's products of ROWS features with those up to them; of the first tile also the dense features."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dense = dense_ptr + sample * dense_b, dense_d
    sparse = sparse_ptr + sample * sparse_b, sparse_f, sparse_d
    out = out_ptr + sample * width
    i = tile * ROWS + tl.arange(0, ROWS)
    for other in range(0, tile + 1):
        j = other * ROWS + tl.arange(0, ROWS)
        products = tl.zeros((ROWS, ROWS), tl.float32)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            x = features_at(dense, sparse, i[:, None], col[None, :], rows, cols)
            y = features_at(dense, sparse, j[:, None], col[None, :], rows, cols)
            products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)
        wanted = (i < rows)[:, None] & (j[None, :] <= i[:, None] if SELF else j[None, :] < i[:, None])
        place = cols + pair_at(i[:, None], j[None, :], SELF)
        tl.store(out + place, products.to(out_ptr.dtype.element_ty), mask=wanted)
    if tile == 0:
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            tl.store(out + col, tl.load(dense[0] + col * dense_d, mask=col < cols, other=0.0), mask=col < cols)


@triton.jit
def interaction_bwd_kernel(
    dy_ptr, dense_ptr, sparse_ptr, ddense_ptr, dsparse_ptr, rows, cols, tiles,
    dy_b, dy_c, dense_b, dense_d, sparse_b, sparse_f, sparse_d,
    SELF: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = (G + G^T) x for ROWS features and COLS columns of a sample; G: the triangle of dy's products."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dense = dense_ptr + sample * dense_b, dense_d
    sparse = sparse_ptr + sample * sparse_b, sparse_f, sparse_d
    dy = dy_ptr + sample * dy_b
    i = ((part % tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    col = ((part // tiles) * COLS + tl.arange(0, COLS))[None, :]
    dx = tl.zeros((ROWS, COLS), tl.float32)
    for other in range(0, tiles):
        j = other * ROWS + tl.arange(0, ROWS)
        above, below = tl.maximum(i, j[None, :]), tl.minimum(i, j[None, :])
        exists = above < rows
        if not SELF:
            exists = exists & (above != below)
        g = tl.load(dy + (cols + pair_at(above, below, SELF)) * dy_c, mask=exists, other=0.0)
        if SELF:  # a feature with itself counts from both sides
            g = tl.where(above == below, g * 2.0, g).to(dy_ptr.dtype.element_ty)
        x = features_at(dense, sparse, j[:, None], col, rows, cols)
        dx = tl.dot(g, x, dx, input_precision=PRECISION)
    used = col < cols
    if ddense_ptr is not None:
        only = (i == 0) & used
        direct = tl.load(dy + col * dy_c + i * 0, mask=only, other=0.0).to(tl.float32)
        tl.store(ddense_ptr + sample * cols + col + i * 0, (dx + direct).to(ddense_ptr.dtype.element_ty), mask=only)
    if dsparse_ptr is not None:
        to = dsparse_ptr + (sample * (rows - 1) + i - 1) * cols + col
        tl.store(to, dx.to(dsparse_ptr.dtype.element_ty), mask=(i > 0) & (i < rows) & used)


def _options(x: Tensor, rows: int, cols: int, self_interaction: bool) -> dict[str, Any]:
    """float32 products are float32's own unless torch allows tf32: these kernels wait for memory, not for them."""
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "SELF": self_interaction,
        "PRECISION": "ieee" if exact else "tf32",
        "ROWS": min(64, max(16, triton.next_power_of_2(rows))),
        "COLS": min(32 if x.dtype == torch.float32 else 64, max(16, triton.next_power_of_2(cols))),
        "num_stages": 1,  # two turns at most for usual widths: room for more blocks is worth more than a pipeline
    }


def dot_interaction_forward(dense: Tensor, sparse: Tensor, self_interaction: bool) -> Tensor:
    (batch, cols), rows = dense.shape, sparse.shape[1] + 1
    width = cols + (rows * (rows + 1) // 2 if self_interaction else rows * (rows - 1) // 2)
    out = dense.new_empty((batch, width))
    if out.numel():
        options = _options(dense, rows, cols, self_interaction)
        _lib.launch(
            interaction_fwd_kernel, (batch, triton.cdiv(rows, options["ROWS"])), dense, dense, sparse, out, rows, cols,
            width, *dense.stride(), *sparse.stride(), **options,
        )  # fmt: skip
    return out


def dot_interaction_backward(
    dy: Tensor, dense: Tensor, sparse: Tensor, self_interaction: bool, output_mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    (batch, cols), rows = dense.shape, sparse.shape[1] + 1
    ddense = dense.new_empty(dense.shape if output_mask[0] else (0,))
    dsparse = sparse.new_empty(sparse.shape if output_mask[1] else (0,))
    if dense.numel() and any(output_mask):
        options = _options(dense, rows, cols, self_interaction)
        tiles = triton.cdiv(rows, options["ROWS"])
        _lib.launch(
            interaction_bwd_kernel, (batch, tiles * triton.cdiv(cols, options["COLS"])), dense, dy, dense, sparse,
            ddense if output_mask[0] else None, dsparse if output_mask[1] else None, rows, cols, tiles, *dy.stride(),
            *dense.stride(), *sparse.stride(), **options,
        )  # fmt: skip
    return ddense, dsparse
