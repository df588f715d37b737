"""The page of one training, alone or beside stock PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ...testing.training import Outcome, Task
from .._page import document
from .._plot import Series, lines
from ..demo.report import page

Samples = Sequence[tuple[str, str]]


def compared(outcome: Outcome, made: Mapping[str, Samples], facts: list[str]) -> str:
    """Both sides; `made`: side -> its samples."""
    more = "".join(_samples(samples, side) for side, samples in made.items())
    return page([outcome], facts, f"{outcome.task.title}, trained twice", more)


def alone(task: Task, losses: list[float], made: Samples, facts: list[str]) -> str:
    """The loss curve and the samples."""
    curve = lines([Series("pykernels", losses)], f"Loss of {task.name} against the training step", width=680)
    body = (
        f'<p class="quiet">{escape(task.shape)}</p><h2>Loss by step</h2><div style="max-width:760px">{curve}</div>'
        f"<p>{losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}.</p>{_samples(made)}"
    )
    return document("pykernels", task.title, body, facts)


def _samples(made: Samples, side: str = "") -> str:
    rows = "".join(f"<tr><td>{escape(given)}</td><td>{escape(found)}</td></tr>" for given, found in made)
    head = f"What {escape(side) or 'the model'} makes of it"
    return (
        f"<h2>{head}</h2><div class='scroll'><table class='left' style='white-space:pre-wrap'><thead><tr><th>given</th>"
        f"<th>made</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
