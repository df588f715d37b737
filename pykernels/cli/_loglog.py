"""Plots with two logarithmic axes: points, curves and ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ._plot import STYLE

PALETTE = """
:root { --c0: #c2410c; --c1: #1d4ed8; --c2: #15803d; --c3: #a21caf; --c4: #a16207; --c5: #475569; }
@media (prefers-color-scheme: dark) { :root { --c0: #fb923c; --c1: #7aa2ff; --c2: #4ade80; --c3: #e879f9; --c4: #facc15;
  --c5: #94a3b8; } }
"""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """`points` joined by a line, or each a dot with its own `titles`; `color` is a CSS custom property's name."""

    name: str
    points: Points
    color: str = "c0"
    dots: bool = False
    dash: bool = False
    titles: Sequence[str] = ()


def loglog(
    curves: Sequence[Curve], label: str, x_label: str, y_label: str, *, width: int = 360, height: int = 270
) -> str:
    """Curves with an empty name have no entry below the plot. Points that are not above 0 are left out.

    Args:
        label: what the plot shows, for screen readers.
    """
    left, right, top, bottom = 46, 10, 20, 34
    kept = [[(a, b) for a, b in curve.points if a > 0 and b > 0] for curve in curves]
    xs, ys = ([p[i] for points in kept for p in points] or [1.0] for i in (0, 1))
    (x0, x1), (y0, y1) = _range(xs), _range(ys)

    def place(a: float, b: float) -> tuple[float, float]:
        across = left + (width - left - right) * (math.log10(a) - x0) / (x1 - x0)
        return across, top + (height - top - bottom) * (y1 - math.log10(b)) / (y1 - y0)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    parts.append(f'<text x="0" y="11">{escape(y_label)}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 2}" text-anchor="end">{escape(x_label)}</text>')
    for tick in _ticks(y0, y1):
        y = place(10**x0, tick)[1]
        parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in _ticks(x0, x1):
        x = place(tick, 10**y0)[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 14}" text-anchor="middle">{_short(tick)}</text>')
    for curve, points in zip(curves, kept, strict=True):
        placed = [place(*p) for p in points]
        if not curve.dots:
            dash = ' stroke-dasharray="5 4"' if curve.dash else ""
            joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(
                f'<polyline class="line" points="{joined}" stroke="var(--{curve.color})" stroke-width="1.8"{dash}>'
                f"<title>{escape(curve.name)}</title></polyline>"
            )
        for i, (x, y) in enumerate(placed):
            title = (
                curve.titles[i]
                if i < len(curve.titles)
                else f"{curve.name}: {_short(points[i][0])}, {points[i][1]:.3g}"
            )
            if curve.dots or not curve.dash:
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if curve.dots else 2.6}" fill="var(--{curve.color})" '
                    f'fill-opacity="{0.75 if curve.dots else 1}"><title>{escape(title)}</title></circle>'
                )
    return "".join([*parts, "</svg>"])


def standalone_panels(
    title: str, about: str, x_label: str, panels: Sequence[tuple[str, Sequence[Curve]]], width: int = 360
) -> str:
    """Plots one below the other as a file of its own. panels: (unit, curves); the keys are part of the picture."""
    height, parts, y = 210, [], 42
    for unit, curves in panels:
        plot = loglog(curves, unit, x_label, unit, width=width, height=height)
        parts.append(plot.replace("<svg ", f'<svg y="{y}" width="{width}" height="{height}" ', 1))
        y += height + 6
        for curve in curves:
            dash = ' stroke-dasharray="5 4"' if curve.dash else ""
            style = f'stroke="var(--{curve.color})" stroke-width="2"{dash}'
            parts.append(f'<line x1="46" x2="66" y1="{y + 8}" y2="{y + 8}" {style}/>')
            parts.append(f'<text x="72" y="{y + 12}">{escape(curve.name)}</text>')
            y += 17
        y += 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {width + 16} {y}" role="img" '
    head += f'aria-label="{escape(title)}"><style>{STYLE}{PALETTE} svg {{ width: auto; }} '
    head += ":root { background: var(--paper); }</style>"
    heading = f'<text class="value" x="0" y="14" font-weight="600">{escape(title)}</text>'
    heading += f'<text x="0" y="30">{escape(about)}</text>'
    return "".join([head, heading, *parts, "</svg>\n"])


def key(curves: Sequence[Curve]) -> str:
    """The names of the curves with their colours, as HTML; each once."""
    seen = {curve.name: curve for curve in curves if curve.name}
    parts = []
    for name, curve in seen.items():
        mark = f"height:9px;width:9px;border-radius:50%;background:var(--{curve.color})"
        if not curve.dots:
            mark = f"border-top:2px {'dashed' if curve.dash else 'solid'} var(--{curve.color})"
        parts.append(f'<span><i style="{mark}"></i>{escape(name)}</span>')
    return f'<div class="key">{"".join(parts)}</div>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the smallest and largest, with a margin."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.06 * (high - low), 0.05)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten; in a short range 1, 2 and 5 of them, in a longer one 1 and 3."""
    steps = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3 else (1,)
    found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    inside = [tick for tick in found if low <= math.log10(tick) <= high]
    return inside[:: -(-len(inside) // 7)] if len(inside) > 7 else inside


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
