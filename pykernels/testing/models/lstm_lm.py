"""An LSTM language model over characters: embedding, two LSTM layers, linear (Hochreiter & Schmidhuber, 1997)."""

from __future__ import annotations

from torch import Tensor, nn

from ..text import Text
from ..training import Task
from .common import adam, continuation, next_token_loss, windows


class LSTMLanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.logits(tokens), targets)


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
        sample=continuation(characters, 2 * length),
    )
