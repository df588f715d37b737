"""N to 1: a GRU reads a line of any length, its final state tells whether the line was written backwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from _common import adam, lines, main, pad, pick
from pykernels.testing.text import Text
from pykernels.testing.training import Batch, Task


class Classifier(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        x = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, final = self.gru(x)
        return F.cross_entropy(self.head(final[-1]), labels, reduction="none")


def task(text: Text, small: bool = False) -> Task:
    characters = text.characters()
    vocabulary = len(characters.vocabulary)
    width, hidden, batch, longest = (16, 20, 4, 24) if small else (64, 128, 64, 64)
    source = lines(text, characters, longest)

    def batches(steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)

        def one() -> Batch:
            labels = torch.randint(2, (batch,), generator=generator)
            chosen = pick(source, batch, generator)
            turned = [line.flip(0) if label else line for line, label in zip(chosen, labels.tolist(), strict=True)]
            return pad(turned, 0), torch.tensor([len(line) for line in turned]), labels

        return [one() for _ in range(steps)]

    return Task(
        name="classify",
        title="N-to-1 classification",
        shape=f"{vocabulary} characters, GRU of {hidden}, {batch} lines of up to {longest} a step",
        tokens=batch,
        build=lambda _: Classifier(vocabulary, width, hidden),
        batches=batches,
        optimizer=adam,
    )


if __name__ == "__main__":
    main(task)
