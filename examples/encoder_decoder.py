"""An encoder-decoder Transformer as in the paper (Vaswani et al., 2017): it puts the vowels back into a line of text.

Post-norm layers, ReLU, sinusoidal positions, cross-attention that leaves out the padding of the source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from _common import adam, functions, main, next_token_loss
from pykernels.testing.models.transformer import Layer, sinusoidal_positions
from pykernels.testing.models.vowels import Lines
from pykernels.testing.text import Text
from pykernels.testing.training import Task


class Transformer(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", sinusoidal_positions(length, width))
        self.encoder = nn.ModuleList(Layer(functions, width, heads, "ReLU") for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(functions, width, heads, "ReLU", cross=True) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.positions[: tokens.shape[1]]

    def forward(self, source: Tensor, lengths: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        real = torch.arange(source.shape[1]) < lengths[:, None]
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory, key_padding_mask=real)
        x = self.embed(tokens)
        for layer in self.decoder:
            x = layer(x, memory, real, causal=True)
        return next_token_loss(self.head(x), targets)


def task(text: Text, small: bool = False) -> Task:
    width, heads, layers, batch, length = (32, 2, 1, 3, 24) if small else (128, 4, 2, 32, 64)
    data = Lines(text, batch, length)
    return Task(
        name="encoder-decoder",
        title="Encoder-decoder Transformer",
        shape=f"{data.vocabulary} characters, {layers} + {layers} layers of {width}, {batch} lines of up to {length}",
        tokens=batch * length,
        functions=functions,
        build=lambda functions: Transformer(functions, data.vocabulary, width, heads, layers, length),
        batches=data.batches,
        optimizer=adam,
    )


if __name__ == "__main__":
    main(task)
