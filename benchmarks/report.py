"""Writes the tables of the docs from the committed measurements, so that no figure there is written by hand.

python -m pykernels bench activation --dtype float32 --dtype bfloat16 --json > benchmarks/results/cpu-activation.json
python benchmarks/report.py            write the tables
python benchmarks/report.py --check    exit 1 when a page's table is not the record's
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("activation", "attention", "recurrent", "embedding", "sampled_softmax")
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


def _cell(row: dict[str, Any], provider: str) -> str:
    timing = row["seconds"].get(provider)
    return f"{timing['median'] * 1e3:.2f}" if timing else "–"


def table(record: dict[str, Any]) -> str:
    """Milliseconds by provider, and the best peer's time over ours with the spread of the rounds."""
    machine = record["machine"]
    lines = [
        f"{machine['cpu']} ({', '.join(machine['features'])}), torch {machine['torch']}, one thread, CPU time, medians "
        f"of interleaved rounds; copy bandwidth in the same run {record['copy_bytes_per_second'] / 1e9:.1f} GB/s.",
        "",
        "| op | shape | dtype | direction | ours, ms | eager | torch.compile | copy of as many bytes "
        "| best peer / ours (p20–p80) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if not row["correct"]:
            ratio = "check failed: no speed"
        elif row["ratio"]:
            ratio = f"**{row['ratio']['median']:.2f}** ({row['ratio']['p20']:.2f}–{row['ratio']['p80']:.2f})"
        else:
            ratio = "–"
        providers = " | ".join(_cell(row, p) for p in ("pykernels", "eager", "compile", "copy"))
        direction = SHORT.get(row["direction"], row["direction"])
        lines.append(f"| {row['op']} | {row['shape']} | {row['dtype']} | {direction} | {providers} | {ratio} |")
    if record.get("call_overhead"):
        lines += ["", "Cost of a call with next to nothing to compute, microseconds (ours / eager):", ""]
        lines += ["| op | no grad | forward with grad | forward + backward |", "|---|---|---|---|"]
        for op, kinds in record["call_overhead"].items():
            cells = []
            for kind in kinds.values():
                ours, eager = kind["pykernels"]["median"] * 1e6, kind["eager"]["median"] * 1e6
                cells.append(f"{ours:.1f} / {eager:.1f} ({ours - eager:+.1f})")
            lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(check: bool) -> int:
    stale = 0
    for room in ROOMS:
        source, page = ROOT / "benchmarks" / "results" / f"cpu-{room}.json", ROOT / "docs" / f"{room}.md"
        begin, end = f"<!-- measured: benchmarks/results/cpu-{room}.json -->", "<!-- end of measured -->"
        if not source.exists() or not page.exists() or begin not in page.read_text():
            continue
        text = page.read_text()
        before, rest = text.split(begin)
        new = f"{before}{begin}\n{table(json.loads(source.read_text()))}\n{end}{rest.split(end)[1]}"
        if check and new != text:
            print(
                f"{page.relative_to(ROOT)}: not what {source.relative_to(ROOT)} says; run python benchmarks/report.py"
            )
            stale = 1
        elif not check:
            page.write_text(new)
    return stale


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
