"""The command: compiles everything in parallel, prints the table and the verdict, compares with the baseline.

Exit status: 0 clean, 1 a broken rule or a regression, 2 cannot run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rules import BASELINE_FIELDS, Entry, Row, drift

HERE = Path(__file__).parent
COLUMNS = ("entry", "kernel", "sm", "regs", "spill", "smem", "occ", "instr", "loop", "128-bit", "mma", "instr/B")


@functools.cache
def load_entries(path: str | None) -> list[Entry]:
    from .entries import load

    return load(path)


def triton_task(path: str | None, index: int, target: int) -> list[Row]:
    from . import measure

    return measure.run(load_entries(path)[index], target)


def cuda_task(compiler: str, source: Path, target: int) -> list[Row]:
    from . import cuda

    return cuda.run(compiler, source, target)


Task = tuple[Callable[..., list[Row]], tuple[Any, ...]]


def triton_tasks(options: argparse.Namespace) -> list[Task]:
    return [
        (triton_task, (options.entries, index, target))
        for index, entry in enumerate(load_entries(options.entries))
        for target in entry.targets
        if wanted(options, entry.name, target)
    ]


def cuda_tasks(options: argparse.Namespace) -> list[Task]:
    from . import cuda

    compiler = cuda.nvcc()
    if compiler is None or options.entries:
        return []
    return [
        (cuda_task, (compiler, source, target))
        for source in cuda.sources()
        for target in cuda.targets(source)
        if wanted(options, source.name, target)
    ]


def wanted(options: argparse.Namespace, name: str, target: int) -> bool:
    return all(part in name for part in options.only) and (not options.target or target in options.target)


def run(tasks: Sequence[Task], jobs: int) -> list[Row]:
    """Rows of all tasks, in their order. Each worker is a new process: Triton's state does not survive a fork."""
    if jobs == 1:
        return [row for function, args in tasks for row in function(*args)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(function, *args) for function, args in tasks]
        return [row for future in futures for row in future.result()]


class Baseline:
    """The committed figures of one compiler version. Without a file for this version nothing is gated."""

    def __init__(self, path: Path, compiler: str) -> None:
        self.path, self.compiler = path, compiler
        self.rows: dict[str, dict[str, int]] = json.loads(path.read_text())["rows"] if path.exists() else {}

    @property
    def gated(self) -> bool:
        return self.path.exists()

    def compare(self, rows: Sequence[Row], complete: bool) -> list[str]:
        """Add drift to the rows' faults; returns baseline rows that no kernel has any more."""
        for row in rows:
            if row.kernel != "?":
                row.faults += drift(row, self.rows)
        return sorted(set(self.rows) - {row.key for row in rows}) if complete else []

    def write(self, rows: Sequence[Row], complete: bool) -> None:
        kept = {} if complete else dict(self.rows)
        kept.update({row.key: {f: getattr(row, f) for f in BASELINE_FIELDS} for row in rows if row.kernel != "?"})
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(kept[key])}" for key in sorted(kept))
        self.path.write_text(f'{{"compiler": {json.dumps(self.compiler)}, "rows": {{\n{lines}\n}}}}\n')


def table(rows: Sequence[Row]) -> str:
    cells: list[tuple[str, ...]] = [COLUMNS]
    for r in rows:
        per_byte = "" if r.instructions_per_byte is None else f"{r.instructions_per_byte:.2f} {r.issue_share:4.0%}"
        wide = f"{r.loads_128}+{r.stores_128}" + (f" ({r.narrow} narrow)" if r.narrow else "")
        matrix = f"{r.mma}" + (f" {r.roofline:.2f} {r.bound}" if r.roofline is not None else "") if r.mma else ""
        measured = (r.registers, r.spill_bytes, r.shared, f"{r.occupancy:.2f}", r.instructions, r.loop or "")
        cells.append((r.entry, r.kernel, str(r.target), *map(str, measured), wide, matrix, per_byte))
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def lint(name: str, tasks: Sequence[Task], baseline: Baseline, options: argparse.Namespace) -> tuple[list[Row], bool]:
    """Run one half of the lint and print it; whether it passes."""
    start = time.perf_counter()
    rows = run(tasks, options.jobs)
    complete = not (options.only or options.target)
    if options.update_baseline and (options.baseline or not options.entries):
        baseline.write(rows, complete)
        baseline = Baseline(baseline.path, baseline.compiler)
    comparable = baseline.gated and (options.baseline or not options.entries)
    stale = baseline.compare(rows, complete) if comparable else []
    print(table(rows))
    for row in rows:
        for fault in row.faults:
            print(f"FAIL  {row.key}: {fault}")
    for key in stale:
        print(f"FAIL  {key}: in the baseline, but no such kernel; accept with --update-baseline")
    failing = sum(bool(row.faults) for row in rows) + len(stale)
    print(f"{name} ({baseline.compiler}): {len(rows)} kernels, {failing} failing, {time.perf_counter() - start:.0f} s")
    gated = baseline.gated or options.entries
    if failing and not gated:
        print(f"reported only: {baseline.path.name} does not exist, so this compiler is not the one that gates")
    return rows, not (failing and gated)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pykernels.testing.aot",
        description="Compile every kernel for GPUs that need not be there, and hold the machine code to its rules.",
    )
    parser.add_argument("--only", action="append", default=[], help="entries whose name contains this; may be repeated")
    parser.add_argument("--target", type=int, action="append", help="80, 90 or 100; may be repeated")
    parser.add_argument("--kind", choices=("triton", "cuda"), help="one half of the lint")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--update-baseline", action="store_true", help="accept the figures of this run")
    parser.add_argument(
        "--entries", help="a Python file with ENTRIES, instead of the rooms'; needs --baseline to compare"
    )
    parser.add_argument("--baseline", type=Path, help="instead of the committed one of this Triton version")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("the lint compiles Triton kernels, which TRITON_INTERPRET=1 prevents: unset it", file=sys.stderr)
        return 2
    import triton

    from . import cuda

    rows: list[Row] = []
    passed = True
    if options.kind != "cuda":
        path = options.baseline or HERE / f"baseline_triton_{triton.__version__}.json"
        found, good = lint("triton", triton_tasks(options), Baseline(path, f"triton {triton.__version__}"), options)
        rows, passed = rows + found, passed and good
    compiler = cuda.nvcc()
    if options.kind == "cuda" and compiler is None:
        print("no nvcc was found", file=sys.stderr)
        return 2
    if options.kind != "triton" and (tasks := cuda_tasks(options)) and compiler is not None:
        version = cuda.release(compiler)
        found, good = lint("cuda", tasks, Baseline(HERE / f"baseline_cuda_{version}.json", f"nvcc {version}"), options)
        rows, passed = rows + found, passed and good
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0 if passed else 1
