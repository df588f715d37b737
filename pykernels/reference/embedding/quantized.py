"""Rows of small codes with a scale and a bias each, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .lookup import bag_of_each, pool

__all__ = ["dequantize_rows", "embedding_bag_quantized", "quantize_rows"]


def quantize_rows(weight: Tensor, bits: int = 8) -> Tensor:
    """The codes of each row, then its scale and bias (bits 8: float32, 4: float16), as bytes: (V, D + 8 | D / 2 + 4).

    In float32, with l and h the least and the largest element of a row x:
    8 bits: scale = (h - l) / 255,  bias = l,  code = round((x - l) * (255 / (h - l + 1e-8))).
    4 bits: bias = half(l),  scale = half((h - bias) / 15), or 1 where that or its inverse is not a number to divide by,
    code = round((x - bias) * (1 / scale)) within [0, 15]; the code of an even column in the low half of its byte.
    round is to nearest, ties to even. A row that is not finite, or whose scale or bias is not, gets codes of 0.
    """
    x = weight.detach().float()
    empty = x.shape[1] == 0
    low, high = (x.new_zeros(x.shape[0], 1),) * 2 if empty else (x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    low, high = low + 0.0, high + 0.0  # of rows with zeros of both signs, whichever is found first
    if bits == 8:
        span = high - low
        scale, bias = torch.div(span, torch.full_like(span, 255)), low
        codes = (x - low) * torch.div(torch.full_like(span, 255), span + 1e-8)
    else:
        bias = low.half()
        span = high - bias.float()
        scale = torch.where(span == 0, 1, torch.div(span, torch.full_like(span, 15))).half()
        scale = torch.where((scale == 0) | (1 / scale.float()).isinf(), 1, scale)
        codes = (x - bias.float()) * torch.div(torch.ones_like(span), scale.float())
    codes = codes.round().clamp(0, 2**bits - 1).nan_to_num(0).to(torch.uint8)
    if bits == 4:
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    numbers = torch.cat([scale, bias], 1)
    numbers = torch.where(numbers.isnan(), torch.nan, numbers)  # one NaN of the many, on every machine
    return torch.cat([codes, numbers.view(torch.uint8)], 1)


def dequantize_rows(packed: Tensor, bits: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * code + bias, row by row: (V, D). In float32 (float64 for float64), rounded once to `dtype`."""
    return _rows(packed, bits, dtype).to(dtype)


def _rows(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = packed.shape[1] - bits  # two floats, or two halves: as many bytes as a code has bits
    numbers = (
        packed[:, size:]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float32 if bits == 8 else torch.float16)
        .to(wide)
    )
    codes = packed[:, :size]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    return codes.to(wide) * numbers[:, :1] + numbers[:, 1:]


def embedding_bag_quantized(
    packed: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    bits: int = 8,
    mode: str | None = "sum",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`embedding_bag` (mode None: `embedding`) of the table `dequantize_rows(packed, bits)`."""
    ids = indices.reshape(-1)
    rows = _rows(packed.index_select(0, ids), bits, dtype)
    if mode is None:
        return rows.to(dtype).reshape(*indices.shape, rows.shape[1])
    bag, bags = bag_of_each(indices, offsets, include_last_offset)
    counted = torch.ones_like(ids, dtype=torch.bool)
    if padding_idx is not None:
        counted = ids != padding_idx % packed.shape[0]
    return pool(rows, counted, bag, bags, mode, per_sample_weights).to(dtype)
