"""Tables of 8- and 4-bit codes on csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from ._embedding_bags import Bags, flat
from ._extension import Extension


def embedding_bag_quantized_forward(
    ext: Extension,
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
    rows, cols = packed.shape[0], (packed.shape[1] - bits) * (8 // bits)
    out = packed.new_empty((*ids.shape, cols) if lookup else (bags.count, cols), dtype=dtype)
    ext.call(
        "embedding_bag_quantized", packed, bags.ids, bags.offsets, flat(per_sample_weights), out,
        bags.record(ext, what), what, bags.narrow, bags.count, bags.length, bags.n, bags.last, rows, cols, padding_idx,
        packed.stride(0), bits, mode == "mean", dtype,
    )  # fmt: skip
    return out


def quantize_rows_forward(ext: Extension, weight: Tensor, bits: int) -> Tensor:
    rows, cols = weight.shape
    out = weight.new_empty((rows, cols * bits // 8 + bits), dtype=torch.uint8)
    ext.call("quantize_rows", weight, out, rows, cols, *weight.stride(), bits, weight.dtype)
    return out
