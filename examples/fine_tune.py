"""A BERT pretrained on gaps, then fine-tuned (Devlin et al., 2019): a label of a line from its first token, a label of
each token, the start and end of a span; and with adapters between frozen layers (Houlsby et al., 2019).

The labels are made of the text: whether a line has a certain word, whether a word stands behind one of the ten most
frequent, and where a span of names was put.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels
from _common import IGNORED, adam, main, next_token_loss, pad
from pykernels.testing.models import bert
from pykernels.testing.models.bert import BERT
from pykernels.testing.models.common import functions
from pykernels.testing.text import Text
from pykernels.testing.training import Batch, Task

PRETRAINING = 60  # steps
NAMES = (200, 250)
Shape = tuple[int, int, int, int, int]  # vocabulary with the mask, width, heads, layers, longest line


class Adapter(nn.Module):
    """A layer, and behind it a bottleneck that starts as the identity."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.bottleneck = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, width))
        nn.init.zeros_(self.bottleneck[2].weight)
        nn.init.zeros_(self.bottleneck[2].bias)

    def forward(self, x: Tensor, **mask: Tensor) -> Tensor:
        x = self.layer(x, **mask)
        return x + self.bottleneck(x)


class FineTuned(nn.Module):
    """The pretrained body and a linear head with two outputs a token; `kind`: first, token or span."""

    def __init__(self, functions: Any, shape: Shape, body: dict[str, Tensor], kind: str, adapters: bool) -> None:
        super().__init__()
        self.kind, width = kind, shape[1]
        self.body, self.head = BERT(functions, *shape), nn.Linear(width, 2)
        self.body.load_state_dict(body)
        if adapters:
            self.body.requires_grad_(False)
            self.body.layers = nn.ModuleList(Adapter(layer, width) for layer in self.body.layers)

    def forward(self, tokens: Tensor, real: Tensor, targets: Tensor) -> Tensor:
        scores = self.head(self.body.vectors(tokens, real))
        if self.kind == "first":
            return F.cross_entropy(scores[:, 0], targets, reduction="none")
        if self.kind == "token":
            return next_token_loss(scores, targets)
        places = scores.masked_fill(~real[..., None], -torch.inf).transpose(1, 2)  # (B, start and end, L)
        return F.cross_entropy(places.flatten(0, 1), targets.flatten(), reduction="none")


@functools.cache
def pretrained(text: Text, small: bool) -> dict[str, Tensor]:
    """The weights after some steps of masked words."""
    task = bert.task(text, small)
    torch.manual_seed(0)
    model = task.build(functions("pykernels"))
    pykernels.patch(model)
    optimizer = task.optimizer(model)
    for batch in task.batches(PRETRAINING // 6 if small else PRETRAINING):
        optimizer.zero_grad()
        model(*batch).mean().backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Labels:
    """Lines behind the mark, which stands for the whole of them, and their labels; ids are ranks, 0 the most frequent.

    first: whether the line has a certain word, about as often as not. token: whether the word stands behind one of the
    ten most frequent. span: first and last place of some words of NAMES, put in the place of others.
    """

    def __init__(self, ids: Tensor, mark: int, longest: int) -> None:
        self.ids, self.mark, self.longest = ids, mark, longest
        even = 1 - 0.5 ** (4 / (3 * longest))  # a word this frequent is in every second line
        self.word = int((torch.bincount(ids) / len(ids) - even).abs().argmin())

    def one(self, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def draw(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high, size, generator=generator)

        start, length = int(draw(0, len(self.ids) - self.longest)), int(draw(self.longest // 2, self.longest))
        line, first = self.ids[start : start + length], torch.tensor([self.mark])
        if kind == "first":
            return torch.cat([first, line]), (line == self.word).any().long()
        if kind == "token":
            behind = (line[:-1] < 10).long()
            return torch.cat([first, line]), torch.cat([torch.tensor([IGNORED, IGNORED]), behind])
        begin, size = int(draw(0, length - 4)), int(draw(2, 5))
        line = torch.cat([line[:begin], draw(*self.names(), size), line[begin + size :]])
        return torch.cat([first, line]), torch.tensor([begin + 1, begin + size])

    def names(self) -> tuple[int, int]:
        """The ranks of the words that make spans."""
        return min(NAMES[0], self.mark // 2), min(NAMES[1], self.mark)


def fine_tuning(kind: str, title: str, text: Text, small: bool, adapters: bool = False) -> Task:
    words = text.words()
    mark = len(words.vocabulary)
    width, heads, layers, batch, longest = (32, 2, 1, 8, 24) if small else (128, 4, 2, 32, 64)
    shape = (mark + 1, width, heads, layers, longest)
    labels_of = Labels(words.ids, mark, longest)

    def batches(steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)

        def one() -> Batch:
            pairs = [labels_of.one(kind, generator) for _ in range(batch)]
            lines, labels = zip(*pairs, strict=True)
            real = pad([torch.ones_like(line, dtype=torch.bool) for line in lines], False)
            return pad(list(lines), 0), real, pad(list(labels), IGNORED) if kind == "token" else torch.stack(labels)

        return [one() for _ in range(steps)]

    return Task(
        name=f"fine-tune-{kind}{'-adapters' if adapters else ''}",
        title=title,
        shape=f"{mark} words, {layers} layers of {width}, {batch} lines of up to {longest} a step",
        tokens=batch,
        functions=functions,
        build=lambda functions: FineTuned(functions, shape, pretrained(text, small), kind, adapters),
        batches=batches,
        optimizer=adam,
    )


def task_first(text: Text, small: bool = False) -> Task:
    return fine_tuning("first", "Fine-tuning, a label a line", text, small)


def task_token(text: Text, small: bool = False) -> Task:
    return fine_tuning("token", "Fine-tuning, a label a token", text, small)


def task_span(text: Text, small: bool = False) -> Task:
    return fine_tuning("span", "Fine-tuning, start and end of a span", text, small)


def task_adapters(text: Text, small: bool = False) -> Task:
    return fine_tuning("token", "Adapters, a label a token", text, small, adapters=True)


if __name__ == "__main__":
    main(task_first, task_token, task_span, task_adapters)
