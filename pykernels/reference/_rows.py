"""Row lookup, shared by the rooms that read tables by id."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(weight: Tensor, ids: Tensor, sparse: bool = False, padding_idx: int | None = None) -> Tensor:
    """`weight[ids]` for one-dimensional ids: (N,) of (V, D) -> (N, D), a half-precision table's rows as float32.

    So the gradient of a half-precision table is summed in float32 and rounded once. `sparse` gives a row-sparse
    gradient, without the rows of `padding_idx`; `torch.embedding` is the only torch function that makes one.
    """
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if sparse:
        rows = torch.embedding(weight, ids, -1 if padding_idx is None else padding_idx, False, True)
    elif half and torch.is_grad_enabled():
        return weight.float().index_select(0, ids)
    else:
        rows = weight.index_select(0, ids)
    return rows.float() if half else rows
