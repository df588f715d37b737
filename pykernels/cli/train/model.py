"""`pykernels train lstm-lm|gpt|bert|...`: one command for each model of `pykernels.testing.models`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch

from ... import _backends
from ...testing import machine
from ...testing.models import TASKS
from ...testing.text import Text, TextError, default_text, read_text
from ...testing.training import Outcome, Task, train_both
from .._output import BadInput, console, json_option, print_json, progress
from ..demo import table
from . import report
from .loop import Training, digest, interruptible, stream

STEPS = 300
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
_BACKENDS = ["auto", *_backends.BACKENDS, "reference"]
_file = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True)
class Options:
    """What was asked for; see the command's options."""

    steps: int | None
    time: float | None
    size: str
    seed: int
    threads: int | None
    device: str
    backend: str | None
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool
    report: Path | None
    compare: bool
    as_json: bool

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: torch sees no CUDA device here")
        if self.resume and self.checkpoint is None:
            raise BadInput("--resume needs --checkpoint FILE")
        for name, path in (("checkpoint", self.checkpoint), ("report", self.report)):
            if path is not None and not path.absolute().parent.is_dir():
                raise BadInput(f"--{name} {path}: there is no folder {path.parent}")
        if self.checkpoint is not None and self.checkpoint.exists() and not self.resume:
            raise BadInput(f"--checkpoint {self.checkpoint}: exists; --resume goes on from it")
        if self.compare:
            for name, given in (("checkpoint", self.checkpoint), ("time", self.time)):
                if given is not None:
                    raise BadInput(f"--compare does not go with --{name}: both sides train the same steps in one go")
            if self.threads not in (None, 1):
                raise BadInput("--compare measures on one thread; leave --threads out")


def make(name: str) -> click.Command:
    """The command that trains `name`."""

    @click.command(
        name,
        help=f"{_title(name)}\n\nExit code 1 when the loss is no number any more, or --compare finds a difference; 2 "
        "for bad input; 130 after Ctrl-C, which finishes the step and saves the checkpoint.",
        short_help=_title(name),
        epilog=f"Example: pykernels train {name} --text book.txt --steps 500 --checkpoint {name}.pt",
    )
    @click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8. Default: Python's own prose.")
    @click.option("--steps", type=click.IntRange(min=1), help=f"In all. Default: {STEPS}, unless --time is given.")
    @click.option("--time", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Stop after it.")
    @click.option(
        "--size", type=click.Choice(["small", "medium"]), default="medium", show_default=True, help="small: a toy."
    )
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), help="Default: torch's choice.")
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--backend", type=click.Choice(_BACKENDS), help="For every operator; it never falls back.")
    @click.option("--checkpoint", type=_file, help="Save here, every so many steps and at the end.")
    @click.option("--checkpoint-every", type=click.IntRange(min=1), default=100, show_default=True, metavar="STEPS")
    @click.option("--resume", is_flag=True, help="Go on from --checkpoint, to the bits an unbroken run ends with.")
    @click.option("--compare", is_flag=True, help="Train stock PyTorch beside it; losses, speed and memory of both.")
    @click.option("--report", type=_file, help="Write a page with plots.")
    @json_option
    def command(text: Path | None, **given: Any) -> None:
        options = Options(**given)
        with _settings(options):
            content = read_text(text) if text else default_text()
            task = TASKS[name](content, options.size == "small")
            (_compare if options.compare else _train)(name, task, content, options)

    return command


def _title(name: str) -> str:
    """The first sentence of the model's module."""
    return (sys.modules[TASKS[name].__module__].__doc__ or name).split("\n\n")[0].replace("\n", " ")


