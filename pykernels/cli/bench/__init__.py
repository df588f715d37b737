"""`pykernels bench`: speed against torch eager, torch.compile and specialists, memory, and the cost of a call."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import torch

from ..._backends import BACKENDS, sm90_kernels
from ...testing import bench
from ...testing.spec import ROOMS, load
from ...testing.step import load_steps
from .._output import BadInput, console, json_option, print_json
from .._plot import Series, bars, standalone
from ..verify import DTYPES
from . import compare, exchange, page, tables, take

_QUICK = take.Effort(rounds=5, seconds=0.1, probe=0.1)
_FILE = click.Path(path_type=Path, dir_okay=False)
_READ = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command("bench", epilog="Example: pykernels bench activation --op swiglu --dtype bfloat16 --html speed.html")
@click.argument("room", required=False, type=click.Choice(ROOMS))
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Operator; repeatable. Default: all of the room.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable.")
@click.option("--backend", type=click.Choice([*BACKENDS, "reference"]), help="Default: the one that `auto` takes.")
@click.option(
    "--sm90", type=click.Choice(["auto", "always", "never"]), default="auto", help="See `pykernels.sm90_kernels`."
)
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
@click.option(
    "--quick", is_flag=True, help="On the CPU, only the rows that have a target, in few rounds: three minutes."
)
@click.option("--html", type=_FILE, metavar="FILE", help="Write one page: rooflines, ratios, targets.")
@click.option("--growth", type=_READ, metavar="FILE", help="Record of benchmarks/scaling.py whose curves --html draws.")
@click.option("--plot", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write SVGs.")
@click.option(
    "--pytest-benchmark", "exchanged", type=_FILE, metavar="FILE", help="Write JSON as pytest-benchmark has it."
)
@click.option(
    "--from", "sources", multiple=True, type=_READ, metavar="FILE", help="Read what --json wrote; time nothing."
)
@click.option("--compare", "older", type=_READ, metavar="FILE", help="Older output of --json; exit code 1 on a loss.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Of a loss in --compare.",
)
@click.option("--absolute", is_flag=True, help="--compare judges our own times, not the ratios against the peers.")
@json_option
def command(
    room: str | None,
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    backend: str | None,
    sm90: str,
    modes: tuple[str, ...],
    device: str | None,
    rounds: int,
    seconds: float,
    quick: bool,
    html: Path | None,
    growth: Path | None,
    folder: Path | None,
    exchanged: Path | None,
    sources: tuple[Path, ...],
    older: Path | None,
    threshold: float,
    absolute: bool,
    as_json: bool,
) -> None:
    """Time the operators of a room: forward, backward, and both.

    On the CPU: one thread, its own CPU time, providers in turns. Each row is checked against the float64 oracle first;
    a row that fails prints no speed. The ratio is the best peer's time over ours, with its 20th and 80th percentile.
    The limits of the machine are measured in the same run: a row's own copy of as many bytes in the same rounds, and
    the best matrix product of its dtype.

    Exit code 1 when a check fails, or with --compare when a row fell by more than the threshold and the spreads of both
    runs do not meet; 2 when there is nothing of that name to time, or nothing to compare.
    """
    before = _read(older) if older else None
    grown = _read(growth, "studies", "benchmarks/scaling.py") if growth else None
    if sources:
        if exchanged or quick or room or ops:
            raise BadInput("--from reads records: it goes with --html, --plot, --compare and --json only")
        records, device = [_read(source) for source in sources], "cpu"
        rows: list[bench.Row] = []
    else:
        if device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: torch sees no CUDA device here")
        if quick and device == "cuda":
            raise BadInput("--quick measures the CPU's targets; there are none for cuda")
        device = device or ("cuda" if torch.cuda.is_available() and not quick else "cpu")
        plan = _plan(room, ops, dtypes, modes, quick, device)
        effort = _QUICK if quick else take.Effort(rounds, seconds, min(0.3, seconds))
        with sm90_kernels(sm90):
            record, rows = take.record(plan, effort, device, backend)
        records = [record]
    record = records[0] if len(records) == 1 else _joined(records)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        _plot(folder, record["rows"])
    if html:
        html.write_text(page.build(records, grown), encoding="utf-8")
    if exchanged:
        exchanged.write_text(json.dumps(exchange.document(rows, record)), encoding="utf-8")
    if as_json:
        print_json(record)
    elif before is None or not sources:
        tables.show(console(), record, torch.cuda.get_device_name() if device == "cuda" else None)
    lost = before is not None and _compared(record, before, threshold, absolute, as_json)
    raise SystemExit(1 if lost or not all(row["correct"] for row in record["rows"]) else 0)


def _plan(
    room: str | None, ops: tuple[str, ...], dtypes: tuple[str, ...], modes: tuple[str, ...], quick: bool, device: str
) -> take.Plan:
    specs = [spec for spec in load(room) if spec.bench and (not ops or spec.name in ops)]
    if not specs:
        known = ", ".join(sorted({spec.name for spec in load(room) if spec.bench})) or "none"
        raise BadInput(f"nothing to time for {', '.join(ops) or room}; operators with benchmark shapes: {known}")
    steps = load_steps(room) if device == "cpu" and not ops and "float32" in (dtypes or ("float32",)) else []
    if quick:
        if ops or dtypes or modes:
            raise BadInput("--quick has its own operators, dtypes and modes of torch.compile")
        return take.quick(specs, steps, room)
    asked = tuple(mode for mode in modes if mode != "none") if modes else None
    return take.everything(specs, [DTYPES[dtype] for dtype in dtypes or ("float32",)], steps, asked, device)


def _read(path: Path, name: str = "rows", made_by: str = "`pykernels bench --json`") -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, list) or (
        name == "rows" and not all({"op", "correct", "ratio"} <= row.keys() for row in found)
    ):
        raise BadInput(f"{path}: not a record of {made_by}: it has no such {name}")
    return record


def _joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows and calls of all; facts of the first."""
    calls = {op: kinds for record in records for op, kinds in record.get("call_overhead", {}).items()}
    return {**records[0], "rows": [row for record in records for row in record["rows"]], "call_overhead": calls}


