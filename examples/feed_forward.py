"""A Transformer language model with each activation of the family in its feed-forward blocks (Shazeer, 2020), and how
gradients fare through depth: they vanish behind saturating activations and explode where weights are too large.

--plot FILE draws the loss curves of all activations in one plot, and below it the norm of the gradient that
reaches each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _common import adam, functions, main, next_token_loss, windows
from _curves import HEIGHT, page, panel
from pykernels.testing.models.transformer import Attention
from pykernels.testing.text import Text
from pykernels.testing.training import Kind, Outcome, Task

PLAIN = ("sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "swish")
GATED = ("glu", "reglu", "geglu", "geglu_tanh", "swiglu", "bilinear")


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))); a gated unit has two thirds of the hidden width, so that all have as many weights."""

    def __init__(self, functions: Any, width: int, activation: str) -> None:
        super().__init__()
        hidden = 4 * width * 2 // 3 if activation in GATED else 4 * width
        self.fc1 = nn.Linear(width, 2 * hidden if activation in GATED else hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.mlp, self.activation = functions.mlp, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.activation)


class LanguageModel(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, layers: int, length: int, activation: str) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.attention = nn.ModuleList(Attention(functions, width, 2) for _ in range(layers))
        self.feed_forward = nn.ModuleList(FeedForward(functions, width, activation) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for i, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward, strict=True)):
            x = x + attention(self.norms[2 * i](x), causal=True)
            x = x + feed_forward(self.norms[2 * i + 1](x))
        return next_token_loss(self.head(self.norms[-1](x)), targets)


def with_activation(activation: str) -> Callable[[Text, bool], Task]:
    def task(text: Text, small: bool = False) -> Task:
        characters = text.characters()
        vocabulary = len(characters.vocabulary)
        width, layers, batch, length = (24, 1, 2, 24) if small else (96, 2, 8, 128)
        return Task(
            name=f"feed-forward-{activation}",
            title=f"Transformer, {activation}",
            shape=f"{vocabulary} characters, {layers} layers of {width}, {batch} x {length} a step",
            tokens=batch * length,
            functions=functions,
            build=lambda functions: LanguageModel(functions, vocabulary, width, layers, length, activation),
            batches=windows(characters.ids, batch, length),
            optimizer=adam,
        )

    return task


task_gelu, task_swiglu = with_activation("gelu"), with_activation("swiglu")


class Deep(nn.Module):
    """Many layers without residuals and norms, from the last characters to the next one (Bengio et al., 2003).

    gain: the weights' standard deviation is gain / sqrt(width): 1 keeps a linear layer's signal, sqrt(2) a ReLU's.
    """

    def __init__(self, functions: Any, vocabulary: int, width: int, depth: int, activation: str, gain: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)
        self.fused, self.activation = functions.bias_activation_dropout, activation
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=gain / width**0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens).sum(-2) / tokens.shape[-1] ** 0.5
        self.inputs = []
        for layer in self.layers:
            x.retain_grad()
            self.inputs.append(x)
            x = self.fused(x @ layer.weight.t(), layer.bias, self.activation)
        return next_token_loss(self.head(x), targets)


DEPTHS = {  # name in the plot -> activation and gain
    "sigmoid": ("sigmoid", 1.0),
    "tanh": ("tanh", 1.0),
    "tanh, weights x3": ("tanh", 3.0),
    "relu": ("relu", 2**0.5),
    "gelu": ("gelu", 2**0.5),
    "silu": ("silu", 2**0.5),
    "elu": ("elu", 1.2),
    "relu, weights x2": ("relu", 2 * 2**0.5),
}


def gradient_norms(text: Text, small: bool, kind: Kind, seed: int = 0) -> dict[str, list[float]]:
    """The norm of the loss's gradient at each layer's input, from the first layer to the last, before any training."""
    characters = text.characters()
    width, depth, batch = (32, 16, 32) if small else (128, 32, 128)
    ((tokens, targets),) = windows(characters.ids, batch, 8, seed)(1)
    found = {}
    for name, (activation, gain) in DEPTHS.items():
        torch.manual_seed(seed)
        model = Deep(functions(kind), len(characters.vocabulary), width, depth, activation, gain)
        model(tokens, targets[:, -1]).mean().backward()
        found[name] = [float(x.grad.norm()) for x in model.inputs]
    return found


def plot(outcomes: list[Outcome], text: Text, small: bool) -> str:
    losses = {outcome.task.title.split(", ")[1]: outcome.ours.losses for outcome in outcomes}
    norms = gradient_norms(text, small, "pykernels")
    for name, values in norms.items():
        print(f"gradient at the first layer / at the last: {values[0] / max(values[-1], 1e-30):8.1e}  {name}")
    return page([
        panel(losses, "Training loss, one line an activation", "step"),
        panel(norms, "Norm of the gradient at each layer's input, without residuals", "layer", log=True, top=HEIGHT),
    ])  # fmt: skip


if __name__ == "__main__":
    main(*map(with_activation, (*PLAIN, *GATED)), plot=plot)
