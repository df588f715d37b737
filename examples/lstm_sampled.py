"""An LSTM language model over words, trained with sampled softmax and evaluated with the full one.

A step looks at the logits of each word's successor and of a few hundred sampled words instead of the whole vocabulary
(Jean et al., 2015). The sample is drawn log-uniformly, which suits ids by descending frequency.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _common import adam, functions, main, windows
from pykernels.functional import log_uniform_candidate_sampler
from pykernels.testing.text import Text
from pykernels.testing.training import Batch, Task


class SampledLanguageModel(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.weight = nn.Parameter(torch.randn(vocabulary, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.loss = functions.sampled_softmax_loss

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.lstm(self.embedding(tokens))[0].flatten(0, 1)

    def forward(self, tokens: Tensor, targets: Tensor, *sample: Tensor) -> Tensor:
        labels, classes = targets.flatten(), len(self.weight)
        drawn = len(sample[0])
        x = self.hidden(tokens)
        return self.loss(self.weight, self.bias, labels, x, drawn, classes, 1, sample, reduction="none")

    @torch.no_grad()
    def full_loss(self, tokens: Tensor, targets: Tensor) -> float:
        """The mean cross entropy over all words: what the model is judged by."""
        logits = F.linear(self.hidden(tokens), self.weight, self.bias)
        return float(F.cross_entropy(logits, targets.flatten()))


def task(text: Text, small: bool = False) -> Task:
    words = text.words()
    vocabulary = len(words.vocabulary)
    width, hidden, batch, length, count = (12, 16, 3, 10, 40) if small else (64, 256, 32, 32, 512)
    cut = len(words.ids) * 9 // 10
    training, held_out = windows(words.ids[:cut], batch, length), windows(words.ids[cut:], batch, length, seed=1)(1)[0]

    def batches(steps: int) -> list[Batch]:
        return [
            (tokens, targets, *log_uniform_candidate_sampler(targets.view(-1, 1), 1, count, True, vocabulary, seed=i))
            for i, (tokens, targets) in enumerate(training(steps))
        ]

    return Task(
        name="lstm-sampled",
        title="LSTM language model with sampled softmax",
        shape=f"{vocabulary} words, {count} sampled, hidden {hidden}, {batch} x {length} a step",
        tokens=batch * length,
        functions=functions,
        build=lambda functions: SampledLanguageModel(functions, vocabulary, width, hidden),
        batches=batches,
        optimizer=adam,
        evaluate=lambda model: model.full_loss(*held_out),
    )


if __name__ == "__main__":
    main(task)
