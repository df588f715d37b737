"""Sampled losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.sampled_softmax import negative_sampling_loss

__all__ = ["NegativeSamplingLoss"]


class NegativeSamplingLoss(nn.Module):
    """word2vec's negative sampling loss; see `pykernels.functional.negative_sampling_loss`.

    The table of the classes stays where it is (often an `Embedding`'s weight) and is an argument of the call.

    Args:
        reduction: "none", "mean" or "sum".
        backend: see `pykernels.explain`.

    Shapes: input Tensor[B, D], weight Tensor[V, D], target Tensor[B], negatives Tensor[B, K] or Tensor[K] -> a scalar,
    or Tensor[B] with reduction "none".
    """

    __constants__ = ["reduction"]

    def __init__(self, reduction: str = "mean", *, backend: str | None = None) -> None:
        super().__init__()
        self.reduction = reduction
        self.backend = backend

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        return negative_sampling_loss(input, weight, target, negatives, self.reduction, backend=self.backend)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
