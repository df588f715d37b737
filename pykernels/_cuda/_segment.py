"""Positions sorted by id, as the kernels of csrc/cuda/embedding_segment.h take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._segments import Segments


def either(keys: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (keys, None) if keys.dtype == torch.int32 else (None, keys)


def whole_vectors(x: Tensor, vector: int) -> bool:
    """Whether the rows of x are whole vectors of 16 bytes, of so many elements, and begin on them."""
    rows = x.stride(1) == 1 and x.shape[1] % vector == 0 and x.stride(0) % vector == 0
    return rows and x.data_ptr() % 16 == 0


def _chunk_length(n: int) -> int:
    """Entries of a chunk: some 2000 chunks to fill a GPU, and of the longest run so few partial sums to add.

    It must not depend on the device: the sums are grouped by it.
    """
    length = 32
    while length < 1024 and length * 2048 < n:
        length *= 2
    return length


def partial(segments: Segments, cols: int) -> tuple[int, Tensor | None]:
    """The length of a chunk, and room for what its runs leave to its neighbours."""
    n = segments.keys.numel()
    length = _chunk_length(n)
    chunks = -(-n // length)
    device = segments.keys.device
    return length, torch.empty((chunks, 2, cols), dtype=torch.float32, device=device) if chunks > 1 else None
