"""An LSTM language model over characters: embedding, two LSTM layers, linear (Hochreiter & Schmidhuber, 1997)."""

from __future__ import annotations

from torch import Tensor, nn

from _common import adam, main, next_token_loss, windows
from pykernels.testing.text import Text
from pykernels.testing.training import Task


class LSTMLanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.head(self.lstm(self.embedding(tokens))[0]), targets)


def task(text: Text, small: bool = False) -> Task:
    characters = text.characters()
    vocabulary = len(characters.vocabulary)
    width, hidden, batch, length = (16, 24, 3, 20) if small else (64, 256, 32, 64)
    return Task(
        name="lstm-lm",
        title="LSTM language model",
        shape=f"{vocabulary} characters, 2 layers of {hidden}, {batch} x {length} a step",
        tokens=batch * length,
        build=lambda _: LSTMLanguageModel(vocabulary, width, hidden),
        batches=windows(characters.ids, batch, length),
        optimizer=adam,
    )


if __name__ == "__main__":
    main(task)
