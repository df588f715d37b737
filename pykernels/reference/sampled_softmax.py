"""Losses over a sample of the classes, in plain torch. Autograd of these functions is the truth for gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._rows import gather_rows

__all__ = ["negative_sampling_loss"]


def negative_sampling_loss(
    input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor, reduction: str = "mean"
) -> Tensor:
    """loss_i = -log sigmoid(x_i . w[target_i]) - sum_k log sigmoid(-x_i . w[negatives_ik]).

    float16 and bfloat16 are computed in float32 and rounded once. Source: Mikolov et al., "Distributed representations
    of words and phrases and their compositionality" (NeurIPS 2013), equation 4, with its sign turned.
    """
    x = input if input.dtype == torch.float64 else input.float()
    positive = (x * gather_rows(weight, target)).sum(-1)
    rows = gather_rows(weight, negatives.reshape(-1))
    if negatives.dim() == 1:
        negative = x @ rows.mT
    else:
        negative = torch.bmm(rows.reshape(*negatives.shape, x.shape[1]), x.unsqueeze(2)).squeeze(2)
    loss = -logsigmoid(positive) - logsigmoid(-negative).sum(-1)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(input.dtype)
