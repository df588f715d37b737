"""The rooms' tables of shapes, bytes, operations and kept memory: the specs' formulas at one benchmark shape each."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from pykernels.testing.spec import Case, OpSpec, load

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def _shapes(case: Case) -> str:
    """`query, key, value 1x4x512x64; bias 4x512x512`; ids0, ids1, ... are one name"""
    named: dict[tuple[int, ...], list[str]] = {}
    for name, made in case.inputs.items():
        names, short = named.setdefault(tuple(made.shape), []), f"`{re.sub('[0-9]+$', '', name)}`"
        if short not in names or short == "`w`":
            names.append(short if short != "`w`" else f"`{name}`")
    return "; ".join(f"{', '.join(names)} {'x'.join(map(str, shape)) or 'one'}" for shape, names in named.items())


def _amount(count: float, unit: str) -> str:
    power = 0 if count < 1 else min(3, int(math.log10(count) // 3))
    return f"{count / 10 ** (3 * power):.3g} {('', 'k', 'M', 'G')[power]}{unit}"


def _pair(counts: dict[str, int], unit: str) -> str:
    return " / ".join(_amount(counts[way], unit) for way in ("forward", "backward") if way in counts)


def _timed(spec: OpSpec, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    shape = spec.bench[0].label
    found = [row for row in rows if row["op"].split()[0] == spec.name and shape.endswith(row["shape"])]
    return next((row for row in found if row["dtype"] == "float32" and row["direction"] == "forward+backward"), None)


def table(room: str) -> str:
    """A row for each public function at the first of its benchmark shapes, float32."""
    rows = json.loads((RESULTS / f"cpu-{room}.json").read_text())["rows"]
    lines = [
        "float32, forward / backward. Bytes: memory traffic if nothing stayed in a cache. Operations: those of matrix "
        "products; – where arithmetic is a few operations an element and memory decides. Kept: bytes beyond the inputs "
        "until backward, measured with the record, ours / torch eager.",
        "",
        "| function | tensors | bytes | operations | kept |",
        "|---|---|---|---|---|",
    ]
    seen = set()
    for spec in load(room):
        if not spec.bench or spec.name in seen:
            continue
        seen.add(spec.name)
        case = spec.bench[0]
        moved = _pair(spec.bytes_moved(case, torch.float32), "B") if spec.bytes_moved else "–"
        work = _pair(spec.flops(case, torch.float32), "") if spec.flops else "–"
        row = _timed(spec, rows)
        kept = " / ".join(_amount(row["saved"][who], "B") for who in ("pykernels", "eager")) if row else "–"
        lines.append(f"| `{spec.name}` | {_shapes(case)} | {moved} | {work} | {kept} |")
    return "\n".join(lines)
