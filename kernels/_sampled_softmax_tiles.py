"""Losses over classes that all rows share: a sample of them, or all. Logits exist a tile at a time.

Forward: `logits_fwd_kernel` has one program for some rows and one part of the classes, with an online log-sum-exp;
`_join` puts the parts together. Backward, by recompute: `logits_bwd_kernel` makes the gradient of the logits of a chunk
of the classes, `product_kernel` multiplies it by the rows of the classes (gathered where they are a sample) and by
`input`. The chunk is bounded by memory, not by the number of classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sampled import Shared
from . import _lib
from ._sampled_softmax_gather import softplus

CHUNK = 64 << 20  #: bytes that the gradient of a chunk's logits may take
PLANES = tl.constexpr(4)  #: what a part of the classes tells: m, sum of exp(z - m), z of the target, smoothing


def _arguments(shared: Shared) -> tuple[Any, ...]:
    """What all kernels over shared classes are told."""
    x, w = shared.input, shared.weight
    return (
        x, w, shared.bias, shared.ids, shared.log, shared.labels, shared.factors, x.shape[0], shared.count, x.shape[1],
        w.shape[0], *x.stride(), *w.stride(), shared.bias_step, shared.hits,
    )  # fmt: skip


def precision(x: Tensor) -> str:
    """How float32 products are made: to float32's rounding, unless torch allows tf32.

    For capability 100 Triton 3.7 makes a trap of six bfloat16 products. Products of float16 are made as tf32, which has
    float16's digits and float32's range: the gradient of a mean over many rows is below what float16 holds.
    """
    if x.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    capability = _lib.device_properties(x.device).capability
    return "ieee" if 100 <= capability < 120 or torch.version.hip is not None else "bf16x6"


@triton.jit
def logits_tile(
    i, j, x_ptr, weight_ptr, bias_ptr, ids_ptr, log_ptr, labels_ptr, rows, count, cols, classes,
    x_row, x_col, weight_row, weight_col, bias_step, hits,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Logits of rows i (ROWS, 1) and classes j (1, CLASSES); -inf where there is none."""
    exists = j < count
    id = j
    if ids_ptr is not None:
        id = tl.load(ids_ptr + j, mask=exists, other=-1).to(tl.int64)
        exists = exists & (id >= 0) & (id < classes)
    z = tl.zeros((ROWS, CLASSES), tl.float32)
    x = x_ptr + i * x_row
    w = weight_ptr + id * weight_row
    for d in range(0, cols, COLS):
        col = d + tl.arange(0, COLS).to(tl.int64)
        here = col < cols
        x_tile = tl.load(x + col[None, :] * x_col, mask=(i < rows) & here[None, :], other=0.0)
        w_tile = tl.load(w + col[:, None] * weight_col, mask=exists & here[:, None], other=0.0)
        z = tl.dot(x_tile, w_tile, z, input_precision=PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + id * bias_step, mask=exists, other=0.0).to(tl.float32)
    if log_ptr is not None:
        z -= tl.load(log_ptr + j, mask=exists, other=0.0)
    if ids_ptr is not None:
        for t in range(0, hits):  # every copy of a class that is a label of the row
            label = tl.load(labels_ptr + i * hits + t, mask=i < rows, other=-1).to(tl.int64)
            z = tl.where(label == id, -float("inf"), z)
    return tl.where(exists, z, -float("inf"))


