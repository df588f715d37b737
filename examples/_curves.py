"""Curves as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 150, 34, 34


def panel(curves: Mapping[str, Sequence[float]], title: str, across: str, log: bool = False, top: int = 0) -> str:
    """One plot: a line for each name over 1, 2, ..., the names on the right in the order in which the lines end."""
    drawn = {
        name: [math.log10(max(v, 1e-30)) if log else v for v in values if math.isfinite(v)]
        for name, values in curves.items()
    }
    flat = [v for values in drawn.values() for v in values]
    low, high = min(flat), max(flat) + 1e-9
    count = max(len(values) for values in drawn.values())

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * index / max(count - 1, 1)

    def y(value: float) -> float:
        return top + TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="600">{escape(title)}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        text = f"{10**value:.0e}" if log else f"{value:.3g}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{top + HEIGHT - 8}" text-anchor="middle">{across}</text>')
    ranked = sorted(drawn, key=lambda name: -drawn[name][-1])
    for i, name in enumerate(drawn):
        color, dash = f"hsl({360 * i / len(drawn):.0f} 70% 42%)", ' stroke-dasharray="6 3"' if i % 2 else ""
        points = " ".join(f"{x(j):.1f},{y(v):.1f}" for j, v in enumerate(drawn[name]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"{dash}/>')
        at = top + TOP + (HEIGHT - TOP - BOTTOM) * (ranked.index(name) + 0.5) / len(ranked)
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{at + 4:.1f}" fill="{color}">{escape(name)}</text>')
    return "".join(parts)


def page(panels: Sequence[str]) -> str:
    """The panels one below another, each made with top = its number x HEIGHT."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}" font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{background}{"".join(panels)}</svg>\n'
