"""A small DLRM (Naumov et al., 2019) on click-like data: multi-hot tables, pairwise interaction, row-wise Adagrad.

The data is made of a text: the "click" is whether the next word is a frequent one. Its numbers are lengths and ranks of
the last words, its categories are bags: the last words, the letters of the last word, and its hashed letter triples.
With pykernels the tables' backward and their optimizer step are one fused update, which never makes a gradient.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..text import Text
from ..training import Batch, Task
from .common import device_of, functions

FREQUENT, HASHES, NUMBERS = 50, 1000, 4


class DLRM(nn.Module):
    def __init__(self, functions: Any, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.functions, self.width = functions, width
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(size, width) * size**-0.5) for size in sizes)
        self.bottom = nn.Sequential(nn.Linear(NUMBERS, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        features = len(sizes) + 1
        self.top = nn.Sequential(nn.Linear(width + features * (features - 1) // 2, 64), nn.ReLU(), nn.Linear(64, 1))

    def logits(self, numbers: Tensor, *bags: Tensor) -> Tensor:
        dense = self.bottom(numbers.to(self.top[0].weight.dtype))
        pooled = self.functions.embedding_bag_multi(bags[0::2], bags[1::2], list(self.tables))
        x = self.functions.dot_interaction(dense, pooled.view(len(dense), -1, self.width))
        return self.top(x).squeeze(1)

    def forward(self, numbers: Tensor, clicks: Tensor, *bags: Tensor) -> Tensor:
        x = self.logits(numbers, *bags)
        return F.binary_cross_entropy_with_logits(x, clicks.to(x.dtype), reduction="none")


class Together:
    """Two optimizers as one: the tables' and the layers'."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def optimizer(model: Any) -> Any:
    layers = [*model.bottom.parameters(), *model.top.parameters()]
    return Together(
        model.functions.RowWiseAdagrad(model.tables.parameters(), lr=0.05), torch.optim.Adam(layers, lr=1e-3)
    )


def ragged(bags: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids, offsets) of bags of any length, empty ones too."""
    lengths = torch.tensor([0, *(len(bag) for bag in bags)])
    return torch.tensor([i for bag in bags for i in bag], dtype=torch.int64), lengths.cumsum(0)[:-1]


def task(text: Text, small: bool = False, width: int = 32, batch: int = 1024) -> Task:
    words = text.words()
    alphabet = {letter: i for i, letter in enumerate(sorted(set("".join(words.vocabulary))))}
    width, batch, most = (8, 16, 4) if small else (width, batch, 20)
    sizes = (len(words.vocabulary), len(alphabet), HASHES)
    ids = words.ids.tolist()

    def event(at: int, length: int) -> tuple[list[float], int, list[int], list[int], list[int]]:
        recent = ids[at - length : at]
        last = words.vocabulary[ids[at - 1]]
        triples = [zlib.crc32(last[i : i + 3].encode()) % HASHES for i in range(len(last) - 2)]
        rank = ids[at - 1] / len(words.vocabulary)
        lengths = [len(words.vocabulary[i]) / 10 for i in ids[at - 3 : at]]
        return [*lengths, rank], int(ids[at] < FREQUENT), recent, [alphabet[letter] for letter in last], triples

    def events(places: list[int], lengths: list[int]) -> Batch:
        numbers, clicks, *bags = zip(*(event(*where) for where in zip(places, lengths, strict=True)), strict=True)
        flat = (part for bag in bags for part in ragged(list(bag)))
        return torch.tensor(numbers), torch.tensor(clicks), *flat

    def batches(steps: int, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)

        def one() -> Batch:
            places = torch.randint(most, len(ids), (batch,), generator=generator).tolist()
            return events(places, torch.randint(most + 1, (batch,), generator=generator).tolist())

        return [one() for _ in range(steps)]

    @torch.no_grad()
    def sample(model: DLRM, seed: int) -> list[tuple[str, str]]:
        """The words before a place, and the probability of a click there."""
        places = torch.randint(most, len(ids), (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        numbers, clicks, *bags = (x.to(device_of(model)) for x in events(places, [most] * 5))
        odds = model.logits(numbers, *bags).sigmoid().tolist()
        return [
            (
                " ".join(words.vocabulary[i] for i in ids[at - 4 : at]),
                f"click {chance:.2f}, {'was' if click else 'was not'} one: {words.vocabulary[ids[at]]}",
            )
            for at, chance, click in zip(places, odds, clicks.tolist(), strict=True)
        ]

    return Task(
        name="dlrm",
        title="DLRM",
        shape=f"tables of {', '.join(map(str, sizes))} x {width}, {batch} events a step",
        tokens=batch,
        functions=functions,
        build=lambda functions: DLRM(functions, sizes, width),
        batches=batches,
        optimizer=optimizer,
        sample=sample,
    )
