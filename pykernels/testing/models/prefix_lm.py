"""A prefix language model: the prefix is read in both directions, what follows is predicted (Raffel et al., 2020).

Sinusoidal positions. Every row has its own prefix; only characters after it count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..text import Text
from ..training import Batch, Task
from .common import IGNORED, adam, continued, device_of, functions, next_token_loss, spelled, windows
from .transformer import Layer, sinusoidal_positions


class PrefixLM(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", sinusoidal_positions(length, width))
        self.layers = nn.ModuleList(Layer(functions, width, heads, pre_norm=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def logits(self, tokens: Tensor, prefix_length: Tensor) -> Tensor:
        x = self.token(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, causal=True, prefix_length=prefix_length)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, targets: Tensor, prefix_length: Tensor) -> Tensor:
        return next_token_loss(self.logits(tokens, prefix_length), targets)


def task(text: Text, small: bool = False) -> Task:
    characters = text.characters()
    vocabulary = len(characters.vocabulary)
    width, heads, layers, batch, length = (32, 2, 1, 3, 40) if small else (128, 4, 2, 8, 256)

    def batches(steps: int, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed + 1)
        made = []
        for tokens, targets in windows(characters.ids, batch, length)(steps, seed):
            prefix = torch.randint(1, length // 2, (batch,), generator=generator)
            # Within the prefix a token's successor is in sight: the first that counts is predicted from its last token.
            seen = torch.arange(length) < prefix[:, None] - 1
            made.append((tokens, targets.masked_fill(seen, IGNORED), prefix))
        return made

    def sample(model: PrefixLM, seed: int) -> list[tuple[str, str]]:
        given = length // 4
        ids = windows(characters.ids, 1, given, seed)(1)[0][0][0].to(device_of(model))
        prefix = torch.tensor([given], device=ids.device)
        made = continued(lambda tokens: model.logits(tokens, prefix), ids, length - given, length, seed)
        return [(spelled(characters, ids), spelled(characters, made))]

    return Task(
        name="prefix-lm",
        title="Prefix language model",
        shape=f"{vocabulary} characters, {layers} layers of {width}, {batch} x {length} a step",
        tokens=batch * length,
        functions=functions,
        build=lambda functions: PrefixLM(functions, vocabulary, width, heads, layers, length),
        batches=batches,
        optimizer=adam,
        sample=sample,
    )
