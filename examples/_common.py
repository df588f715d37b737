"""What the examples share: the command line, and the parts of pykernels.testing.models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pykernels.testing.models.common import IGNORED, adam, functions, lines, next_token_loss, pad, pick, windows
from pykernels.testing.text import Text, TextError, default_text, read_text
from pykernels.testing.training import Outcome, Task, train_both

__all__ = ["IGNORED", "adam", "functions", "lines", "main", "next_token_loss", "pad", "pick", "windows"]


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
