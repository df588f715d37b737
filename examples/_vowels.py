"""A sequence-to-sequence task that any text gives: a line without its vowels in, the line out."""

from __future__ import annotations

import torch

from _common import IGNORED, lines, pad, pick
from pykernels.testing.text import Text
from pykernels.testing.training import Batch

VOWELS = frozenset("aeiouAEIOU")


class Lines:
    """Batches (source (B, S), source lengths (B,), decoder input (B, T), targets (B, T)) of ragged lines.

    The decoder input is the target moved right by one, behind a start mark, which is also the padding.
    """

    def __init__(self, text: Text, batch: int, longest: int) -> None:
        tokens = text.characters()
        self.start = len(tokens.vocabulary)
        self.vocabulary = self.start + 1
        self.batch, self.lines = batch, lines(text, tokens, longest)
        self.vowels = torch.tensor([character in VOWELS for character in tokens.vocabulary])

    def batches(self, steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        return [self._batch(pick(self.lines, self.batch, generator)) for _ in range(steps)]

    def _batch(self, chosen: list[torch.Tensor]) -> Batch:
        start = torch.tensor([self.start])
        # A line of vowels alone would leave nothing: the start mark stands for it.
        sources = [kept if len(kept := line[~self.vowels[line]]) else start for line in chosen]
        lengths = torch.tensor([len(source) for source in sources])
        inputs = [torch.cat([start, line[:-1]]) for line in chosen]
        return pad(sources, self.start), lengths, pad(inputs, self.start), pad(chosen, IGNORED)
