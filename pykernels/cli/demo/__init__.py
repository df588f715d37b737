"""`pykernels demo`: three small language models on real text, trained with stock PyTorch and with pykernels."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from ...testing import machine
from ...testing.text import TextError, default_text, read_text
from ...testing.training import train_both
from .._output import BadInput, console, json_option, print_json, progress
from . import report, table
from .tasks import make_tasks


@click.command("demo", epilog="Example: pykernels demo --text book.txt --steps 300 --report book.html")
@click.option(
    "--text", "path", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text. Default: Python's own prose."
)
@click.option(
    "--steps", type=click.IntRange(min=2), default=150, show_default=True, help="Training steps of each model."
)
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default="demo.html",
    show_default=True,
    help="The page with the plots.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
def command(path: Path | None, steps: int, report_path: Path, device: str, seed: int, as_json: bool) -> None:
    """Train three small language models twice and compare.

    Skip-gram with negative sampling, an LSTM and a GPT learn from real text, once as stock PyTorch models and once
    patched by pykernels: same seed, same parameters, same batches, one thread. Prints losses, speed and memory side by
    side, ratios below 1 included, and writes them with plots to one HTML page that loads nothing.

    Exit code 1 when the losses differ by more than rounding; 2 when the text or an option is unusable.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here")
    if not report_path.absolute().parent.is_dir():
        raise BadInput(f"--report {report_path}: there is no folder {report_path.parent}")
    try:
        text = read_text(path) if path else default_text()
    except TextError as error:
        raise BadInput(str(error)) from error
    jobs = make_tasks(text, seed=seed)
    outcomes = []
    with progress(2 * steps * len(jobs)) as advance:
        for task in jobs:
            advance(0, f"training {task.name}")
            outcomes.append(train_both(task, steps, device, seed, advance))

    here = machine.describe()
    facts = [
        f"Text: {text.source}, {len(text.content):,} characters.",
        f"{steps} steps a model, seed {seed}, device {device}, one thread.",
        *here.lines(),
    ]
    try:
        report_path.write_text(report.page(outcomes, facts), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--report {report_path}: cannot be written: {error.strerror}") from error
    equal = all(outcome.equal for outcome in outcomes)
    if as_json:
        results = [table.as_json(outcome) for outcome in outcomes]
        options = {"text": text.source, "steps": steps, "seed": seed, "device": device}
        print_json(
            {"equal": equal, "models": results, **options, "machine": here.as_dict(), "report": str(report_path)}
        )
    else:
        out = console()
        table.show(out, outcomes)
        out.print(f"Plots: {report_path}", soft_wrap=True)
    raise SystemExit(0 if equal else 1)
