"""Small SVG plots without a plotting library: lines and bars, coloured by CSS so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2433; --quiet: #667085; --rule: #e3e7ee;
  --stock: #94a3b8; --ours: #c2410c; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161f; --ink: #e6e9ef; --quiet: #98a2b3; --rule: #2a3140;
  --stock: #64748b; --ours: #fb923c; --good: #4ade80; --bad: #f87171; } }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--quiet); } svg text.value { fill: var(--ink); } svg .axis { stroke: var(--rule); }
svg .line { fill: none; stroke-linejoin: round; } svg .limit { stroke: var(--quiet); stroke-dasharray: 4 3; }
"""


@dataclass(frozen=True)
class Series:
    """One line (`values` against 1, 2, ...) or one bar (`values[0]`); `color` is a CSS custom property's name."""

    name: str
    values: Sequence[float]
    color: str = "ours"
    width: float = 1.6


def _number(value: float) -> str:
    if value and (abs(value) < 1e-2 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Sequence[Series],
    label: str,
    *,
    height: int = 200,
    log: bool = False,
    floor: float = 1e-9,
    limit: tuple[float, str] | None = None,
    width: int = 340,
) -> str:
    """Lines over the step number. `log`: a logarithmic axis, on which anything below `floor` is drawn at it.

    Args:
        label: what the plot shows, for screen readers.
        limit: a level to mark, and its name.
    """
    left, right, top, bottom = 44, 8, 10, 22

    def scale(value: float) -> float:
        return math.log10(max(value, floor)) if log else value

    shown = [[scale(v) for v in one.values if math.isfinite(v)] for one in series]
    flat = [v for one in shown for v in one] + ([scale(limit[0])] if limit else [])
    low, high = (min(flat), max(flat)) if flat else (0.0, 1.0)
    if log:
        low, high = math.floor(low), math.ceil(high + 1e-9)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    count = max((len(one.values) for one in series), default=1)

    def x(index: float) -> float:
        return left + (width - left - right) * (index / max(count - 1, 1))

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for tick in range(int(low), int(high) + 1, max(1, int(high - low) // 3)) if log else ticks(low, high):
        text = _number(tick) if not log else f"<1e{tick}" if 10.0**tick <= floor else f"1e{tick}"
        parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    steps = [tick for tick in ticks(0, count) if tick == int(tick) and 1 <= tick <= count] or [count]
    for tick in dict.fromkeys([1, *steps]):
        anchor = "end" if tick == count and count > 1 else "start" if tick == 1 else "middle"
        parts.append(f'<text x="{x(tick - 1):.1f}" y="{height - 6}" text-anchor="{anchor}">{int(tick)}</text>')
    if limit:
        at = y(scale(limit[0]))
        parts.append(f'<line class="limit" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{width - right}" y="{at + 13:.1f}" text-anchor="end">{escape(limit[1])}</text>')
    for one in series:
        points = " ".join(f"{x(i):.1f},{y(scale(v)):.1f}" for i, v in enumerate(one.values) if math.isfinite(v))
        parts.append(
            f'<polyline class="line" points="{points}" stroke="var(--{one.color})" stroke-width="{one.width}">'
            f"<title>{escape(one.name)}</title></polyline>"
        )
    return "".join([*parts, "</svg>"])


def bars(
    series: Sequence[Series],
    label: str,
    texts: Sequence[str],
    *,
    name_width: int = 96,
    width: int = 340,
    heading: bool = False,
    mark: float | None = None,
) -> str:
    """Horizontal bars from zero, each with its name before and its text behind.

    Args:
        label: what the plot shows, for screen readers; with `heading`, above the bars too.
        mark: a value to draw a line at.
    """
    row, text_width, top = 26, 84, 30 if heading else 0
    largest = max((one.values[0] for one in series if math.isfinite(one.values[0])), default=0.0) or 1.0
    room = width - name_width - text_width
    height = top + row * len(series)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    if heading:
        parts.append(f'<text class="value" x="0" y="16" font-weight="600">{escape(label)}</text>')
    for i, (one, text) in enumerate(zip(series, texts, strict=True)):
        length = max(room * one.values[0] / largest, 1.0) if math.isfinite(one.values[0]) else 1.0
        middle = top + row * i + row / 2 + 4
        parts.append(f'<text x="0" y="{middle}">{escape(one.name)}</text>')
        parts.append(
            f'<rect x="{name_width}" y="{top + row * i + 5}" width="{length:.1f}" height="{row - 10}" rx="2" '
            f'fill="var(--{one.color})"/>'
        )
        parts.append(f'<text class="value" x="{name_width + length + 6:.1f}" y="{middle}">{escape(text)}</text>')
    if mark is not None and mark <= largest:
        x = name_width + room * mark / largest
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height}"/>')
    return "".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """The plot as a file of its own: with the namespace, the colours and a background."""
    style = f"<style>{STYLE} svg {{ background: var(--paper); padding: 12px; box-sizing: border-box; }}</style>"
    head, body = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body}'
