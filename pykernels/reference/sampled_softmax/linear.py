"""Losses over all classes, in plain torch, with the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]


def linear_rows(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The loss of each row, in float32 (float64 for float64); 0 for rows of `ignore_index`.

    z = W x_i + b, L = logsumexp(z), c = class weights (1 without):
    loss_i = (1 - s) c_y (L - z_y) + s / C sum_j c_j (L - z_j) + z_loss c_y L^2.
    """
    x, w = (t if t.dtype == torch.float64 else t.float() for t in (input, weight))
    logits = x @ w.mT
    if bias is not None:
        logits = logits + bias.to(x.dtype)
    log_p = torch.log_softmax(logits, 1)
    kept = target != ignore_index
    label = torch.where(kept, target, 0).long()
    factors = None if class_weight is None else class_weight.to(x.dtype)
    c = 1 if factors is None else factors[label]
    loss = -(1 - label_smoothing) * c * log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    if label_smoothing:
        total = log_p.sum(1) if factors is None else log_p @ factors
        loss = loss - label_smoothing / logits.shape[1] * total
    if z_loss:
        loss = loss + z_loss * c * torch.logsumexp(logits, 1).square()
    return torch.where(kept, loss, 0)


def reduce_weighted(
    loss: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str, dtype: torch.dtype
) -> Tensor:
    """The mean divides by the sum of the class weights of the targets that count, as torch's cross entropy does."""
    if reduction == "mean":
        kept = target != ignore_index
        if class_weight is None:
            total = kept.sum()
        else:
            label = torch.where(kept, target, 0).long().clamp(0, max(class_weight.shape[0] - 1, 0))  # unchecked ones
            total = torch.where(kept, class_weight.detach().to(loss.dtype)[label], 0).sum()
        loss = loss.sum() / total
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)


def with_probabilities(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Targets that are probabilities, unbatched inputs and K-dimensional losses: the logits, then torch's own loss."""
    x, w = (t if t.dtype == torch.float64 else t.float() for t in (input, linear_weight))
    logits = torch.tensordot(x, w, ([-1], [-1]))
    if linear_bias is not None:
        logits = logits + linear_bias.to(x.dtype)
    probabilities = target.to(x.dtype) if target.is_floating_point() else target
    c = None if weight is None else weight.to(x.dtype)
    options: dict[str, Any] = {"weight": c, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = torch.nn.functional.cross_entropy(logits, probabilities, reduction=reduction, **options)
    if z_loss:
        square = torch.logsumexp(logits, 0 if input.dim() == 1 else 1).square()
        share = torch.ones_like(square)  # what torch's mean divides by the sum of
        if not target.is_floating_point():
            kept = target != ignore_index
            classes = torch.where(kept, target, 0).long()
            share = torch.where(kept, share if c is None else c.detach()[classes], 0)
        extra = z_loss * share * square
        if reduction != "none":
            extra = extra.sum() / (share.sum() if reduction == "mean" else 1)
        loss = loss + extra
    return loss.to(input.dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, ...) plus z_loss times the mean square of the
    log of the softmax's denominator."""
    ignored = -100 if ignore_index is None else ignore_index
    plain = input.dim() == 2 and linear_weight.dim() == 2 and target.dim() == 1 and not target.is_floating_point()
    if not plain:
        fixed = (reduction, ignored, label_smoothing, z_loss)
        return with_probabilities(input, linear_weight, target, linear_bias, weight, *fixed)
    loss = linear_rows(input, linear_weight, linear_bias, target, weight, ignored, label_smoothing, z_loss)
    return reduce_weighted(loss, target, weight, ignored, reduction, input.dtype)
