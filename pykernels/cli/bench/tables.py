"""The tables that a run prints, from its record."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...testing.bench import COPY, DIRECTIONS, OURS
from ...testing.limits import Limits
from ...testing.targets import TARGETS, result

SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd", "step": "step"}
Record = dict[str, Any]


def show(out: Console, record: Record, name: str | None) -> None:
    """name: of the GPU; None: one thread of the CPU."""
    how = name or "one thread, CPU time"
    rows = record["rows"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [row for row in rows if row["dtype"] == dtype]
        section(out, f"{dtype}, milliseconds, {how}", _speed(chosen))
        section(out, f"{dtype}, MiB kept for backward beyond the inputs; peak of forward and backward", _memory(chosen))
    if record["call_overhead"]:
        title = "Cost of a call with next to nothing to compute, microseconds: ours - eager"
        section(out, title, _calls(record["call_overhead"]))
    goals = _targets(record)
    if goals.row_count:
        section(out, "Against the targets: the peer's time / ours (of a call: microseconds above torch's)", goals)
    words = record.get("word2vec", {}).get("failures", [])
    for why in [
        *dict.fromkeys(f"{row['op']} {row['shape']}: {why}" for row in rows for why in row["failures"]),
        *words,
    ]:
        out.print(Text(why, style="red"), soft_wrap=True)
    for backend in sorted({row["backend"] for row in rows}):
        ops = sorted({row["op"] for row in rows if row["backend"] == backend})
        out.print(f"{backend} serves {', '.join(ops)}.")
    for line in Limits(**record["limits"]).lines() if record.get("limits") else []:
        out.print(f"Limits of this machine: {line}.")
    out.print(
        "ratio: the best peer's time / ours, median (p20-p80). limit: share of the speed of a copy that moves as much, "
        "or of the best matrix product of this dtype (x), whichever is nearer."
    )


def section(out: Console, title: str, table: Table) -> None:
    out.print(Text(title, style="bold"))
    out.print(table)
    out.print()


def _speed(rows: list[Record]) -> Table:
    peers = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name not in (OURS, COPY)))
    beside = list(dict.fromkeys(name for row in rows for name in row.get("beside", ())))
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("op", "shape", ""):
        table.add_column(name)
    for name in ("ours", *peers, *beside, "ratio", "p20-p80", "GB/s", "GFLOP/s", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        first = row["direction"] in (DIRECTIONS[0], "step")
        head = (row["op"], row["shape"]) if first else ("", "")
        short = SHORT[row["direction"]]
        if not row["correct"]:
            table.add_row(row["op"], row["shape"], short, Text("CHECK FAILED", style="bold red"))
            continue
        timings = {**row["seconds"], **row.get("beside", {})}
        named = (OURS, *peers, *beside)
        times = [f"{timings[name]['median'] * 1e3:.3g}" if name in timings else "-" for name in named]
        ratio, limit = row["ratio"], row.get("limit")
        spread: tuple[Text | str, str] = ("-", "-")
        if ratio:
            spread = Text(f"{ratio['median']:.2f}", style="bold"), f"{ratio['p20']:.2f}-{ratio['p80']:.2f}"
        rates = (row["bytes_per_second"], row.get("flops_per_second"))
        shares = f"{limit['fraction']:.0%}{'x' if limit['bound'] == 'products' else ''}" if limit else "-"
        table.add_row(
            *head, short, *times, *spread,
            *(f"{rate / 1e9:.3g}" if rate else "-" for rate in rates), shares,
        )  # fmt: skip
    return table


def _memory(rows: list[Record]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("op", "shape"):
        table.add_column(name)
    for name in ("kept: ours", "eager", "peak: ours", "eager"):
        table.add_column(name, justify="right")
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for row in rows:
        cells = found.setdefault((row["op"], row["shape"]), {"saved": {}, "peak": {}})
        for kind, values in cells.items():
            values.update(row.get(kind) or {})
    for row_name, cells in found.items():
        if cells["saved"] or cells["peak"]:
            sizes = [cells[kind].get(side) for kind in ("saved", "peak") for side in (OURS, "eager")]
            table.add_row(*row_name, *("-" if size is None else f"{size / 2**20:.1f}" for size in sizes))
    return table


def _calls(calls: Record) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("op")
    for kind in ("no grad", "forward", "forward+backward"):
        table.add_column(kind, justify="right")
    for op, kinds in calls.items():
        cells = []
        for timings in kinds.values():
            ours, eager = (timings[name]["median"] * 1e6 for name in (OURS, "eager"))
            cells.append(f"{ours:.1f} - {eager:.1f} = {ours - eager:+.1f}")
        table.add_row(op, *cells)
    return table


def _targets(record: Record) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("work", "", "timed", "peer"):
        table.add_column(name)
    for name in ("target", "result", "p20-p80"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for target in TARGETS:
        found = result(target, record)
        if found:
            short = "call" if target.of_call else SHORT.get(target.direction, target.direction)
            style = {"met": "green", "missed": "red"}.get(verdict := found.verdict(target), "yellow")
            columns = f"{target.ratio:g}", f"{found.median:.2f}", f"{found.p20:.2f}-{found.p80:.2f}"
            table.add_row(
                target.work,
                "bf16" if target.dtype == "bfloat16" else "fp32",
                short,
                found.peer,
                *columns,
                Text(verdict, style=style),
            )
    return table
