"""The HTML report of one or several records: rooflines, ratios, targets, growth. It loads nothing, runs no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from statistics import median
from typing import Any

from ...testing.bench import OURS
from ...testing.limits import Limits
from ...testing.machine import Machine
from ...testing.targets import TARGETS, result
from .._loglog import PALETTE, Curve, key, loglog
from .._page import document
from .tables import SHORT

Record = dict[str, Any]
_ROOMS = {"activation": "c0", "attention": "c1", "recurrent": "c2", "embedding": "c3", "sampled_softmax": "c4"}
_BOUNDS = {"memory": "a copy's speed", "reading": "the speed of reading", "products": "the best matrix product"}
_ROOM_OF = {target.op: target.record for target in TARGETS}
_STYLE = f"""<style>{PALETTE}
.plots {{ display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }}
.plot {{ border: 1px solid var(--rule); border-radius: 10px; padding: 14px; min-width: 0; max-width: 620px; }}
.plot .key {{ margin: .5em 0 0; font-size: .82rem; gap: .2em 1em; }} .key i {{ vertical-align: middle; }}
.bars {{ display: grid; gap: 2px 28px; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }}
.bar {{ padding: .3em 0; min-width: 0; }} .bar p {{ display: flex; justify-content: space-between; gap: 1em; margin: 0;
  font-size: .85rem; max-width: none; }} .bar p span:first-child {{ overflow-wrap: anywhere; }}
.bar p span:last-child {{ white-space: nowrap; }}
.bar small {{ color: var(--quiet); font-size: .74rem; display: block; }}
.track {{ position: relative; height: 12px; background: color-mix(in srgb, var(--rule) 55%, transparent);
  border-radius: 2px; margin: 2px 0; }} .track i {{ position: absolute; top: 0; bottom: 0; }}
.track .fill {{ border-radius: 2px; background: var(--ours); }} .track .slow {{ background: var(--stock); }}
.track .spread {{ top: 5px; bottom: 5px; background: var(--ink); }}
.track .one {{ width: 1px; background: var(--ink); }}
.track .goal {{ width: 3px; top: -3px; bottom: -3px; background: var(--good); }}
summary {{ cursor: pointer; font-weight: 600; margin: .9em 0 .4em; }} .facts {{ display: flex; flex-wrap: wrap;
  gap: .2em 2em; }} .facts b {{ font-weight: 600; }} .wide td {{ white-space: normal; }}
