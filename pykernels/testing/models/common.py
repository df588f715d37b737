"""What the models share: functions that torch lacks, losses, and batches cut from a text."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels

from .. import stock
from ..text import Text, TextError, Tokens
from ..training import Batch, Kind

FUNCTIONS = (
    "attention", "bias_activation_dropout", "dot_interaction", "embedding_bag_multi", "mlp", "negative_sampling_loss",
    "sampled_softmax_loss",
)  # fmt: skip
IGNORED = -100  # F.cross_entropy's mark of a target that does not count


def functions(kind: Kind) -> types.SimpleNamespace:
    """What torch.nn has no name for: written in stock PyTorch, or pykernels'. Modules go through `pykernels.patch`."""
    source = stock if kind == "torch" else pykernels.functional
    rowwise = stock.RowWiseAdagrad if kind == "torch" else pykernels.optim.RowWiseAdagrad
    return types.SimpleNamespace(RowWiseAdagrad=rowwise, **{name: getattr(source, name) for name in FUNCTIONS})


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each target that counts, (M,), from logits (..., V) and targets (...)."""
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return loss[targets.flatten() != IGNORED]


def windows(ids: Tensor, batch: int, length: int, seed: int = 0) -> Callable[..., list[Batch]]:
    """Number of steps -> that many batches of random windows and the same windows one token on, both (B, L)."""

    def batches(steps: int, seed: int = seed) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - length, (steps, batch, 1), generator=generator)
        found = ids[starts + torch.arange(length + 1)]
        return [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in found]

    return batches


def lines(text: Text, tokens: Tokens, longest: int, shortest: int = 8) -> list[Tensor]:
    """The text's lines as character ids, cut to `longest`; those under `shortest` characters are left out."""
    index = {character: i for i, character in enumerate(tokens.vocabulary)}
    stripped = (line.strip()[:longest] for line in text.content.splitlines())
    kept = [torch.tensor([index.get(c, len(index) - 1) for c in line]) for line in stripped if len(line) >= shortest]
    if not kept:
        raise TextError(f"{text.source}: no line has {shortest} characters or more")
    return kept


def pick(items: list[Any], count: int, generator: torch.Generator) -> list[Any]:
    """`count` items drawn with replacement."""
    return [items[i] for i in torch.randint(len(items), (count,), generator=generator).tolist()]


def pad(sequences: list[Tensor], value: int) -> Tensor:
    """Ragged sequences -> (B, longest), filled with `value` on the right."""
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def continued(logits: Callable[[Tensor], Tensor], ids: Tensor, count: int, window: int, seed: int) -> Tensor:
    """`count` ids that follow `ids` (L,), each drawn from the softmax after the `window` ids before it.

    logits: (1, L) -> (1, L, V).
    """
    generator = torch.Generator().manual_seed(seed)
    start = len(ids)
    for _ in range(count):
        odds = logits(ids[None, -window:])[0, -1].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator).to(ids.device)])
    return ids[start:]


def spelled(tokens: Tokens, ids: Tensor) -> str:
    """The characters, joined."""
    return "".join(tokens.vocabulary[i] for i in ids.tolist())


def continuation(tokens: Tokens, length: int) -> Callable[[Any, int], list[tuple[str, str]]]:
    """(model with `logits`, seed) -> a piece of the text, and how the model goes on: `length` characters in all."""

    def sample(model: Any, seed: int) -> list[tuple[str, str]]:
        given = length // 4
        ids = windows(tokens.ids, 1, given, seed)(1)[0][0][0].to(device_of(model))
        made = continued(model.logits, ids, length - given, length, seed)
        return [(spelled(tokens, ids), spelled(tokens, made))]

    return sample
