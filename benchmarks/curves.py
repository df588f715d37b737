"""Draws every activation and its derivative, as computed by pykernels: docs/activation_curves.svg.

python benchmarks/curves.py            write the plot
python benchmarks/curves.py --check    exit 1 when the committed plot is another
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pykernels import functional as F
from pykernels.cli._plot import STYLE

TARGET = Path(__file__).resolve().parent.parent / "docs" / "activation_curves.svg"
RANGE, POINTS = 4.0, 161
LOW, HIGH = -1.6, 4.0  # of the vertical axis, the same for all, so that slopes compare
WIDTH, HEIGHT, COLUMNS = 200, 150, 3

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "relu, reglu's gate": F.relu,
    "leaky_relu (0.2), prelu": lambda x: F.leaky_relu(x, 0.2),
    "rrelu (mean slope 11/48)": lambda x: F.rrelu(x, training=False),
    "elu": F.elu,
    "gelu, geglu's gate": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, "tanh"),
    "silu (swish 1), swiglu's gate": F.silu,
    "swish 0.25": lambda x: F.swish(x, 0.25),
    "swish 1.702": lambda x: F.swish(x, 1.702),
    "swish 4": lambda x: F.swish(x, 4.0),
}


def panel(name: str, function: Callable[[Tensor], Tensor], left: float, top: float) -> list[str]:
    """One activation: the axes, the derivative, the value."""
    x = torch.linspace(-RANGE, RANGE, POINTS, requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)

    def place(a: float, b: float) -> tuple[float, float]:
        across = left + 8 + (WIDTH - 16) * (a + RANGE) / (2 * RANGE)
        return across, top + 22 + (HEIGHT - 30) * (HIGH - b) / (HIGH - LOW)

    def line(values: Tensor, color: str, dash: str = "") -> str:
        points = " ".join(
            "{:.1f},{:.1f}".format(*place(a, b)) for a, b in zip(x.tolist(), values.tolist(), strict=True)
        )
        return f'<polyline class="line" points="{points}" stroke="var(--{color})" stroke-width="1.8"{dash}/>'

    (x0, y0), (x1, _) = place(-RANGE, 0.0), place(RANGE, 0.0)
    (middle, bottom), (_, above) = place(0.0, LOW), place(0.0, HIGH)
    parts = [
        f'<line class="axis" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y0:.1f}" y2="{y0:.1f}"/>',
        f'<line class="axis" x1="{middle:.1f}" x2="{middle:.1f}" y1="{above:.1f}" y2="{bottom:.1f}"/>',
        f'<text class="value" x="{left + 8}" y="{top + 14}">{name}</text>',
    ]
    for tick in (1.0, 2.0, 3.0):
        parts.append(f'<text x="{middle - 4:.1f}" y="{place(0, tick)[1] + 4:.1f}" text-anchor="end">{tick:.0f}</text>')
    for tick in (-3.0, 3.0):
        parts.append(f'<text x="{place(tick, 0)[0]:.1f}" y="{y0 + 13:.1f}" text-anchor="middle">{tick:.0f}</text>')
    return [*parts, line(slope, "stock", ' stroke-dasharray="5 3"'), line(y.detach(), "ours")]


def draw() -> str:
    rows = -(-len(CURVES) // COLUMNS)
    width, height = WIDTH * COLUMNS, HEIGHT * rows + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Every activation and its derivative">',
        f"<style>{STYLE} svg {{ background: var(--paper); }} svg text.value {{ font-size: 13px; }}</style>",
    ]
    for i, (name, function) in enumerate(CURVES.items()):
        parts += panel(name, function, WIDTH * (i % COLUMNS), HEIGHT * (i // COLUMNS))
    parts.append(f'<text x="8" y="{height - 6}">solid: the value; dashed: the derivative</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(check: bool) -> int:
    if check:
        return int(not TARGET.exists() or TARGET.read_text() != draw())
    TARGET.write_text(draw())
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
