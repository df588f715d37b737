"""What PyTorch has no name for, as one writes it there: the other side of demos, examples and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def sampled_softmax_loss(
    weights: Tensor,
    biases: Tensor,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int,
    sampled_values: tuple[Tensor, Tensor, Tensor],
    remove_accidental_hits: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """TensorFlow's loss over one label a row and a shared sample, accidental hits removed."""
    sampled, true_expected, sampled_expected = sampled_values
    true = (inputs * weights[labels]).sum(1) + biases[labels] - true_expected.view(-1).log().to(inputs.dtype)
    others = F.linear(inputs, weights[sampled], biases[sampled]) - sampled_expected.log().to(inputs.dtype)
    others = others.masked_fill(labels.unsqueeze(1) == sampled, -torch.inf)
    logits = torch.cat([true.unsqueeze(1), others], 1)
    return F.cross_entropy(logits, torch.zeros_like(labels), reduction=reduction)


def embedding_bag_multi(indices: Sequence[Tensor], offsets: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sums of bags of several tables, side by side."""
    return torch.cat(
        [F.embedding_bag(i, w, o, mode="sum") for i, o, w in zip(indices, offsets, weights, strict=True)], 1
    )


def dot_interaction(dense: Tensor, sparse: Tensor) -> Tensor:
    """DLRM's pairwise products: dense (B, D) and sparse (B, F, D) -> (B, D + F (F + 1) / 2)."""
    x = torch.cat([dense.unsqueeze(1), sparse], 1)
    rows, columns = torch.tril_indices(x.shape[1], x.shape[1], -1, device=x.device)
    return torch.cat([dense, torch.bmm(x, x.transpose(1, 2))[:, rows, columns]], 1)


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one state a row, the mean square of its gradient, over dense gradients of tables."""

    def __init__(self, params: Any, lr: float = 1e-2, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["sum"] = weight.new_zeros(weight.shape[0])
                state["sum"] += weight.grad.square().mean(1)
                weight -= group["lr"] * weight.grad / (state["sum"].sqrt() + group["eps"]).unsqueeze(1)