@triton.jit
def logits_fwd_kernel(
    partial_ptr, part_length, x_ptr, weight_ptr, bias_ptr, ids_ptr, log_ptr, labels_ptr, factors_ptr,
    rows, count, cols, classes, x_row, x_col, weight_row, weight_col, bias_step, hits,
    KIND: tl.constexpr, PRECISION: tl.constexpr, SMOOTH: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partial: (parts, PLANES, rows). "logistic": the first plane is the sum of softplus(z), and the only one.

    The smoothing term sum_j c_j (z_j - m) is kept relative to m, so that it does not round as large logits do.
    """
    PRECISE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    part = tl.program_id(1).to(tl.int64)
    begin = part * part_length
    end = tl.minimum(begin + part_length, count)
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS,), tl.float32)
    smooth = tl.zeros((ROWS,), tl.float32)
    weights = 0.0
    if ids_ptr is None:
        target = tl.load(labels_ptr + i, mask=i < rows, other=-1).to(tl.int64)
    for first in range(begin, end, CLASSES):
        j = (first + tl.arange(0, CLASSES))[None, :]
        z = logits_tile(
            i, j, x_ptr, weight_ptr, bias_ptr, ids_ptr, log_ptr, labels_ptr, rows, end, cols, classes,
            x_row, x_col, weight_row, weight_col, bias_step, hits, PRECISION, ROWS, CLASSES, COLS,
        )  # fmt: skip
        if KIND == "logistic":
            total += tl.sum(softplus(z, PRECISE), 1)
        else:
            higher = tl.maximum(m, tl.max(z, 1))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing so far: exp(-inf), not NaN
            total = total * _lib.exp(m - base, PRECISE) + tl.sum(_lib.exp(z - base[:, None], PRECISE), 1)
            if ids_ptr is None:
                own += tl.sum(tl.where(j == target, z, 0.0), 1)
                if SMOOTH:
                    factor = tl.full((1, CLASSES), 1.0, tl.float32)
                    if factors_ptr is not None:
                        factor = tl.load(factors_ptr + j, mask=j < end, other=0.0).to(tl.float32)
                    factor = tl.where(j < end, factor, 0.0)
                    smooth += tl.where(weights == 0.0, 0.0, weights * (m - base))
                    smooth += tl.sum(tl.where(factor == 0.0, 0.0, factor * (z - base[:, None])), 1)
                    weights += tl.sum(tl.sum(factor, 1), 0)
            m = higher
    at = partial_ptr + part * PLANES * rows + i
    mask = i < rows
    if KIND == "logistic":
        tl.store(at, total[:, None], mask=mask)
    else:
        tl.store(at, m[:, None], mask=mask)
        tl.store(at + rows, total[:, None], mask=mask)
        if ids_ptr is None:
            tl.store(at + 2 * rows, own[:, None], mask=mask)
            tl.store(at + 3 * rows, smooth[:, None], mask=mask)


@triton.jit
def logits_bwd_kernel(
    dz_ptr, begin, length, highest_ptr, sum_ptr, scale_ptr, own_ptr, even_ptr, statistics_row,
    x_ptr, weight_ptr, bias_ptr, ids_ptr, log_ptr, labels_ptr, factors_ptr,
    rows, count, cols, classes, x_row, x_col, weight_row, weight_col, bias_step, hits,
    KIND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dz_ij = scale_i p_ij - own_i [j is the target] - even_i c_j, for the classes [begin, begin + length)."""
    PRECISE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    first = begin + tl.program_id(1).to(tl.int64) * CLASSES
    j = (first + tl.arange(0, CLASSES))[None, :]
    mask = i < rows
    z = logits_tile(
        i, j, x_ptr, weight_ptr, bias_ptr, ids_ptr, log_ptr, labels_ptr, rows, begin + length, cols, classes,
        x_row, x_col, weight_row, weight_col, bias_step, hits, PRECISION, ROWS, CLASSES, COLS,
    )  # fmt: skip
    scale = tl.load(scale_ptr + i, mask=mask, other=0.0)
    if KIND == "logistic":
        dz = scale * _lib.sigmoid(z, PRECISE)
    else:
        highest = tl.load(highest_ptr + i * statistics_row, mask=mask, other=0.0)
        total = tl.load(sum_ptr + i * statistics_row, mask=mask, other=1.0)
        dz = scale * (_lib.exp(z - highest, PRECISE) / total)
        if ids_ptr is None:
            target = tl.load(labels_ptr + i, mask=mask, other=-1).to(tl.int64)
            dz -= tl.where(j == target, tl.load(own_ptr + i, mask=mask, other=0.0), 0.0)
            if even_ptr is not None:
                even = tl.load(even_ptr + i, mask=mask, other=0.0)
                if factors_ptr is not None:
                    even = even * tl.load(factors_ptr + j, mask=j < count, other=0.0).to(tl.float32)
                dz -= even
    out = dz_ptr + i * length + (j - begin)
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=mask & (j < begin + length))


@triton.jit
def product_kernel(
    a_ptr, b_ptr, ids_ptr, out_ptr, m, n, depth, b_rows, part_length, a_row, a_col, b_row, b_col,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[part] = the share of a @ b that one part of the depth has; ids: which row of b each step takes."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)[:, None]
    col = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)[None, :]
    part = tl.program_id(2).to(tl.int64)
    begin = part * part_length
    end = tl.minimum(begin + part_length, depth)
    total = tl.zeros((M, N), tl.float32)
    for first in range(begin, end, DEPTH):
        k = first + tl.arange(0, DEPTH)
        here = k < end
        a = tl.load(a_ptr + row * a_row + k[None, :] * a_col, mask=(row < m) & here[None, :], other=0.0)
        id = k
        if ids_ptr is not None:
            id = tl.load(ids_ptr + k, mask=here, other=-1).to(tl.int64)
            here = here & (id >= 0) & (id < b_rows)
        b = tl.load(b_ptr + id[:, None] * b_row + col * b_col, mask=here[:, None] & (col < n), other=0.0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)
    out = out_ptr + (part * m + row) * n + col
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < m) & (col < n))


