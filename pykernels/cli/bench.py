"""`pykernels bench`: speed against torch eager and torch.compile, memory kept for backward, and the cost of a call."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import BackendError
from .._backends import BACKENDS
from ..testing import bench, machine
from ..testing.spec import ROOMS, Case, OpSpec, load
from ..testing.step import Step, load_steps
from ..testing.step import row as step_row
from ..testing.timing import Timing, copy_bandwidth
from ..testing.tuned_malloc import eager_times
from ._output import BadInput, console, json_option, print_json, progress
from ._plot import Series, bars, standalone
from .verify import DTYPES, label

_MAPPED = 2**25  # bytes: the most that malloc can be made to keep by itself
_SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "f+b", "step": "step"}
Overhead = dict[str, dict[str, dict[str, Timing]]]


@click.command("bench", epilog="Example: pykernels bench activation --op swiglu --dtype bfloat16 --plot plots")
@click.argument("room", required=False, type=click.Choice(ROOMS))
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Operator; repeatable. Default: all of the room.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable.")
@click.option("--backend", type=click.Choice([*BACKENDS, "reference"]), help="Default: the one that `auto` takes.")
@click.option(
    "--compile",
    "modes",
    multiple=True,
    type=click.Choice(["default", "max-autotune", "none"]),
    help="Modes of torch.compile to compare with; repeatable. Default: as the operator's spec has it.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--rounds", type=click.IntRange(min=5), default=20, show_default=True, help="At most, a measurement.")
@click.option("--seconds", type=click.FloatRange(min=0), default=2.0, show_default=True, help="About, a measurement.")
@click.option("--plot", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write SVGs.")
@json_option
def command(
    room: str | None,
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    backend: str | None,
    modes: tuple[str, ...],
    device: str | None,
    rounds: int,
    seconds: float,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time the operators of a room: forward, backward, and both.

    On the CPU: one thread, its own CPU time, providers in turns. Each row is checked against the float64 oracle first;
    a row that fails prints no speed. The ratio is the best peer's time over ours, with its 20th and 80th percentile.
    The limit is a plain copy that moves as many bytes as the operator must, timed in the same rounds.

    Exit code 1 when a check fails; 2 when there is nothing of that name to time.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    specs = [spec for spec in load(room) if spec.bench and (not ops or spec.name in ops)]
    if not specs:
        known = ", ".join(sorted({spec.name for spec in load(room) if spec.bench})) or "none"
        raise BadInput(f"nothing to time for {', '.join(ops) or room}; operators with benchmark shapes: {known}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    compile_modes = tuple(mode for mode in modes if mode != "none") if modes else None
    asked = [DTYPES[dtype] for dtype in dtypes or ("float32",)]
    jobs = [(s, case, d) for d in asked for s in specs for case in s.bench if _modes(s, case, d) is not None]
    rows = _rows(jobs, backend, device, compile_modes, rounds, seconds)
    if device == "cpu":
        _tuned(rows, jobs, rounds, seconds)
    if device == "cpu" and not ops:
        rows += _steps(load_steps(room) if "float32" in (dtypes or ("float32",)) else [], rounds, seconds)
    overhead = _overhead(specs, rounds) if device == "cpu" else {}
    limit = copy_bandwidth(device=device)
    if folder:
        _plot(folder, rows)
    if as_json:
        calls = {
            op: {kind: {p: _plain(t) for p, t in by.items()} for kind, by in kinds.items()}
            for op, kinds in overhead.items()
        }
        figures = {"rows": [row.as_dict() for row in rows], "call_overhead": calls, "copy_bytes_per_second": limit}
        print_json({**figures, "device": device, "machine": machine.describe().as_dict()})
    else:
        _show(rows, overhead, limit, device)
    raise SystemExit(0 if all(row.correct for row in rows) else 1)


def _plain(timing: Timing) -> dict[str, Any]:
    return {name: value for name, value in asdict(timing).items() if name != "samples"}


def _rows(
    jobs: list[tuple[OpSpec, Case, torch.dtype]],
    backend: str | None,
    device: str,
    modes: tuple[str, ...] | None,
    rounds: int,
    seconds: float,
) -> list[bench.Row]:
    found = []
    with progress(len(jobs) * len(bench.DIRECTIONS)) as advance:
        for spec, case, dtype in jobs:
            name = label(spec)
            advance(0, f"{name} {case.label}: checking")
            try:
                found += bench.rows(
                    spec,
                    case,
                    dtype,
                    label=name,
                    backend=backend,
                    device=device,
                    compile_modes=(_modes(spec, case, dtype) or ()) if modes is None else modes,
                    rounds=rounds,
                    seconds=seconds,
                    step=lambda direction, name=name, case=case: advance(0, f"{name} {case.label}: {direction}"),  # type: ignore[misc]
                )
            except BackendError as error:
                raise BadInput(str(error)) from error
            advance(len(bench.DIRECTIONS))
    return found


def _modes(spec: OpSpec, case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
    return spec.compiled(case, dtype) if spec.compiled else ("default",)


def _tuned(rows: list[bench.Row], jobs: list[tuple[OpSpec, Case, torch.dtype]], rounds: int, seconds: float) -> None:
    """Puts torch eager with a tuned malloc beside the rows whose tensors malloc maps anew for every call."""
    large, places = [], []
    for i, (spec, case, dtype) in enumerate(jobs):
        if spec.rowwise and max(math.prod(x.shape) for x in case.inputs.values()) * dtype.itemsize >= _MAPPED:
            known = load(spec.room)
            large.append((spec.room, known.index(spec), spec.bench.index(case), str(dtype).removeprefix("torch.")))
            places.append(i * len(bench.DIRECTIONS))
    for first, times in zip(places, eager_times(large, rounds, seconds), strict=True):
        for row in rows[first : first + len(bench.DIRECTIONS)]:
            row.beside = {"eager, tuned malloc": times[row.direction]}


def _steps(steps: list[Step], rounds: int, seconds: float) -> list[bench.Row]:
    found = []
    with progress(len(steps)) as advance:
        for step in steps:
            advance(0, f"{step.name} {step.shape}: step")
            found.append(step_row(step, rounds, seconds))
            advance()
    return found


def _overhead(specs: list[OpSpec], rounds: int) -> Overhead:
    found = {}
    with progress(len(specs)) as advance:
        for spec in specs:
            advance(0, f"{label(spec)}: cost of a call")
            found[label(spec)] = bench.overhead(spec, spec.bench[0], rounds)
            advance()
    return found


def _show(rows: list[bench.Row], overhead: Overhead, limit: float, device: str) -> None:
    out = console()
    how = "one thread, CPU time" if device == "cpu" else torch.cuda.get_device_name()
    for dtype in dict.fromkeys(row.dtype for row in rows):
        chosen = [row for row in rows if row.dtype == dtype]
        _section(out, f"{dtype}, milliseconds, {how}", _speed_table(chosen))
        _section(out, f"{dtype}, MiB kept for backward beyond the inputs", _memory_table(chosen))
    if overhead:
        _section(
            out, "Cost of a call with next to nothing to compute, microseconds: ours - eager", _overhead_table(overhead)
        )
    for why in dict.fromkeys(f"{row.op} {row.shape}: {why}" for row in rows for why in row.failures):
        out.print(Text(why, style="red"), soft_wrap=True)
    backends = {name: sorted({row.op for row in rows if row.backend == name}) for name in {row.backend for row in rows}}
    for name, ops in sorted(backends.items()):
        out.print(f"{name} serves {', '.join(ops)}.")
    out.print(
        f"ratio: the best peer's time / ours, median (p20-p80). limit: share of the speed of a copy of the same size; "
        f"a 64 MiB copy reaches {limit / 1e9:.1f} GB/s here."
    )


def _section(out: Console, title: str, table: Table) -> None:
    out.print(Text(title, style="bold"))
    out.print(table)
    out.print()


def _speed_table(rows: list[bench.Row]) -> Table:
    peers = list(dict.fromkeys(name for row in rows for name in row.seconds if name not in (bench.OURS, bench.COPY)))
    beside = list(dict.fromkeys(name for row in rows for name in row.beside))
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("op", "shape", ""):
        table.add_column(name)
    for name in ("ours", *peers, *beside, "ratio", "p20-p80", "GB/s", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        head = (row.op, row.shape) if row.direction in (bench.DIRECTIONS[0], "step") else ("", "")
        if not row.correct:
            table.add_row(row.op, row.shape, _SHORT[row.direction], Text("CHECK FAILED", style="bold red"))
            continue
        timings = {**row.seconds, **row.beside}
        times = [
            f"{timings[name].median * 1e3:.3g}" if name in timings else "-" for name in (bench.OURS, *peers, *beside)
        ]
        ratio = row.ratio
        spread = (Text(f"{ratio[0]:.2f}", style="bold"), f"{ratio[1]:.2f}-{ratio[2]:.2f}") if ratio else ("-", "-")
        rate = f"{row.bandwidth / 1e9:.1f}" if row.bandwidth else "-"
        share = f"{row.of_limit:.0%}" if row.of_limit else "-"
        table.add_row(*head, _SHORT[row.direction], *times, *spread, rate, share)
    return table


def _memory_table(rows: list[bench.Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("op", "shape"):
        table.add_column(name)
    for name in ("ours", "eager"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.saved and row.direction == bench.DIRECTIONS[0]:
            table.add_row(row.op, row.shape, *(f"{row.saved[name] / 2**20:.1f}" for name in (bench.OURS, "eager")))
    return table


def _overhead_table(overhead: Overhead) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("op")
    for kind in ("no grad", "forward", "forward+backward"):
        table.add_column(kind, justify="right")
    for op, kinds in overhead.items():
        cells = []
        for timings in kinds.values():
            ours, eager = (timings[name].median * 1e6 for name in (bench.OURS, "eager"))
            cells.append(f"{ours:.1f} - {eager:.1f} = {ours - eager:+.1f}")
        table.add_row(op, *cells)
    return table


def _plot(folder: Path, rows: list[bench.Row]) -> None:
    """One SVG a dtype and direction: a bar for each operator and shape, as long as its ratio; grey below 1."""
    for dtype, direction in dict.fromkeys((row.dtype, row.direction) for row in rows):
        timed = [(row, row.ratio) for row in rows if (row.dtype, row.direction) == (dtype, direction) and row.ratio]
        if not timed:
            continue
        series = [
            Series(f"{row.op} {row.shape}", [ratio[0]], "ours" if ratio[0] >= 1 else "stock") for row, ratio in timed
        ]
        texts = [f"{ratio[0]:.2f}x {row.peer}" for row, ratio in timed]
        title = f"Speed against the best peer, {dtype}, {direction}"
        name = re.sub(r"\W+", "_", f"{timed[0][0].dtype}_{direction}") + ".svg"
        (folder / name).write_text(
            standalone(bars(series, title, texts, name_width=180, width=640, heading=True, mark=1.0)), encoding="utf-8"
        )
