"""What the launchers of csrc/cuda/attention.h take alike: tensors as aligned rows, strides, sizes, options."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _attended

Strides = tuple[int, int, int]


class Sizes(NamedTuple):
    """lq and lk: lengths, packed: totals. limit_q, limit_k: bounds on one sequence's lengths."""

    batch: int
    heads: int
    lq: int
    lk: int
    limit_q: int
    limit_k: int


def sizes(query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, *masks: Tensor | None) -> Sizes:
    if cu_seqlens_q is None:
        batch, heads, lq, _ = query.shape
        return Sizes(batch, heads, lq, key.shape[2], lq, key.shape[2])
    lq, heads, _ = query.shape
    lk = key.shape[0]
    return Sizes(cu_seqlens_q.shape[0] - 1, heads, lq, lk, *_attended.longest(lq, lk, *masks))


def units(x: Tensor) -> int:
    """The head size of x in whole 16-byte units: what the kernels copy asynchronously."""
    each = 16 // x.element_size()
    return max(1, -(-x.shape[-1] // each)) * each


def in_rows(x: Tensor) -> Tensor:
    """x with rows of adjacent elements in whole 16-byte units, 16-byte aligned; copied only where it has none."""
    if x.shape[-1] != units(x):
        return F.pad(x, (0, units(x) - x.shape[-1]))
    aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    if aligned and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def unexpanded(x: Tensor) -> Tensor:
    """x, copied where rows share memory, which no TMA descriptor is promised to describe."""
    shared = any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))
    return x.clone(memory_format=torch.contiguous_format) if shared else x


def out_rows(x: Tensor) -> Tensor:
    """What a kernel writes in place of x: x itself, or wider rows that are copied back."""
    return x if x.shape[-1] == units(x) else x.new_empty((*x.shape[:-1], units(x)))


def copy_back(x: Tensor, written: Tensor) -> None:
    if written is not x:
        x.copy_(written[..., : x.shape[-1]])


def strides(x: Tensor) -> Strides:
    """(batch, head, position) of a (B, H, L, D) tensor, or of a packed (total, H, D) one."""
    return (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]


def row_strides(x: Tensor) -> Strides:
    """`strides` for a tensor without head size."""
    return (0, x.stride(1), x.stride(0)) if x.dim() == 2 else x.stride()


def broadcast_strides(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if x is None else _attended.broadcast_strides(x)[:dimensions]


def shared_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    masks: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    size: Sizes,
) -> tuple[Any, ...]:
    """The arguments that all launchers begin with. query, key, value: as `in_rows` gives them."""
    mask, key_padding_mask, prefix, slopes, cu_q, cu_k, seed = masks
    causal, left, right, softcap, dropout_p, scale = options
    seen, span = _attended.seen_keys(mask, key_padding_mask, bias, size.limit_k)
    mask = None if mask is None else mask.view(torch.uint8)
    slopes = None if slopes is None else slopes.contiguous()
    if causal == "none":
        prefix = None
    elif prefix is None:
        right = 0
    unbounded = size.lq + size.lk
    least, keep_scale = _attended.kept(dropout_p)
    of_products, cap = _attended.factors(scale, softcap)
    layout = (
        *strides(query), *strides(key), *strides(value), *broadcast_strides(bias, 4), *broadcast_strides(mask, 4),
        *broadcast_strides(seen, 3), *broadcast_strides(span, 2),
        size.heads if slopes is not None and slopes.dim() == 2 else 0,
        size.batch, size.heads, size.heads // key.shape[1] if key.shape[1] else 1,
        size.lq, size.lk, size.limit_q, size.limit_k, query.shape[-1], value.shape[-1],
        *(unbounded if side < 0 else min(side, unbounded) for side in (left, right)),
        int(causal == "top_left"),
        int(bias is not None and bias.dtype == torch.float32),
        int(torch.get_float32_matmul_precision() == "highest"),
        least,
    )  # fmt: skip
    numbers = (
        of_products,
        scale,
        cap,
        keep_scale,
        torch.finfo(bias.dtype).min if bias is not None else -math.inf,
    )
    tensors = query, key, value, bias, mask, seen, span, prefix, slopes, cu_q, cu_k, seed if dropout_p > 0 else None
    return *tensors, layout, numbers