def _compared(new: dict[str, Any], old: dict[str, Any], threshold: float, absolute: bool, quiet: bool) -> bool:
    """Prints what changed; whether something was lost. With --json it goes to stderr."""
    changes = compare.compare(new, old, threshold, absolute)
    out = console(stderr=quiet)
    shown = [change for change in changes if change.verdict not in ("same", "new")]
    if shown:
        what = "speed, calls a second" if absolute else "the best peer's time / ours"
        tables.section(
            out, f"Changed by more than {threshold:.0%} and the spread of both runs: {what}", compare.table(changes)
        )
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in compare.VERDICTS}
    out.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    if not sum(count for verdict, count in counts.items() if verdict not in ("gone", "new")):
        raise BadInput("--compare: the two records have no row with a figure in common")
    return bool(counts["worse"] or counts["wrong"])


def _plot(folder: Path, rows: list[dict[str, Any]]) -> None:
    """One SVG a dtype and direction: a bar for each operator and shape, as long as its ratio; grey below 1."""
    for dtype, direction in dict.fromkeys((row["dtype"], row["direction"]) for row in rows):
        kind = (dtype, direction)
        timed = [
            (row, row["ratio"]["median"]) for row in rows if (row["dtype"], row["direction"]) == kind and row["ratio"]
        ]
        if not timed:
            continue
        series = [
            Series(f"{row['op']} {row['shape']}", [ratio], "ours" if ratio >= 1 else "stock") for row, ratio in timed
        ]
        texts = [f"{ratio:.2f}x {row['best_peer']}" for row, ratio in timed]
        title = f"Speed against the best peer, {dtype}, {direction}"
        name = re.sub(r"\W+", "_", f"{dtype}_{direction}") + ".svg"
        (folder / name).write_text(
            standalone(bars(series, title, texts, name_width=180, width=640, heading=True, mark=1.0)), encoding="utf-8"
        )
