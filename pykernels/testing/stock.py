"""What PyTorch has no name for, as one writes it there: the other side of demos, examples and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    prefix_length: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """`pykernels.functional.attention` with a dense mask for everything.

    Shapes: query (B, H, Lq, D), key and value (B, H, Lk, D), prefix_length (B,), key_padding_mask (B, Lk), True = real.
    """
    rows, columns = query.shape[2], key.shape[2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    if causal:
        mask = mask.tril(columns - rows)
    if prefix_length is not None:
        within = torch.arange(columns, device=query.device) < prefix_length[:, None]
        mask = mask | within[:, None, None]
    if key_padding_mask is not None:
        mask = mask & key_padding_mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, mask)


def negative_sampling_loss(
    input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor, reduction: str = "mean"
) -> Tensor:
    """word2vec's loss: -log s(x.w_t) - sum_k log s(-x.w_k), s the logistic function.

    Shapes: input (N, D), weight (V, D), target (N,), negatives (N, K).
    """
    positive = (input * F.embedding(target, weight)).sum(-1)
    negative = torch.bmm(F.embedding(negatives, weight), input.unsqueeze(2)).squeeze(2)
    loss = -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(-1))
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]
