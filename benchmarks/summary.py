"""The generated parts of docs/performance.md and of the README: targets against records, growth, whole models."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import contract  # noqa: E402
from overview import overview  # noqa: E402

from pykernels.cli._loglog import standalone_panels  # noqa: E402
from pykernels.cli.bench.page import growth_curves  # noqa: E402
from pykernels.testing.limits import Limits  # noqa: E402
from pykernels.testing.targets import BOTH, TARGETS, Result, Target, result  # noqa: E402

Record = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"
ROOMS = {
    "activation": "activation",
    "attention": "attention",
    "recurrent": "recurrent",
    "embedding": "embedding",
    "sampled_softmax": "sampled softmax",
    "word2vec": "word2vec",
}
SHORT = {"forward": "fwd", BOTH: "fwd+bwd", "epoch": "an epoch", "step": "step"}


def record(name: str) -> Record | None:
    path = RESULTS / f"cpu-{name}.json"
    found: Record | None = json.loads(path.read_text()) if path.exists() else None
    return found


def results() -> Iterator[tuple[Target, Result | None]]:
    records = {name: record(name) or {} for name in ROOMS}
    for target in TARGETS:
        yield target, result(target, records[target.record])


def _gpu_records() -> list[str]:
    return sorted(path.stem for path in RESULTS.glob("*.json") if not path.stem.startswith("cpu-"))


def gpu_line() -> str:
    found = _gpu_records()
    if not found:
        return "No column for a GPU: no record of one exists yet; `make gpu` makes it."
    return f"Records of GPUs: {', '.join(f'`benchmarks/results/{name}.json`' for name in found)}."


def targets_table() -> str:
    """Every target with what its record says; the distance in a few words where it is missed."""
    found = list(results())
    met = sum(got is not None and got.verdict(target) == "met" for target, got in found)
    close = sum(got is not None and got.verdict(target) == "within the spread" for target, got in found)
    lines = [
        f"{met} of {len(found)} targets are met, {close} within the spread of the rounds (the best fifth reaches it).",
        "",
        '<div class="targets" markdown>',
        "",
        "| work | best peer | target | result (p20–p80) | |",
        "|---|---|---|---|---|",
    ]
    for target, got in found:
        unit = " µs" if target.of_call else ""
        timed = SHORT.get(target.direction, target.direction)
        kind = "bf16" if target.dtype == "bfloat16" else "fp32"
        cells = [target.work if target.of_call else f"{target.work}, {kind}, {timed}"]
        cells += [got.peer if got else target.peer or "–", f"{target.ratio:g}{unit}"]
        if got is None:
            lines.append(f"| {' | '.join(cells)} | – | not in the record |")
            continue
        spread = f" ({got.p20:.2f}–{got.p80:.2f})" if got.p20 != got.p80 else ""
        verdict = got.verdict(target)
        if verdict != "met":
            said = f": {target.why}" if target.why and verdict == "missed" else ""
            verdict = f"[{verdict}]({target.page}){said}"
        lines.append(f"| {' | '.join(cells)} | **{got.median:.2f}**{unit}{spread} | {verdict} |")
    return "\n".join([*lines, "", "</div>"])


def rooms_table() -> str:
    """One line a room, for the first page of the docs."""
    lines = [
        "One thread of a CPU, best peer's time / ours, over the rows that have a target ([every row](performance.md)):",
        "",
        "| room | rows | slowest | median | fastest | targets met |",
        "|---|---|---|---|---|---|",
    ]
    found = list(results())
    for name, title in ROOMS.items():
        own = [(t, got) for t, got in found if t.record == name and got]
        ratios = [got.median for t, got in own if not t.of_call and t.direction != "two threads"]
        if ratios:
            met = sum(got.verdict(t) == "met" for t, got in own)
            spread = f"{min(ratios):.1f}x | {median(ratios):.1f}x | {max(ratios):.1f}x"
            lines.append(f"| {title} | {len(ratios)} | {spread} | {met} of {len(own)} |")
    return "\n".join(lines)


def readme() -> str:
    """Every record in a few lines, and how many of the targets are met."""
    return f"{overview()}\n\n**Targets**, meant to be hard: {targets_table().splitlines()[0]}"


def limits_table() -> str:
    """The machine's ceilings, as each record's own run found them."""
    lines = [
        "| record | read, GB/s | copy | triad in L3 | first touch | fp32 product, GFLOP/s | bf16 "
        "| our C++ operator, µs | torch's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ROOMS:
        found = record(name)
        if found and found.get("limits"):
            got = Limits(**found["limits"])
            rates = (got.read, got.copy, got.triad, got.first_touch, *got.flops.values())
            calls = (got.dispatch.get(what) for what in ("our C++ operator", "torch operator"))
            cells = [(f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.1f}") if rate else "–" for rate in rates]
            cells += [f"{seconds * 1e6:.1f}" if seconds else "–" for seconds in calls]
            lines.append(f"| `cpu-{name}.json` | {' | '.join(cells)} |")
    if len(lines) == 2:
        return "No committed record has limits of its run yet."
    return "\n".join(lines)


def models_table() -> str:
    """Training steps of whole models, stock against pykernels: the language-model story, then patched models."""
    about = (record("story") or record("patched") or {}).get("machine", {})
    lines = [
        f"{about.get('cpu')}, torch {about.get('torch')}, one thread, float32, CPU time of whole training steps "
        "(forward, backward, optimizer), losses and gradients checked for equality in the same run.",
        "",
        "| model | a step | tokens/s, stock → ours | step, ms | stock / ours (p20–p80) | peak memory, MiB "
        "| stock / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("story", "patched"):
        for row in (record(name) or {}).get("rows", ()):
            if not row["equal"]:
                lines.append(f"| {row['title' if name == 'story' else 'model']} | check failed | | | | | |")
                continue
            times, tokens, peaks = (row.get(key) for key in ("seconds_a_step", "tokens", "peak_bytes"))
            pair = ("torch", "pykernels")
            rate = " → ".join(f"{tokens / times[k]:,.0f}" for k in pair) if tokens and times else "–"
            step = " → ".join(f"{times[k] * 1e3:.1f}" for k in pair) if times else "–"
            peak = " → ".join(f"{peaks[k] / 2**20:.1f}" for k in pair) if peaks else "–"
            ratio = row["ratio"]
            speed = f"**{ratio['median']:.2f}** ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
            title = row.get("title") or f"{row['model']}, {row['ours']}"
            cells = (title, row["shape"], rate, step, speed, peak, f"{row['memory_ratio']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", gpu_line()])


def growth_table() -> str:
    """The fitted exponents and crossings, and a plot for each study."""
    found = record("scaling")
    if found is None:
        return "No record yet: `python benchmarks/scaling.py > benchmarks/results/cpu-scaling.json` takes one."
    about = found["machine"]
    lines = [
        f"{about['cpu']}, torch {about['torch']}; exponents are fitted over the larger half of the sizes"
        f"{'. Against threads: wall time' if any(study['threads'] for study in found['studies']) else ''}.",
        "",
        '<div class="growth" markdown>',
        "",
        "| work | by | time ~ | peak memory ~ | its time / ours, smallest → largest size | ahead |",
        "|---|---|---|---|---|---|",
    ]
    for study in found["studies"]:
        ours = study["providers"]["pykernels"]["seconds"]
        for name, provider in study["providers"].items():
            work = (
                f"{study['title']}: {study['axis']} {study['sizes'][0]:,} to {study['sizes'][-1]:,}; {study['fixed']}"
            )
            powers = (provider["exponents"][kind] for kind in ("seconds", "peak_bytes"))
            cells = ["" if ours is not provider["seconds"] else work, name, *(_power(p) for p in powers)]
            if name != "pykernels":
                ratios = [b / a for a, b in zip(ours, provider["seconds"], strict=True) if b]
                crossings = [f"{c['then']} from {c['size']:,.0f} on" for c in study["crossings"][name]]
                always = "pykernels" if ratios[-1] > 1 else name
                always += " throughout" if min(max(r, 1 / r) for r in ratios) > 1.03 else ", level at some sizes"
                cells += [f"{ratios[0]:.2f} → {ratios[-1]:.2f}", "; ".join(crossings) or always]
            lines.append(f"| {' | '.join(cells)} |" + ("" if name != "pykernels" else " | |"))
    images = [f"![{s['title']} against {s['axis']}](growth/{s['name']}.svg){{ width=350 }}" for s in found["studies"]]
    return "\n".join([*lines, "", " ".join(images), "", "</div>"])


def memory_table() -> str:
    """What must not lie in memory as a whole, at the largest size of its study; what gated units keep."""
    lines = ["| work | must not hold | ours, MiB | others | |", "|---|---|---|---|---|"]
    for study in (record("scaling") or {}).get("studies", ()):
        if "avoided" in study:
            whole, what = study["avoided"]["bytes"][-1], study["avoided"]["what"]
            peaks = {name: provider["peak_bytes"][-1] for name, provider in study["providers"].items()}
            ours = peaks.pop("pykernels")
            others = ", ".join(f"{name} {peak / 2**20:.1f}" for name, peak in peaks.items() if peak)
            size = f"{study['title']}, {study['axis']} {study['sizes'][-1]:,}; {study['fixed']}"
            verdict = "met" if ours < whole else "missed"
            lines.append(f"| {size} | {what}, {whole / 2**20:.1f} MiB | {ours / 2**20:.1f} | {others} | {verdict} |")
    for row in (record("activation") or {}).get("rows", ()):
        if (row["op"], row["shape"], row["dtype"], row["direction"]) == ("swiglu", "2048x8192", "float32", "forward"):
            ours, eager, inputs = row["saved"]["pykernels"], row["saved"]["eager"], 4 * 2048 * 8192
            share = (ours + inputs) / (eager + inputs)
            verdict = (
                f"{'met' if 2 * ours <= eager else 'missed'}; with the input, which both keep, {share:.2f} of eager's"
            )
            cells = (f"{ours / 2**20:.1f}", f"eager {eager / 2**20:.1f}", verdict)
            lines.append(f"| swiglu 2048 x 8192, fp32, kept beyond its input | half of eager's | {' | '.join(cells)} |")
    return "\n".join(lines)


def _power(exponent: float | None) -> str:
    return "–" if exponent is None else f"size^{exponent:.2f}"


def growth_plots() -> dict[str, str]:
    """Name of a file in docs/growth -> SVG."""
    found = record("scaling")
    plots = {}
    for study in found["studies"] if found else ():
        panels = [
            (unit, drawn)
            for kind, unit, scale in (("seconds", "ms", 1e3), ("peak_bytes", "MiB", 2**-20))
            if (drawn := growth_curves(study, kind, scale))
        ]
        plots[f"{study['name']}.svg"] = standalone_panels(study["title"], study["fixed"], study["axis"], panels)
    return plots


BLOCKS = {
    "targets": targets_table,
    "rooms": rooms_table,
    "overview": readme,
    **{f"contract of {room}": functools.partial(contract.table, room) for room in list(ROOMS)[:5]},
    "limits": limits_table,
    "memory": memory_table,
    "models": models_table,
    "growth": growth_table,
}
PAGES = ("README.md", "docs/performance.md", "docs/index.md", *(f"docs/{room}.md" for room in list(ROOMS)[:5]))
