"""1 to N: a vector decoded into a sequence. A word's vector is the first state of an LSTM that spells the word."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from _common import IGNORED, adam, main, next_token_loss, pad
from pykernels.testing.text import Text
from pykernels.testing.training import Batch, Task


class Speller(nn.Module):
    def __init__(self, words: int, letters: int, width: int, hidden: int) -> None:
        super().__init__()
        self.word, self.letter = nn.Embedding(words, 2 * hidden), nn.Embedding(letters, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, letters)

    def forward(self, words: Tensor, letters: Tensor, targets: Tensor) -> Tensor:
        h0, c0 = self.word(words).chunk(2, -1)
        output, _ = self.lstm(self.letter(letters), (h0.unsqueeze(0).contiguous(), c0.unsqueeze(0).contiguous()))
        return next_token_loss(self.head(output), targets)


def task(text: Text, small: bool = False) -> Task:
    tokens = text.words()
    alphabet = sorted(set("".join(tokens.vocabulary)))
    index = {letter: i for i, letter in enumerate(alphabet)}
    mark = len(alphabet)  # starts and ends a word
    spelled = [torch.tensor([mark, *(index[letter] for letter in word), mark]) for word in tokens.vocabulary]
    width, hidden, batch = (12, 20, 5) if small else (32, 128, 128)

    def batches(steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)

        def one() -> Batch:
            words = torch.randint(len(spelled), (batch,), generator=generator)
            chosen = [spelled[word] for word in words.tolist()]
            return words, pad([word[:-1] for word in chosen], mark), pad([word[1:] for word in chosen], IGNORED)

        return [one() for _ in range(steps)]

    return Task(
        name="spell",
        title="1-to-N decoding",
        shape=f"{len(spelled)} words of {mark} letters, LSTM of {hidden}, {batch} words a step",
        tokens=batch,
        build=lambda _: Speller(len(spelled), mark + 1, width, hidden),
        batches=batches,
        optimizer=adam,
    )


if __name__ == "__main__":
    main(task)