.wide small {{ color: var(--quiet); }} .wide table {{ max-width: 980px; }}
</style>"""


def build(records: Sequence[Record], growth: Record | None = None) -> str:
    """Args:
    growth: a record of benchmarks/scaling.py, whose curves are drawn.
    """
    rows = [row for record in records for row in record["rows"]]
    parts = [_STYLE, _summary(records, rows), *_limits(records), *_rooflines(records)]
    parts += [*_targets(records), *_ratios(rows), *(curves(growth) if growth else ())]
    about = [fact for record in records for fact in _facts(record)]
    return document("pykernels: speed", "Speed against the best peer", "\n".join(parts), list(dict.fromkeys(about)))


def _facts(record: Record) -> list[str]:
    machine = Machine(**{**record["machine"], **{k: tuple(record["machine"][k]) for k in ("features", "gpus")}})
    how = "one thread, CPU time" if record["device"] == "cpu" else "GPU time by events, L2 flushed before each call"
    made = [f"Taken {record['datetime']}."] if record.get("datetime") else []
    return [*machine.lines(), f"{how}; medians of interleaved rounds.", *made]


def _summary(records: Sequence[Record], rows: Sequence[Record]) -> str:
    ratios = [row["ratio"]["median"] for row in rows if row["ratio"]]
    wrong = [row for row in rows if not row["correct"]]
    found = [(t, r) for t in TARGETS for record in records if (r := result(t, record))]
    met = sum(r.verdict(t) == "met" for t, r in found)
    said = f"{len(rows)} rows, each checked against the float64 oracle before it was timed"
    if ratios:
        faster = sum(ratio >= 1 for ratio in ratios)
        said += (
            f"; in {faster} of {len(ratios)} ours is at least as fast as the best peer, median {median(ratios):.2f}x"
        )
    said += f"; {met} of {len(found)} targets are met." if found else "."
    bad = f'<p class="bad">{len(wrong)} rows failed their check and have no speed.</p>' if wrong else ""
    return f"<p>{said}</p>{bad}"


def _limits(records: Sequence[Record]) -> Iterator[str]:
    for record in records[:1]:
        if record.get("limits"):
            lines = "".join(f"<p>{escape(line)}</p>" for line in Limits(**record["limits"]).lines() if line)
            yield f"<h2>Limits of this machine, measured in the same run</h2>{lines}"


def _room(row: Record) -> str:
    return row.get("room") or _ROOM_OF.get(row["op"], "")


def _dots(rows: Sequence[Record], x: str, y: str, scale: float) -> list[Curve]:
    """A curve of dots for each room: y / scale over x, or over flops a byte ("intensity")."""
    curves = []
    for room, color in _ROOMS.items():
        points, titles = [], []
        for row in rows:
            if _room(row) == room and row["correct"] and row.get(y):
                across = row["flops"] / row["moved"] if x == "intensity" else row[x]
                points.append((across, row[y] / scale))
                share = (
                    f", {row['limit']['fraction']:.0%} of {_BOUNDS[row['limit']['bound']]}" if row.get("limit") else ""
                )
                titles.append(
                    f"{row['op']} {row['shape']} {row['dtype']} {row['direction']}: {row[y] / scale:.3g}{share}"
                )
        curves.append(Curve(room.replace("_", " "), points, color, dots=True, titles=titles))
    return [curve for curve in curves if curve.points]


def _rooflines(records: Sequence[Record]) -> Iterator[str]:
    limits = next((record["limits"] for record in records if record.get("limits")), None)
    if limits is None:
        return
    rows = [row for record in records for row in record["rows"]]
    plots = []
    bound = [row for row in rows if row.get("flops") and row.get("moved")]
    for dtype, peak in limits["flops"].items():
        dots = _dots([row for row in bound if row["dtype"] == dtype], "intensity", "flops_per_second", 1e9)
        if dots:
            plots.append(_roof(dots, dtype, peak, limits))
    dots = _dots([row for row in rows if not row.get("flops")], "moved", "bytes_per_second", 1e9)
    if dots:
        xs = [x for curve in dots for x, _ in curve.points]
        span = min(xs) / 1.5, max(xs) * 1.5
        lines = (("copy from memory", limits["copy"], "c5"), ("triad in L3", limits["triad"], "ink"))
        ceilings = [Curve(name, [(x, r / 1e9) for x in span], c, dash=True) for name, r, c in lines if r]
        plots.append(_card("Bandwidth: operators without matrix products", [*ceilings, *dots], "bytes moved", "GB/s"))
    if plots:
        yield "<h2>Rooflines</h2><p>Each row is a point (its name by pointing at it), the dashed lines are this "
        yield "machine's ceilings. Bytes are those that must be moved; what stays in a cache can lie above a slope.</p>"
        yield f'<div class="plots">{"".join(plots)}</div>'


def _roof(dots: Sequence[Curve], dtype: str, peak: float, limits: Record) -> str:
    """Bandwidth times intensity up to the peak."""
    copy, triad = limits["copy"], limits["triad"]
    ridge = peak / copy
    xs = [ridge, *(x for curve in dots for x, _ in curve.points), *([peak / triad] if triad else ())]
    low, high = min(xs) / 1.5, max(xs) * 1.5
    roof = [(low, low * copy / 1e9), (ridge, peak / 1e9), (high, peak / 1e9)]
    ceilings = [Curve("memory, then matrix product", roof, "c5", dash=True)]
    if triad:
        ceilings.append(Curve("L3", [(low, low * triad / 1e9), (peak / triad, peak / 1e9)], "ink", dash=True))
    return _card(f"Matrix products, {dtype}", [*ceilings, *dots], "operations a byte", "GFLOP/s")


def _card(title: str, curves: Sequence[Curve], x: str, y: str) -> str:
    return f'<div class="plot"><h3>{escape(title)}</h3>{loglog(curves, title, x, y)}{key(curves)}</div>'


def _targets(records: Sequence[Record]) -> Iterator[str]:
    found = [(t, r) for t in TARGETS for record in records if (r := result(t, record))]
    if not found:
        return
    head = "<tr><th>work</th><th>target</th><th>result (p20–p80)</th><th></th></tr>"
    lines = []
    for target, got in found:
        verdict = got.verdict(target)
        color = {"met": "good", "missed": "bad"}.get(verdict, "quiet")
        unit = " µs" if target.of_call else ""
        figures = f"{target.ratio:g}{unit}</td><td>{got.median:.2f} ({got.p20:.2f}–{got.p80:.2f})"
        about = f"{target.dtype}, {SHORT.get(target.direction, target.direction)}, against {got.peer}"
        work = f"{escape(target.work)}<br><small>{escape(about)}</small>"
        lines.append(f'<tr><td>{work}</td><td>{figures}</td><td class="{color}">{verdict}</td></tr>')
    yield "<h2>Targets</h2><p>Time of the peer / ours; of a call on next to nothing, microseconds above torch's.</p>"
    yield f'<div class="scroll wide"><table>{head}{"".join(lines)}</table></div>'


def _ratios(rows: Sequence[Record]) -> Iterator[str]:
    yield "<h2>Ratios</h2><p>The best peer's time / ours on a logarithmic scale: to the right of the line ours is "
    yield "faster. Thin: from the 20th to the 80th percentile of the rounds. Green: the target.</p>"
    goals = {target.key: target.ratio for target in TARGETS if target.peer is None}
    first = True
    for room in (*_ROOMS, ""):
        chosen = [row for row in rows if _room(row) == room]
        for dtype in dict.fromkeys(row["dtype"] for row in chosen):
            part = [row for row in chosen if row["dtype"] == dtype]
            shown = "".join(_bars(part, goals))
            name = f"{room.replace('_', ' ') or 'others'}, {dtype}: {len(part)} rows"
            yield f"<details{' open' if first or len(part) <= 60 else ''}><summary>{escape(name)}</summary>"
            yield f'<div class="bars">{shown}</div></details>'
            first = False


def _bars(rows: Sequence[Record], goals: dict[tuple[str, str, str, str], float]) -> Iterator[str]:
    keys = [(row["op"], row["shape"], row["dtype"], row["direction"]) for row in rows]
    ends = [row["ratio"][name] for row in rows if row["ratio"] for name in ("p20", "p80")]
    ends += [goals[name] for name in keys if name in goals]
    low, high = (math.log(f([1.0, *ends])) for f in (min, max))
    low, high = low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01

    def place(ratio: float) -> float:
        return 100 * (math.log(max(ratio, 1e-3)) - low) / (high - low)

    for row, name in zip(rows, keys, strict=True):
        title = escape(f"{row['op']} {row['shape']} {row['direction']}")
        if not row["ratio"]:
            state = "check failed" if not row["correct"] else "no peer"
            yield f'<div class="bar"><p><span>{title}</span><span class="bad">{state}</span></p></div>'
            continue
        ratio, one = row["ratio"], place(1.0)
        middle, p20, p80 = (place(ratio[k]) for k in ("median", "p20", "p80"))
        start, end = sorted((one, middle))
        marks = (
            f'<i class="fill{"" if middle >= one else " slow"}" style="left:{start:.2f}%;width:{end - start:.2f}%"></i>'
        )
        marks += f'<i class="spread" style="left:{p20:.2f}%;width:{max(p80 - p20, 0.3):.2f}%"></i>'
        marks += f'<i class="one" style="left:{one:.2f}%"></i>'
        if name in goals:
            marks += f'<i class="goal" style="left:{place(goals[name]):.2f}%"></i>'
        small = escape(", ".join(_details(row, goals.get(name))))
        yield f'<div class="bar"><p><span>{title}</span><span><b>{ratio["median"]:.2f}</b> '
        yield f"({ratio['p20']:.2f}–{ratio['p80']:.2f})</span></p>"
        yield f'<div class="track" role="img" aria-label="{ratio["median"]:.2f}">{marks}</div>'
        yield f"<small>{small}</small></div>"


def _details(row: Record, goal: float | None) -> Iterator[str]:
    yield f"{row['seconds'][OURS]['median'] * 1e3:.3g} ms, {row['best_peer']} {_best(row) * 1e3:.3g} ms"
    if goal:
        yield f"target {goal:g}"
    if row.get("limit"):
        yield f"{row['limit']['fraction']:.0%} of {_BOUNDS[row['limit']['bound']]}"
    peak = row.get("peak") or {}
    if peak.get(OURS) and peak.get("eager"):
        yield f"peak {peak[OURS] / 2**20:.1f} MiB, eager {peak['eager'] / 2**20:.1f}"


def _best(row: Record) -> float:
    return float(row["seconds"][row["best_peer"]]["median"])


def curves(growth: Record) -> Iterator[str]:
    """Time and peak memory against each size, from a record of benchmarks/scaling.py."""
    about = growth["machine"]
    yield f"<h2>Growth</h2><p>Forward and backward; {escape(about['cpu'])}, torch {escape(about['torch'])}.</p>"
    yield f'<div class="plots">{"".join(growth_card(study) for study in growth["studies"])}</div>'


def growth_card(study: Record) -> str:
    """One study: time of every provider, and below it the memory where it was taken."""
    parts = [f'<div class="plot"><h3>{escape(study["title"])}</h3><p class="quiet">{escape(study["fixed"])}</p>']
    for kind, unit, scale in (("seconds", "ms", 1e3), ("peak_bytes", "MiB", 2**-20)):
        drawn = growth_curves(study, kind, scale)
        if drawn:
            parts.append(loglog(drawn, f"{study['title']}: {unit}", study["axis"], unit, height=220) + key(drawn))
    return "".join([*parts, "</div>"])


def growth_curves(study: Record, kind: str, scale: float) -> list[Curve]:
    """The providers of a study; the fitted exponent is in the name."""
    found = []
    for color, (name, provider) in zip(("c0", "c5", "c1", "c3"), study["providers"].items(), strict=False):
        if any(provider[kind]):
            points = [(x, y * scale) for x, y in zip(study["sizes"], provider[kind], strict=True) if y]
            power = provider["exponents"].get(kind)
            found.append(Curve(name + (f" ~{power:.2f}" if power is not None else ""), points, color))
    return found
