"""Tables of 8- and 4-bit codes with a scale and a bias for each row: lookups that unpack in registers, and packing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from ._embedding_forward import Bags, bag_ends, id_at, report_id, tile


@triton.jit
def as_float(code):
    """A conversion of an integer takes four times as long: 2^23 + code has the code in its lowest bits."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def word_at(packed_ptr, words_ptr, at, mask):
    """Four adjacent bytes, at any alignment unless the table is there as words."""
    if words_ptr is not None:
        return tl.load(words_ptr + at // 4, mask=mask, other=0)
    else:
        word = tl.zeros_like(at).to(tl.int32)
        for i in tl.static_range(4):
            word |= tl.load(packed_ptr + at + i, mask=mask, other=0).to(tl.int32) << (8 * i)
        return word


@triton.jit
def from_bits(half):
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def row_numbers(packed_ptr, words_ptr, at, mask, BITS: tl.constexpr):
    """Scale and bias, which begin at these bytes. words_ptr: the table as int32, if it is aligned."""
    if BITS == 8:
        scale = word_at(packed_ptr, words_ptr, at, mask).to(tl.float32, bitcast=True)
        return scale, word_at(packed_ptr, words_ptr, at + 4, mask).to(tl.float32, bitcast=True)
    else:
        both = word_at(packed_ptr, words_ptr, at, mask)
        return from_bits(both), from_bits(both >> 16)


@triton.jit
def quantized_bag_kernel(
    ids_ptr, packed_ptr, words_ptr, offsets_ptr, scale_ptr, out_ptr, record_ptr,
    what, bags, length, n, rows, padding,
    BITS: tl.constexpr, MODE: tl.constexpr, OFFSETS: tl.constexpr, LAST: tl.constexpr, ROW: tl.constexpr,
    CODES: tl.constexpr, BAGS: tl.constexpr, BYTES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """ROW and CODES, the bytes of a row and of its codes, are constants: how wide a load may be follows from them."""
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    byte = tl.program_id(1).to(tl.int64) * BYTES + tl.arange(0, BYTES)[None, :]
    live = bag < bags
    begin, end = bag_ends(bag, live, offsets_ptr, bags, length, n, OFFSETS, LAST)
    longest = 1 if MODE == "none" else tl.max(tl.where(live, end - begin, 0), 0).to(tl.int32)
    low = tl.zeros((BAGS, BYTES), tl.float32)  # with 4 bits the even columns
    high = tl.zeros((BAGS, BYTES), tl.float32)
    count = tl.zeros((BAGS,), tl.int32)
    bad = tl.full((BAGS,), -1, tl.int32)
    for i in tl.range(0, longest, loop_unroll_factor=UNROLL):
        position = begin + i
        inside = live & (position < end)
        id, counted = id_at(ids_ptr, position, inside, rows, padding)
        row = id * ROW
        codes = tl.load(packed_ptr + row[:, None] + byte, mask=counted[:, None] & (byte < CODES), other=0).to(tl.int32)
        factor, shift = row_numbers(packed_ptr, words_ptr, row + CODES, counted, BITS)
        if scale_ptr is not None:
            weight = tl.load(scale_ptr + position, mask=counted, other=0.0)
            factor, shift = weight * factor, weight * shift
        if BITS == 8:
            low += as_float(codes) * factor[:, None] + shift[:, None]
        else:
            low += as_float(codes & 15) * factor[:, None] + shift[:, None]
            high += as_float(codes >> 4) * factor[:, None] + shift[:, None]
        count += counted.to(tl.int32)
        if record_ptr is not None:
            bad = tl.where(inside & ((id < 0) | (id >= rows)) & (bad < 0), i, bad)
    if BITS == 8:
        total, col, cols = low, byte, CODES
    else:
        total = tl.reshape(tl.join(low, high), (BAGS, 2 * BYTES))
        col = tl.program_id(1).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
        cols = 2 * CODES
    if MODE == "mean":
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + bag[:, None] * cols + col, out, mask=live[:, None] & (col < cols))
    if record_ptr is not None:
        report_id(record_ptr, what, ids_ptr, tl.where(bad < 0, n, begin + bad), n, rows, 0)


@triton.jit
def half_bits(x):
    return tl.where(x != x, 0x7E00, x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def float_bits(x):
    return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))


