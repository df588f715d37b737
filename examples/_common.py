"""What the examples share: the command line, functions that torch lacks, and batches cut from a text."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels
from pykernels.testing import stock
from pykernels.testing.text import Text, TextError, Tokens, default_text, read_text
from pykernels.testing.training import Batch, Kind, Outcome, Task, train_both

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


def windows(ids: Tensor, batch: int, length: int, seed: int = 0) -> Callable[[int], list[Batch]]:
    """Number of steps -> that many batches of random windows and the same windows one token on, both (B, L)."""

    def batches(steps: int) -> list[Batch]:
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


def main(*tasks: Callable[[Text, bool], Task], plot: Callable[[list[Outcome], Text, bool], str] | None = None) -> None:
    """The script: trains each task twice, stock PyTorch and pykernels in turns, and prints what came out.

    plot: makes an SVG of the outcomes, which `--plot FILE` writes.

    Exit code 1 where the two trainings differ by more than rounding, 2 for a text that cannot be used.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose that Python ships)")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each model (default: 100)")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a quick look")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as SVG")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    try:
        text = read_text(options.text) if options.text else default_text()
        made = [task(text, options.small) for task in tasks]
    except TextError as error:
        parser.error(str(error))
    outcomes = [show(train_both(task, options.steps)) for task in made]
    if plot and options.plot:
        options.plot.write_text(plot(outcomes, text, options.small), encoding="utf-8")
    raise SystemExit(0 if all(outcome.equal for outcome in outcomes) else 1)


def show(outcome: Outcome) -> Outcome:
    """Prints one task's losses, verdicts, speed and memory."""
    task = outcome.task
    print(f"{task.title} ({task.shape})")
    for name, side in (("stock PyTorch", outcome.stock), ("pykernels", outcome.ours)):
        rate = f"{outcome.rate(side):,.0f} targets a second"
        print(f"  {name:14} loss {side.losses[0]:.5f} -> {side.losses[-1]:.5f}, {rate}, peak {side.peak >> 10} KiB")
        if side.evaluation is not None:
            print(f"  {name:14} evaluated: {side.evaluation:.5f}")
    for check, passed in outcome.checks.items():
        print(f"  {check}: {'equal' if passed else 'DIFFERENT'}")
    if outcome.equal:
        median, low, high = outcome.speed_ratio
        print(f"  speed ratio {median:.2f} ({low:.2f}-{high:.2f}), memory ratio {outcome.memory_ratio:.2f}")
    return outcome
