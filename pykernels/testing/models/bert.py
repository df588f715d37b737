"""A BERT-style masked language model over words: bidirectional, padded lines, learned positions (Devlin et al., 2019).

Of the words of a line 15% are to be predicted; of those 80% are replaced by a mask, 10% by a random word, 10% are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..text import Text
from ..training import Batch, Task
from .common import IGNORED, adam, device_of, functions, next_token_loss, pad
from .transformer import Layer


class BERT(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(functions, width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def vectors(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(B, L) and which places are not padding -> the vector of each word, (B, L, width)."""
        x = self.norm(self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device)))
        for layer in self.layers:
            x = layer(x, key_padding_mask=real)
        return x

    def logits(self, tokens: Tensor, real: Tensor) -> Tensor:
        return self.head(self.vectors(tokens, real))

    def forward(self, tokens: Tensor, real: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.logits(tokens, real), targets)


def masked_lines(ids: Tensor, words: int, batch: int, longest: int, generator: torch.Generator) -> Batch:
    """(tokens, real, targets), each (B, L): runs of random length out of the text, words hidden as in the paper."""
    starts = torch.randint(len(ids) - longest, (batch,), generator=generator).tolist()
    lengths = torch.randint(longest // 4, longest + 1, (batch,), generator=generator).tolist()
    sequences = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    tokens, real = pad(sequences, 0), pad([torch.ones_like(s, dtype=torch.bool) for s in sequences], False)
    chosen = (torch.rand(tokens.shape, generator=generator) < 0.15) & real
    chosen[:, 0] = True  # every line has a word to predict
    fate = torch.rand(tokens.shape, generator=generator)
    random = torch.randint(words, tokens.shape, generator=generator)
    hidden = torch.where(fate < 0.8, words, torch.where(fate < 0.9, random, tokens))
    return torch.where(chosen, hidden, tokens), real, torch.where(chosen, tokens, IGNORED)


def task(text: Text, small: bool = False) -> Task:
    words = text.words()
    count = len(words.vocabulary)  # one more id is the mask
    width, heads, layers, batch, length = (32, 2, 1, 3, 24) if small else (128, 4, 2, 32, 64)

    def batches(steps: int, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        return [masked_lines(words.ids, count, batch, length, generator) for _ in range(steps)]

    @torch.no_grad()
    def sample(model: BERT, seed: int) -> list[tuple[str, str]]:
        """Lines with words missing, and the words the model puts there."""
        tokens, real, _ = masked_lines(words.ids, count, 3, length, torch.Generator().manual_seed(seed))
        device = device_of(model)
        guesses = model.logits(tokens.to(device), real.to(device))[..., :count].argmax(-1).cpu()
        lines = []
        for row, guess, size in zip(tokens, guesses, real.sum(1).tolist(), strict=True):
            missing = row[:size] == count
            given = ["___" if gap else words.vocabulary[i] for i, gap in zip(row.tolist(), missing, strict=False)]
            lines.append((" ".join(given), ", ".join(words.vocabulary[i] for i in guess[:size][missing].tolist())))
        return lines

    return Task(
        name="bert",
        title="BERT-style masked language model",
        shape=f"{count} words, {layers} layers of {width}, {batch} lines of up to {length} a step",
        tokens=batch * length,
        functions=functions,
        build=lambda functions: BERT(functions, count + 1, width, heads, layers, length),
        batches=batches,
        optimizer=adam,
        sample=sample,
    )