@triton.jit
def code_of(x, shift, inverse, packs, MOST: tl.constexpr):
    """To nearest, ties to even: by the addition of 1.5 * 2^23. Must not be fused with the product."""
    code = (x - shift) * inverse
    code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), MOST), 0.0)
    bits = (code + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(packs, bits, 0)


@triton.jit
def quantize_kernel(
    weight_ptr, out_ptr, cols, bytes, weight_row, weight_col,
    BITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row a program. The formulas are those of pykernels/reference/embedding/quantized.py, to the last bit."""
    from_row = weight_ptr + tl.program_id(0).to(tl.int64) * weight_row
    to_row = out_ptr + tl.program_id(0).to(tl.int64) * (bytes + BITS)
    low = tl.full((COLS,), float("inf"), tl.float32)
    high = tl.full((COLS,), -float("inf"), tl.float32)
    missing = tl.zeros((COLS,), tl.int32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        x = tl.load(from_row + col.to(tl.int64) * weight_col, mask=col < cols, other=0.0).to(tl.float32)
        low = tl.where((col < cols) & (x < low), x, low)
        high = tl.where((col < cols) & (x > high), x, high)
        missing = missing | (x != x).to(tl.int32)
    nan = tl.max(missing, 0) != 0
    least = tl.where(nan, float("nan"), tl.where(cols == 0, 0.0, tl.min(low, 0))) + 0.0  # of zeros of both signs +0
    most = tl.where(nan, float("nan"), tl.where(cols == 0, 0.0, tl.max(high, 0))) + 0.0
    if BITS == 8:
        span = most - least
        scale = tl.div_rn(span, tl.full((), 255.0, tl.float32))
        words = float_bits(scale), float_bits(least)
        shift, inverse = least, tl.div_rn(tl.full((), 255.0, tl.float32), span + 1e-8)
    else:
        bias = half_bits(least)
        shift = from_bits(bias)
        span = most - shift
        half = half_bits(tl.where(span == 0.0, 1.0, tl.div_rn(span, tl.full((), 15.0, tl.float32))))
        one = tl.full((), 1.0, tl.float32)
        unusable = (from_bits(half) == 0.0) | (tl.abs(tl.div_rn(one, from_bits(half))) == float("inf"))
        half = tl.where(unusable, 0x3C00, half)
        words = half, bias
        scale = from_bits(half)
        inverse = tl.div_rn(one, scale)
    packs = (scale - scale == 0.0) & (shift - shift == 0.0)
    i = tl.arange(0, BITS)
    word = tl.where(i < BITS // 2, words[0], words[1]) >> (8 * (i % (BITS // 2)))
    tl.store(to_row + bytes + i, (word & 0xFF).to(tl.uint8))
    for first in range(0, bytes, COLS):
        byte = first + tl.arange(0, COLS)
        if BITS == 8:
            x = tl.load(from_row + byte.to(tl.int64) * weight_col, mask=byte < bytes, other=0.0).to(tl.float32)
            codes = code_of(x, shift, inverse, packs, 255.0)
        else:
            even = from_row + byte.to(tl.int64) * 2 * weight_col
            x = tl.load(even, mask=byte < bytes, other=0.0).to(tl.float32)
            y = tl.load(even + weight_col, mask=byte < bytes, other=0.0).to(tl.float32)
            codes = code_of(x, shift, inverse, packs, 15.0) | (code_of(y, shift, inverse, packs, 15.0) << 4)
        tl.store(to_row + byte, codes.to(tl.uint8), mask=byte < bytes)


def embedding_bag_quantized_forward(
    packed: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    bits: int,
    mode: str,
    include_last_offset: bool,
    padding_idx: int,
    dtype: torch.dtype,
    what: int,
) -> Tensor:
    lookup = mode == "none"
    bags = Bags(ids.reshape(-1, 1) if lookup else ids, offsets, include_last_offset)
    (rows, width), stride = packed.shape, packed.stride(0)
    codes = width - bits
    cols = codes * (8 // bits)
    out = packed.new_empty((*ids.shape, cols) if lookup else (bags.count, cols), dtype=dtype)
    record = bags.record(what)
    if out.numel() == 0:
        return out
    scale = None if per_sample_weights is None else per_sample_weights.reshape(-1).contiguous()
    aligned = all(x % 4 == 0 for x in (codes, stride, packed.data_ptr(), packed.storage_offset()))
    words = packed.view(torch.int32) if aligned else None
    # eight columns a thread: 8 bytes of codes, or 4
    grid, height, part = tile(bags.count, codes, 1024 if bits == 8 else 512)
    _lib.launch(
        quantized_bag_kernel, grid, packed, bags.ids, packed, words, bags.offsets, scale, out, record,
        what, bags.count, bags.length, bags.n, rows, padding_idx, BITS=bits, MODE=mode, **bags.constants, ROW=stride,
        CODES=codes, BAGS=height, BYTES=part, UNROLL=1 if lookup else 4,
    )  # fmt: skip
    return out


def quantize_rows_forward(weight: Tensor, bits: int) -> Tensor:
    rows, cols = weight.shape
    bytes = cols * bits // 8
    out = weight.new_empty((rows, bytes + bits), dtype=torch.uint8)
    if rows:
        _lib.launch(
            quantize_kernel, (rows,), weight, weight, out, cols, bytes, weight.stride(0), weight.stride(1), BITS=bits,
            COLS=min(1024, triton.next_power_of_2(max(cols, 1))), num_warps=1 if cols <= 256 else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