@contextlib.contextmanager
def _settings(options: Options) -> Iterator[None]:
    """Threads and backend while the command runs; a useless text or backend is bad input, Ctrl-C ends with 130."""
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        with contextlib.ExitStack() as stack:
            if options.backend is not None:
                stack.enter_context(_backends.default_backend(options.backend, "--backend"))
            yield
    except (TextError, _backends.BackendError) as error:
        raise BadInput(str(error)) from error
    except KeyboardInterrupt:
        click.echo("Interrupted; the checkpoint, if any, is the last one saved before.", err=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        torch.set_num_threads(threads)


def _train(name: str, task: Task, text: Text, options: Options) -> None:
    facts: dict[str, str | int] = {"model": name, "size": options.size, "seed": options.seed}
    training = Training(task, options.seed, options.device, {**facts, "text": digest(text.content)})
    if options.resume and options.checkpoint is not None:
        training.load(options.checkpoint)
    steps = options.steps if options.steps or options.time else STEPS
    resumed, stopped = len(training.losses), False
    if steps is not None and resumed > steps:
        raise BadInput(f"--steps {steps}: the checkpoint is at step {resumed} already")
    with interruptible() as asked, progress(steps) as advance:
        advance(resumed, f"training {name}")
        for loss in training.steps(steps, options.time):
            if not math.isfinite(loss):
                break  # the last checkpoint stays as it was
            advance(1, f"training {name}, loss {loss:.3f}")
            stopped = asked()
            if options.checkpoint and len(training.losses) % options.checkpoint_every == 0 and not stopped:
                _save(training, options.checkpoint)
            if stopped:
                break
    if training.losses and not math.isfinite(training.losses[-1]):
        click.echo(f"Error: the loss of step {len(training.losses)} is {training.losses[-1]}", err=True)
        raise SystemExit(1)
    if options.checkpoint is not None:
        _save(training, options.checkpoint)
    samples = [] if stopped else training.samples()
    if options.report is not None and not stopped:
        _write(options.report, report.alone(task, training.losses, samples, _where(text, options)))
    _show(name, task, training, samples, resumed, stopped, options)
    if stopped:
        kept = f"saved: {options.checkpoint}; --resume goes on" if options.checkpoint else "nothing was saved"
        click.echo(f"Interrupted after step {len(training.losses)}; {kept}.", err=True)
        raise SystemExit(INTERRUPTED)


def _save(training: Training, path: Path) -> None:
    try:
        training.save(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise BadInput(f"--checkpoint {path}: cannot be written: {error}") from error


def _show(
    name: str, task: Task, training: Training, samples: list[tuple[str, str]], resumed: int, stopped: bool, o: Options
) -> None:
    losses, done = training.losses, len(training.losses) - resumed
    rate = done * task.tokens / training.seconds if done else None
    if o.as_json:
        print_json({
            "model": name, "shape": task.shape, "size": o.size, "seed": o.seed, "steps": len(losses),
            "resumed_at": resumed, "interrupted": stopped, "losses": losses, "targets_per_second": rate,
            "samples": [{"given": given, "made": made} for given, made in samples],
            "checkpoint": o.checkpoint and str(o.checkpoint), "report": o.report and str(o.report),
        })  # fmt: skip
        return
    out = console()
    out.print(f"{task.title}: {task.shape}")
    speed = f", {rate:,.0f} targets a second" if rate else ""
    out.print(f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}{speed}")
    _print_samples(samples)
    for what, path in (("Checkpoint", o.checkpoint), ("Plots", o.report)):
        if path is not None and not (stopped and what == "Plots"):
            out.print(f"{what}: {path}", soft_wrap=True)


def _print_samples(samples: list[tuple[str, str]], side: str = "") -> None:
    for given, made in samples:
        click.echo(f"\n{side}given: {given}\n{side}made:  {made}")


def _compare(name: str, task: Task, text: Text, options: Options) -> None:
    steps = options.steps or STEPS
    samples: list[list[tuple[str, str]]] = []

    def look(model: Any) -> float:
        assert task.sample is not None
        samples.append(task.sample(model, options.seed))
        return 0.0

    twice = replace(task, batches=lambda count: list(islice(stream(task, options.seed), count)), evaluate=look)
    with progress(2 * steps) as advance:
        advance(0, f"training {name} twice")
        outcome: Outcome = train_both(twice, steps, options.device, options.seed, advance)
    made = dict(zip(("stock PyTorch", "pykernels"), samples, strict=True))
    if options.report is not None:
        _write(options.report, report.compared(outcome, made, _where(text, options)))
    if options.as_json:
        pairs = {side: [{"given": g, "made": m} for g, m in found] for side, found in made.items()}
        print_json({**table.as_json(outcome), "size": options.size, "seed": options.seed, "samples": pairs})
    else:
        table.show(console(), [outcome])
        for side, found in made.items():
            _print_samples(found[:1], f"{side}, ")
        if options.report is not None:
            click.echo(f"Plots: {options.report}")
    raise SystemExit(0 if outcome.equal else 1)


def _where(text: Text, options: Options) -> list[str]:
    threads = 1 if options.compare else torch.get_num_threads()
    return [
        f"Text: {text.source}, {len(text.content):,} characters.",
        f"Size {options.size}, seed {options.seed}, device {options.device}, threads: {threads}.",
        *machine.describe().lines(),
    ]


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--report {path}: cannot be written: {error.strerror}") from error
