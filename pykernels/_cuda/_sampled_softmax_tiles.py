"""Launches of the kernels over classes that all rows share: tiles of logits, their gradients, and products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._sampled import Shared
from ._extension import Extension

CHUNK = 64 << 20  #: bytes that the gradient of a chunk's logits may take, and as much again for its transpose
PLANES = 5  #: csrc/cuda/sampled_softmax.h


def _tensors(shared: Shared) -> tuple[Any, ...]:
    return shared.input, shared.weight, shared.bias, shared.ids, shared.log, shared.labels, shared.factors


def _sizes(shared: Shared) -> tuple[Any, ...]:
    x, w = shared.input, shared.weight
    return (
        narrow(shared.ids), narrow(shared.labels), x.shape[0], shared.count, x.shape[1], w.shape[0], *x.stride(),
        *w.stride(), shared.bias_step, shared.hits,
    )  # fmt: skip


def narrow(ids: Tensor | None) -> bool:
    return ids is not None and ids.dtype == torch.int32


def exact(x: Tensor) -> bool:
    """Whether float32 products are made to float32's rounding; torch may allow tf32."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _parts(ext: Extension, blocks: int, turns: int, like: Tensor) -> tuple[int, int]:
    """(parts, turns of each) that a loop is cut into, for two blocks on each multiprocessor where it is that long."""
    wanted = max(1, 2 * ext.multiprocessors(like.device) // max(blocks, 1))
    length = -(-turns // max(1, min(wanted, turns)))
    return max(1, -(-turns // max(length, 1))), length


def forward(ext: Extension, shared: Shared, smooth: bool = False) -> Tensor:
    """(parts, PLANES, B): what each part of the classes tells of each row."""
    x = shared.input
    parts, turns = _parts(ext, -(-x.shape[0] // (64 if x.dtype == torch.float32 else 128)), -(-shared.count // 64), x)
    partial = torch.empty((parts, PLANES, x.shape[0]), dtype=torch.float32, device=x.device)
    ext.call(
        "sampled_softmax_logits", *_tensors(shared), partial, *_sizes(shared), turns * 64, parts,
        shared.kind == "logistic", smooth, exact(x), x.dtype,
    )  # fmt: skip
    return partial


class Slopes(NamedTuple):
    """What the gradient of a row's logits is made of; all: the sum of the class weights, one float32, or None."""

    dloss: Tensor
    statistics: Tensor
    all: Tensor | None = None
    ignored: int = -100
    smoothing: float = 0.0
    z_loss: float = 0.0


def _room_for(rows: int, cols: int, like: Tensor) -> Tensor:
    """For gradients of logits; whole 16 bytes of each row are read."""
    dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
    return torch.empty((rows, -(-cols // 8) * 8), dtype=dtype, device=like.device)


def _product(ext: Extension, a: Tensor, depth: int, b: Tensor, ids: Tensor | None, out: Tensor, add: bool) -> None:
    """out (parts, m, n): the shares that parts of the depth have in a @ b, or a @ b[ids]."""
    parts, m, n = out.shape
    step = 64 if a.dtype == torch.bfloat16 else 32
    turns = -(-depth // step)
    length = -(-turns // parts) * step
    ext.call(
        "sampled_softmax_product", a, b, ids, out, narrow(ids), m, n, depth, b.shape[0], a.stride(0), *b.stride(),
        length, parts, out.dtype == torch.float32, add, exact(b), b.dtype,
    )  # fmt: skip


def _parts_of_product(ext: Extension, m: int, n: int, depth: int, like: Tensor) -> int:
    wide = like.dtype != torch.bfloat16
    blocks = -(-m // (64 if wide else 128)) * -(-n // 64)
    return _parts(ext, blocks, -(-depth // (32 if wide else 64)), like)[0]


def _multiply(ext: Extension, a: Tensor, depth: int, b: Tensor, out: Tensor) -> None:
    """out (m, n) = a @ b"""
    parts = _parts_of_product(ext, out.shape[0], out.shape[1], depth, b)
    if parts == 1:
        _product(ext, a, depth, b, None, out.unsqueeze(0), False)
        return
    shares = torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
    _product(ext, a, depth, b, None, shares, False)
    out.copy_(shares.sum(0))


def backward(
    ext: Extension, shared: Shared, slopes: Slopes, mask: tuple[bool, bool, bool], dweight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of input, gradient of the classes' biases) in float32; that of the classes' rows goes to `dweight`."""
    x, count = shared.input, shared.count
    rows, cols = x.shape
    item = 2 if x.dtype == torch.bfloat16 else 4
    most = min(max(CHUNK // (rows * item * 64), 1), 65535) * 64
    shares = None
    if mask[0]:
        parts = _parts_of_product(ext, rows, cols, min(most, count), x)
        shares = torch.empty((parts, rows, cols), dtype=torch.float32, device=x.device)
        if count == 0:
            shares.zero_()
    dbias = torch.zeros(count, dtype=torch.float32, device=x.device) if mask[2] else None
    for begin in range(0, count, most):
        length = min(most, count - begin)
        chunk = slice(begin, begin + length)
        dz = _room_for(rows, length, x) if mask[0] or dweight is None else None
        transposed = _room_for(length, rows, x) if dweight is not None else None
        widths = (0 if t is None else t.stride(0) for t in (dz, transposed))
        ext.call(
            "sampled_softmax_slopes", *_tensors(shared), slopes.dloss, slopes.statistics, slopes.all, dz, transposed,
            *_sizes(shared), begin, length, slopes.statistics.stride(0), *widths, slopes.ignored, slopes.smoothing,
            slopes.z_loss, shared.kind == "logistic", exact(x), x.dtype,
        )  # fmt: skip
        if shares is not None and dz is not None:
            whole = shared.ids is None
            ids = None if shared.ids is None else shared.ids[chunk]
            _product(ext, dz, length, shared.weight[chunk] if whole else shared.weight, ids, shares, begin > 0)
        if dweight is not None and transposed is not None:
            _multiply(ext, transposed, rows, x, dweight[chunk])
        if dbias is not None:
            of_classes = dz.T if transposed is None and dz is not None else transposed
            assert of_classes is not None
            dbias[chunk] = of_classes[:length].sum(1, dtype=torch.float32)
    if shares is None:
        return None, dbias
    return shares[0] if shares.shape[0] == 1 else shares.sum(0), dbias
