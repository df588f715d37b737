"""DLRM's pairwise interaction in plain torch. Autograd of this function is the truth for gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dot_interaction"]


def dot_interaction(dense: Tensor, sparse: Tensor, self_interaction: bool = False) -> Tensor:
    """y[b] = [dense[b] | x_i . x_j for i = 0..F, j < i], x = (dense[b], sparse[b, 0], ..., sparse[b, F - 1]).

    dense (B, D), sparse (B, F, D) -> (B, D + F (F + 1) / 2). With `self_interaction` j <= i: F + 1 products more. The
    products are in row-major order of (i, j), as torch.tril_indices gives them; each is summed in float32 (float64 for
    float64) and rounded once. Source: Naumov et al., "Deep learning recommendation model for personalization and
    recommendation systems" (2019).
    """
    features = torch.cat([dense.unsqueeze(1), sparse], 1)
    wide = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    products = wide @ wide.mT
    rows = features.shape[1]
    i, j = torch.tril_indices(rows, rows, 0 if self_interaction else -1, device=dense.device)
    return torch.cat([dense, products[:, i, j].to(dense.dtype)], 1)
