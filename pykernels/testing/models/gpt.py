"""A GPT: a causal Transformer decoder over characters, pre-norm with learned positions (Radford et al., 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..text import Text
from ..training import Task
from .common import adam, continuation, functions, next_token_loss, windows
from .transformer import Layer


class GPT(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(functions, width, heads, pre_norm=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.logits(tokens), targets)


def task(text: Text, small: bool = False) -> Task:
    characters = text.characters()
    vocabulary = len(characters.vocabulary)
    width, heads, layers, batch, length = (32, 2, 1, 2, 40) if small else (128, 4, 2, 8, 256)
    return Task(
        name="gpt",
        title="GPT",
        shape=f"{vocabulary} characters, {layers} layers of {width}, {batch} x {length} a step",
        tokens=batch * length,
        functions=functions,
        build=lambda functions: GPT(functions, vocabulary, width, heads, layers, length),
        batches=windows(characters.ids, batch, length),
        optimizer=adam,
        sample=continuation(characters, length),
    )
