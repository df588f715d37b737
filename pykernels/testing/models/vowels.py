"""A sequence-to-sequence task that any text gives: a line without its vowels in, the line out."""

from __future__ import annotations

from typing import Any

import torch

from ..text import Text
from ..training import Batch
from .common import IGNORED, device_of, lines, pad, pick, spelled

VOWELS = frozenset("aeiouAEIOU")


class Lines:
    """Batches (source (B, S), source lengths (B,), decoder input (B, T), targets (B, T)) of ragged lines.

    The decoder input is the target moved right by one, behind a start mark, which is also the padding.
    """

    def __init__(self, text: Text, batch: int, longest: int) -> None:
        self.tokens = tokens = text.characters()
        self.start = len(tokens.vocabulary)
        self.vocabulary = self.start + 1
        self.batch, self.lines = batch, lines(text, tokens, longest)
        self.vowels = torch.tensor([character in VOWELS for character in tokens.vocabulary])

    def batches(self, steps: int, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        return [self._batch(pick(self.lines, self.batch, generator)) for _ in range(steps)]

    def _batch(self, chosen: list[torch.Tensor]) -> Batch:
        start = torch.tensor([self.start])
        # A line of vowels alone would leave nothing: the start mark stands for it.
        sources = [kept if len(kept := line[~self.vowels[line]]) else start for line in chosen]
        lengths = torch.tensor([len(source) for source in sources])
        inputs = [torch.cat([start, line[:-1]]) for line in chosen]
        return pad(sources, self.start), lengths, pad(inputs, self.start), pad(chosen, IGNORED)

    @torch.no_grad()
    def sample(self, model: Any, seed: int) -> list[tuple[str, str]]:
        """Lines without vowels, and as many characters as the line has, each the likeliest after those before it."""
        device, pairs = device_of(model), []
        for line in pick(self.lines, 3, torch.Generator().manual_seed(seed)):
            source, lengths, _, _ = (x.to(device) for x in self._batch([line]))
            ids = torch.tensor([[self.start]], device=device)
            for _ in range(len(line)):
                likeliest = model.logits(source, lengths, ids)[:, -1:, : self.start].argmax(-1)
                ids = torch.cat([ids, likeliest], 1)
            kept = source[0][source[0] != self.start]
            pairs.append((spelled(self.tokens, kept), spelled(self.tokens, ids[0, 1:])))
        return pairs
