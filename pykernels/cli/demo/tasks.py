"""The demo's three trainings as data: model, batches, optimizer, and the operators each one calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing.text import Text, Tokens
from ...testing.training import Batch, Call, Task
from .models import GPT, LSTMLanguageModel, SkipGram, negative_sampling_loss


@dataclass(frozen=True)
class Sizes:
    """How large the three models and their batches are."""

    skipgram_width: int = 100
    skipgram_batch: int = 4096
    negatives: int = 5
    window: int = 5
    batch: int = 16
    lstm_length: int = 64
    lstm_width: int = 64
    lstm_hidden: int = 256
    gpt_batch: int = 8
    gpt_length: int = 128
    gpt_width: int = 128
    gpt_heads: int = 4
    gpt_layers: int = 2


TINY = Sizes(8, 64, 3, 2, 2, 8, 8, 16, 2, 16, 16, 2, 1)


def make_tasks(text: Text, sizes: Sizes | None = None, seed: int = 0) -> list[Task]:
    """The three tasks over `text`; batches depend on `seed` only."""
    sizes = sizes or Sizes()
    words, characters = text.words(), text.characters()
    return [_skipgram(words, sizes, seed), _lstm(characters, sizes, seed), _gpt(characters, sizes, seed)]


def _skipgram(words: Tokens, s: Sizes, seed: int) -> Task:
    vocabulary = len(words.vocabulary)
    noise = words.counts() ** 0.75

    def batches(steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)

        def one() -> Batch:
            at = torch.randint(s.window, len(words.ids) - s.window, (s.skipgram_batch,), generator=generator)
            offset = torch.randint(1, s.window + 1, at.shape, generator=generator)
            offset *= 2 * torch.randint(2, at.shape, generator=generator) - 1
            negatives = torch.multinomial(noise, s.skipgram_batch * s.negatives, replacement=True, generator=generator)
            return words.ids[at], words.ids[at + offset], negatives.view(-1, s.negatives)

        return [one() for _ in range(steps)]

    def calls(model: Any) -> list[Call]:
        center, context, negatives = batches(1)[0]
        x = model.word.weight.detach()[center]
        return [
            ("embedding", (center, model.word.weight), {}),
            ("negative_sampling_loss", (x, model.context, context, negatives), {}),
        ]

    return Task(
        name="skip-gram",
        title="Skip-gram with negative sampling",
        shape=f"{vocabulary} words x {s.skipgram_width}, {s.skipgram_batch} pairs a step, {s.negatives} negatives",
        tokens=s.skipgram_batch,
        functions=negative_sampling_loss,
        build=lambda loss: SkipGram(loss, vocabulary, s.skipgram_width),
        batches=batches,
        # A rate per element: frequent and rare words get gradients of very different sizes from a mean over the batch.
        optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
        calls=calls,
    )


def _windows(ids: Tensor, batch: int, length: int, seed: int) -> Callable[[int], list[Batch]]:
    """Random windows of a token stream, and the same windows one token on."""

    def batches(steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - length, (steps, batch, 1), generator=generator)
        windows = ids[starts + torch.arange(length + 1)]
        return [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in windows]

    return batches


def _lstm(characters: Tokens, s: Sizes, seed: int) -> Task:
    vocabulary = len(characters.vocabulary)

    def calls(model: Any) -> list[Call]:
        tokens = torch.zeros(s.batch, s.lstm_length, dtype=torch.int64)
        x = torch.zeros(s.batch, s.lstm_length, s.lstm_width)
        h = torch.zeros(1, s.batch, s.lstm_hidden)
        weights = [parameter.detach() for parameter in model.lstm.parameters()]
        return [
            ("embedding", (tokens, model.embedding.weight), {}),
            ("lstm", (x, (h, h), weights), {"batch_first": True}),
        ]

    return Task(
        name="LSTM",
        title="LSTM language model",
        shape=f"{vocabulary} characters, hidden {s.lstm_hidden}, {s.batch} x {s.lstm_length} a step",
        tokens=s.batch * s.lstm_length,
        build=lambda _: LSTMLanguageModel(vocabulary, s.lstm_width, s.lstm_hidden),
        batches=_windows(characters.ids, s.batch, s.lstm_length, seed),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
        calls=calls,
    )


def _gpt(characters: Tokens, s: Sizes, seed: int) -> Task:
    vocabulary = len(characters.vocabulary)

    def calls(model: Any) -> list[Call]:
        tokens = torch.zeros(s.gpt_batch, s.gpt_length, dtype=torch.int64)
        q = torch.zeros(s.gpt_batch, s.gpt_heads, s.gpt_length, s.gpt_width // s.gpt_heads)
        hidden = torch.zeros(s.gpt_batch, s.gpt_length, 4 * s.gpt_width)
        return [
            ("embedding", (tokens, model.token.weight), {}),
            ("scaled_dot_product_attention", (q, q, q), {"is_causal": True}),
            ("gelu", (hidden,), {}),
        ]

    return Task(
        name="GPT",
        title="GPT, a pre-norm decoder",
        shape=f"{vocabulary} characters, {s.gpt_layers} layers of {s.gpt_width}, {s.gpt_batch} x {s.gpt_length} a step",
        tokens=s.gpt_batch * s.gpt_length,
        build=lambda _: GPT(vocabulary, s.gpt_width, s.gpt_heads, s.gpt_layers, s.gpt_length),
        batches=_windows(characters.ids, s.gpt_batch, s.gpt_length, seed),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
        calls=calls,
    )
