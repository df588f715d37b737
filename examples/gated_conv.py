"""A gated convolutional language model: causal dilated convolutions, gated linear units, residuals and skip connections
(Dauphin et al., 2017; van den Oord et al., 2016).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _common import adam, functions, main, next_token_loss, windows
from pykernels.testing.text import Text
from pykernels.testing.training import Task


class Layer(nn.Module):
    """y = GLU(causal convolution of x); x + out(y) goes on, skip(y) straight to the end."""

    def __init__(self, width: int, dilation: int, kernel: int = 2) -> None:
        super().__init__()
        self.reach = dilation * (kernel - 1)
        self.convolution = nn.Conv1d(width, 2 * width, kernel, dilation=dilation)
        self.glu = nn.GLU(1)  # both halves of the convolution's output are read in place
        self.out, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.glu(self.convolution(F.pad(x, (self.reach, 0))))  # padded on the left: no step sees a later one
        return x + self.out(y), self.skip(y)


class GatedConvolutions(nn.Module):
    def __init__(self, vocabulary: int, width: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, dilation) for dilation in dilations)
        self.end = nn.Sequential(nn.GELU(), nn.Linear(width, vocabulary))

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens).transpose(1, 2)
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.end(total.transpose(1, 2))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.logits(tokens), targets)


def task(text: Text, small: bool = False) -> Task:
    characters = text.characters()
    vocabulary = len(characters.vocabulary)
    width, rounds, top, batch, length = (24, 1, 3, 2, 40) if small else (128, 2, 6, 8, 256)
    dilations = tuple(2**i for _ in range(rounds) for i in range(top))

    def build(functions: Any) -> nn.Module:
        return GatedConvolutions(vocabulary, width, dilations)

    return Task(
        name="gated-conv",
        title="Gated convolutions",
        shape=f"{vocabulary} characters, {len(dilations)} layers of {width}, {sum(dilations) + 1} characters in sight, "
        f"{batch} x {length} a step",
        tokens=batch * length,
        functions=functions,
        build=build,
        batches=windows(characters.ids, batch, length),
        optimizer=adam,
    )


if __name__ == "__main__":
    main(task)