def _side(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def _parts(programs: int, turns: int, like: Tensor) -> tuple[int, int]:
    """(parts, turns of each) that a loop is cut into, for two programs on each multiprocessor where it is that long."""
    wanted = max(1, 2 * _lib.device_properties(like.device).sm_count // programs)
    length = triton.cdiv(turns, min(wanted, max(turns, 1)))
    return max(1, triton.cdiv(turns, max(length, 1))), length


def _tiles(shared: Shared) -> dict[str, int]:
    wide = shared.input.dtype == torch.float32
    rows, cols = shared.input.shape
    sides = {"ROWS": _side(rows, 64), "CLASSES": _side(shared.count, 64)}
    return {**sides, "COLS": _side(cols, 32 if wide else 64)}


def forward(shared: Shared, smooth: bool = False) -> Tensor:
    """(parts, 4, B), of the planes that `logits_fwd_kernel` writes."""
    rows, count = shared.input.shape[0], shared.count
    tiles = _tiles(shared)
    blocks = triton.cdiv(rows, tiles["ROWS"])
    parts, turns = _parts(blocks, triton.cdiv(count, tiles["CLASSES"]), shared.input)
    partial = torch.empty((parts, 4, rows), dtype=torch.float32, device=shared.input.device)
    _lib.launch(
        logits_fwd_kernel, (blocks, parts), shared.input, partial, turns * tiles["CLASSES"], *_arguments(shared),
        KIND=shared.kind, PRECISION=precision(shared.input), SMOOTH=smooth, **tiles, num_stages=3,
    )  # fmt: skip
    return partial


def product(a: Tensor, b: Tensor, ids: Tensor | None, dtype: torch.dtype, kind: str) -> Tensor:
    """a @ b, or a @ b[ids]; summed in float32. kind: of the products (`precision`)."""
    (m, depth), n = a.shape, b.shape[1]
    tiles = {"M": _side(m, 64), "N": _side(n, 64), "DEPTH": 32}
    grid = triton.cdiv(m, tiles["M"]), triton.cdiv(n, tiles["N"])
    parts, turns = _parts(max(1, grid[0] * grid[1]), triton.cdiv(depth, tiles["DEPTH"]), b)
    out = torch.empty((parts, m, n), dtype=torch.float32 if parts > 1 else dtype, device=a.device)
    if m and n:
        _lib.launch(
            product_kernel, (*grid, parts), b, a, b, ids, out, m, n, depth, b.shape[0], turns * tiles["DEPTH"],
            *a.stride(), *b.stride(), PRECISION=kind, **tiles, num_stages=3,
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(dtype)


class Factors(NamedTuple):
    """What the gradient of a row's logits is made of, (B,) each; statistics: (B, 2 or more)."""

    statistics: Tensor
    scale: Tensor
    own: Tensor | None = None
    even: Tensor | None = None


def backward(
    shared: Shared, factors: Factors, mask: tuple[bool, bool, bool], dweight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of input, gradient of the classes' biases) in float32; that of the classes' rows goes to `dweight`."""
    x, count = shared.input, shared.count
    rows = x.shape[0]
    tiles, kind = _tiles(shared), precision(x)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    turns = max(CHUNK // (max(rows, 1) * dtype.itemsize * tiles["CLASSES"]), 1)
    most = min(turns, 65535) * tiles["CLASSES"]  # the second axis of a grid is that short
    dinput = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if mask[0] else None
    dbias = torch.zeros(count, dtype=torch.float32, device=x.device) if mask[2] else None
    statistics = factors.statistics
    for begin in range(0, count, most):
        length = min(most, count - begin)
        dz = torch.empty((rows, length), dtype=dtype, device=x.device)
        grid = triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(length, tiles["CLASSES"])
        _lib.launch(
            logits_bwd_kernel, grid, x, dz, begin, length, statistics, statistics[:, 1:], factors.scale, factors.own,
            factors.even, statistics.stride(0), *_arguments(shared), KIND=shared.kind, PRECISION=kind,
            **tiles, num_stages=3,
        )  # fmt: skip
        chunk = slice(begin, begin + length)
        if dinput is not None and shared.ids is None:
            dinput += product(dz, shared.weight[chunk], None, torch.float32, kind)
        elif dinput is not None and shared.ids is not None:
            dinput += product(dz, shared.weight, shared.ids[chunk], torch.float32, kind)
        if dweight is not None:
            dweight[chunk] = product(dz.T, x, None, dweight.dtype, kind)
        if dbias is not None:
            dbias[chunk] = dz.sum(0, dtype=torch.float32)
    return dinput, dbias


def weights_of_parts(shared: Shared, parts: int) -> Tensor:
    """The sum of the class weights of each part of `forward`, (parts,) float32."""
    tiles = _tiles(shared)
    length = triton.cdiv(triton.cdiv(shared.count, tiles["CLASSES"]), parts) * tiles["CLASSES"]
    if shared.factors is None:
        begins = torch.arange(parts, device=shared.input.device) * length
        return (shared.count - begins).clamp(max=length).float()
    padded = torch.nn.functional.pad(shared.factors.float(), (0, parts * length - shared.count))
    return padded.reshape(parts, length).sum(1)
