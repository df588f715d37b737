"""What the commands share: results on stdout, progress on stderr, and the error that ends a command with code 2."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")


class BadInput(click.ClickException):
    """A one-line complaint about what the user gave; exit code 2."""

    exit_code = 2


def console(stderr: bool = False) -> Console:
    """Writes results to stdout (or stderr): as wide as the terminal, or 120 columns into a file or pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(highlight=False, stderr=stderr, width=None if stream.isatty() else 120)


def print_json(value: Any) -> None:
    """One JSON object on stdout; NaN and infinity, which JSON has not, become null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def progress(total: int | None) -> Iterator[Callable[..., None]]:
    """A bar with the time left on stderr; yields `advance(steps=1, what=None)`, `what` being done now.

    total: None where it is not known.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(steps: int = 1, what: str | None = None) -> None:
            bar.update(task, advance=steps, description=what)

        yield advance
