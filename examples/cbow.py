"""CBOW with negative sampling (Mikolov et al., 2013): the mean of the words around a place predicts the word there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from _common import functions, main
from pykernels.testing.text import Text
from pykernels.testing.training import Batch, Task


class CBOW(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, width, mode="mean", sparse=True)
        self.output = nn.Parameter(torch.randn(vocabulary, width) * 0.1)
        self.loss = functions.negative_sampling_loss

    def forward(self, around: Tensor, center: Tensor, negatives: Tensor) -> Tensor:
        return self.loss(self.words(around), self.output, center, negatives, reduction="none")


torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch's Adagrad warns where nobody said so


def task(text: Text, small: bool = False) -> Task:
    words = text.words()
    vocabulary, noise = len(words.vocabulary), words.counts() ** 0.75
    width, window, count, batch = (16, 2, 3, 32) if small else (100, 5, 5, 4096)
    around = torch.tensor([offset for offset in range(-window, window + 1) if offset])

    def batches(steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)

        def one() -> Batch:
            at = torch.randint(window, len(words.ids) - window, (batch,), generator=generator)
            negatives = torch.multinomial(noise, batch * count, replacement=True, generator=generator)
            return words.ids[at[:, None] + around], words.ids[at], negatives.view(batch, count)

        return [one() for _ in range(steps)]

    return Task(
        name="cbow",
        title="CBOW with negative sampling",
        shape=f"{vocabulary} words x {width}, window {window}, {count} negatives, {batch} places a step",
        tokens=batch,
        functions=functions,
        build=lambda functions: CBOW(functions, vocabulary, width),
        batches=batches,
        # A rate per element: frequent and rare words get gradients of very different sizes from a mean over the batch.
        optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    )


if __name__ == "__main__":
    main(task)
