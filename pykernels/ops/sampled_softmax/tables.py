"""The tables that are built from the classes' counts, by native code where it is there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import get_ctx, register_fake

from ...reference.sampled_softmax import tables as reference
from .._library import LIBRARY
from ._functions import ROOM

__all__ = ["AliasTable", "HuffmanTree"]

LIBRARY.define("alias_table.cpu(Tensor scaled) -> (Tensor, Tensor)")
LIBRARY.define("huffman_paths.cpu(Tensor counts, Tensor order) -> (Tensor, Tensor, Tensor)")


def _fake_paths(counts: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steps = get_ctx().new_dynamic_size()
    points = order.new_empty(steps, dtype=torch.int32)
    return order.new_empty(order.shape[0] + 1), points, order.new_empty(steps, dtype=torch.int8)


register_fake(
    "pykernels::alias_table.cpu",
    lambda scaled: (torch.empty_like(scaled), scaled.new_empty(scaled.shape, dtype=torch.int32)),
    lib=LIBRARY,
)
register_fake("pykernels::huffman_paths.cpu", _fake_paths, lib=LIBRARY)


class AliasTable(reference.AliasTable):
    __doc__ = reference.AliasTable.__doc__

    @staticmethod
    def _fill(scaled_probability: Tensor) -> tuple[Tensor, Tensor]:
        if "cpu" in ROOM.absent:
            return reference.AliasTable._fill(scaled_probability)
        return torch.ops.pykernels.alias_table.cpu(scaled_probability)


class HuffmanTree(reference.HuffmanTree):
    __doc__ = reference.HuffmanTree.__doc__

    @staticmethod
    def _paths(counts: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if "cpu" in ROOM.absent:
            return reference.HuffmanTree._paths(counts, order)
        return torch.ops.pykernels.huffman_paths.cpu(counts, order)
