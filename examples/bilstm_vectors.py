"""Contextual word vectors from a bidirectional LSTM (Melamud et al., 2016; Peters et al., 2018).

The vector of a place in a sentence is the forward state before it beside the backward state after it; it is trained to
predict the word that stands there, which neither state has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from _common import adam, main, next_token_loss, windows
from pykernels.testing.text import Text
from pykernels.testing.training import Task


class ContextualVectors(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, vocabulary)

    def vectors(self, tokens: Tensor) -> Tensor:
        """(B, L) -> the vectors of the L - 2 inner places, (B, L - 2, 2 * hidden)."""
        forward, backward = self.lstm(self.embedding(tokens))[0].chunk(2, -1)
        return torch.cat([forward[:, :-2], backward[:, 2:]], -1)

    def forward(self, tokens: Tensor, _: Tensor) -> Tensor:
        return next_token_loss(self.head(self.vectors(tokens)), tokens[:, 1:-1])


def task(text: Text, small: bool = False) -> Task:
    words = text.words()
    vocabulary = len(words.vocabulary)
    width, hidden, batch, length = (16, 20, 3, 12) if small else (64, 128, 32, 32)
    return Task(
        name="bilstm-vectors",
        title="Bidirectional LSTM word vectors",
        shape=f"{vocabulary} words, 2 x {hidden}, {batch} x {length} a step",
        tokens=batch * (length - 2),
        build=lambda _: ContextualVectors(vocabulary, width, hidden),
        batches=windows(words.ids, batch, length),
        optimizer=adam,
    )


if __name__ == "__main__":
    main(task)
