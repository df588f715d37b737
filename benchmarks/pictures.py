"""Draws the rooms' pictures: docs/attention_masks.svg, computed by the reference, and docs/<room>_flow.svg.

python benchmarks/pictures.py            write them
python benchmarks/pictures.py --check    exit 1 when a committed picture is another
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from pykernels import reference
from pykernels.cli._plot import STYLE

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 420  # of every picture: what a phone shows without shrinking the letters much
MORE = """svg { background: var(--paper); } svg text { font-size: 12px; fill: var(--ink); }
svg .quiet { fill: var(--quiet); } .seen { fill: var(--ours); } .cell, .chip { fill: var(--rule); } .work { fill: none }
.memory { fill: var(--paper); stroke: var(--stock); }
.kept { fill: var(--paper); stroke: var(--ours); stroke-width: 2; }
.arrow { stroke: var(--quiet); fill: none; marker-end: url(#tip); }"""
TIP = """<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#98a2b3"/></marker></defs>"""


def page(height: float, label: str, parts: list[str]) -> str:
    size = f'width="{WIDTH + 100}" viewBox="0 0 {WIDTH} {height:.0f}"'
    style = STYLE.replace("width: 100%; ", "")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">'
    return "\n".join([head, f"<style>{style}{MORE}</style>", TIP, *parts, "</svg>\n"])


# Masks: a row for each query, a column for each key; how strongly a cell is coloured is the weight among equal scores.

MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "causal=True": {"causal": True},
    'causal="top_left"': {"causal": "top_left"},
    "window=(2, 1)": {"window": (2, 1)},
    "causal, window=(2, 0)": {"causal": True, "window": (2, 0)},
    "causal, prefix_length=5": {"causal": True, "prefix_length": 5},
    "key_padding_mask": {"key_padding_mask": torch.arange(10)[None] < 7},
    "causal, alibi_slopes": {"causal": True, "alibi_slopes": torch.tensor([0.5])},
    "cu_seqlens, causal": {
        "causal": True,
        "cu_seqlens_q": torch.tensor([0, 3, 8]),
        "cu_seqlens_k": torch.tensor([0, 4, 10]),
    },
}


def weights(options: dict[str, Any], queries: int = 8, keys: int = 10) -> torch.Tensor:
    """(queries, keys): what `attention` gives each key where all scores are 0, by values that are unit vectors."""
    q, k, v = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4), torch.eye(keys)[None, None]
    if "cu_seqlens_q" not in options:
        return reference.attention(q, k, v, **options)[0, 0]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return reference.attention(q, k, v, max_seqlen_q=5, max_seqlen_k=6, **options)[:, 0]


def masks() -> str:
    side, gap, columns = 11, 26, 3
    width, height = 10 * side + gap, 8 * side + 34
    parts = []
    for number, (name, options) in enumerate(MASKS.items()):
        left, top = 12 + number % columns * width, 8 + number // columns * height
        parts.append(f'<text x="{left}" y="{top + 12}" style="font-size: 10.5px">{escape(name)}</text>')
        shades: dict[str, list[str]] = {}  # strength -> its cells, as one path
        for i, row in enumerate(weights(options).tolist()):
            for j, weight in enumerate(row):
                strength = f"{max(0.15, weight / max(row)):.2f}" if weight > 0 else "0"
                cell = f"M{left + j * side},{top + 18 + i * side}h{side - 1}v{side - 1}h{1 - side}z"
                shades.setdefault(strength, []).append(cell)
        for strength, cells in sorted(shades.items()):
            look = f'class="seen" fill-opacity="{strength}"' if strength != "0" else 'class="cell"'
            parts.append(f'<path {look} d="{"".join(cells)}"/>')
    label = "Which keys (columns) a query (row) sees under each mask; eight queries, ten keys"
    return page(8 + 3 * height, label, parts)


# Dataflow: rows of boxes, and arrows between them.


@dataclass(frozen=True)
class Flow:
    """`rows` of (name, text, kind); kinds: memory, kept (in memory until backward), work (done on the chip).

    `chip`: first and last row of each stretch that never leaves registers and caches, and what is said beside it.
    """

    label: str
    rows: list[list[tuple[str, str, str]]]
    arrows: str
    chip: list[tuple[int, int, str]]


STEP, TALL, EDGE = 62, 38, 10


def draw(flow: Flow) -> str:
    parts = []
    places: dict[str, tuple[float, float, float]] = {}  # middle, top, width
    for first, last, said in flow.chip:
        top, tall = EDGE + first * STEP - 14, (last - first) * STEP + TALL + 24
        parts.append(f'<rect class="chip" x="4" y="{top}" width="{WIDTH - 8}" height="{tall}" rx="8"/>')
        parts.append(
            f'<text class="quiet" x="{WIDTH - 10}" y="{top + tall - 4}" text-anchor="end">{escape(said)}</text>'
        )
    boxes = []
    for number, row in enumerate(flow.rows):
        letters = [max(len(part) for part in text.split("|")) + 4 for _, text, _ in row]
        room = WIDTH - 2 * EDGE - 8 * (len(row) - 1)
        left = float(EDGE)
        for (name, text, kind), share in zip(row, letters, strict=True):
            wide = room * share / sum(letters)
            top = EDGE + number * STEP
            places[name] = (left + wide / 2, top, wide)
            boxes.append(f'<rect class="{kind}" x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{TALL}" rx="5"/>')
            lines = text.split("|")
            for at, line in enumerate(lines):
                y = top + TALL / 2 + 4 + 14 * (at - (len(lines) - 1) / 2)
                said = f'x="{left + wide / 2:.1f}" y="{y:.1f}" text-anchor="middle"'
                boxes.append(f"<text {said}>{escape(line)}</text>")
            left += wide + 8
    for arrow in flow.arrows.split():
        start, end = arrow.split(">")
        (x0, y0, _), (x1, y1, wide) = places[start], places[end]
        x1 = min(max(x0, x1 - wide / 2 + 12), x1 + wide / 2 - 12)  # straight down where the box below allows it
        parts.append(f'<line class="arrow" x1="{x0:.1f}" y1="{y0 + TALL}" x2="{x1:.1f}" y2="{y1 - 1}"/>')
    height = EDGE + len(flow.rows) * STEP
    key = []
    for kind, left, said in (("kept", 10, "kept for backward"), ("chip", 170, "on the chip, never stored")):
        key.append(f'<rect class="{kind}" x="{left}" y="{height - 6}" width="14" height="12" rx="3"/>')
        key.append(f'<text class="quiet" x="{left + 20}" y="{height + 5}">{said}</text>')
    return page(height + 16, flow.label, [*parts, *boxes, *key])


FLOWS = {
    "activation": Flow(
        "bias, GELU and dropout in one kernel each way",
        [
            [("x", "x, rows of h", "kept"), ("b", "bias", "memory"), ("s", "seed", "kept")],
            [("a", "x + bias, GELU: a tile in L1 or registers", "work")],
            [("d", "word(seed, position) ≥ p 2³² ? scale : 0", "work")],
            [("y", "y", "memory")],
            [("dy", "dy", "memory"), ("again", "x, seed once more", "kept")],
            [("e", "same words, GELU'(x + bias)", "work")],
            [("dx", "dx", "memory"), ("db", "dbias: sums of rows, fixed order", "memory")],
        ],
        "x>a b>a s>a a>d d>y dy>e again>e e>dx e>db",
        [(1, 2, "forward"), (5, 5, "backward")],
    ),
    "attention": Flow(
        "Attention forward and backward, block by block",
        [
            [("q", "query block", "kept"), ("k", "key block", "kept"), ("v", "value block", "kept")],
            [("t", "t = scale q kᵀ, cap, bias, ALiBi", "work"), ("m", "masks: -inf", "work")],
            [("o", "running maximum and sum; acc += exp(t - max) v", "work")],
            [("out", "out", "kept"), ("lse", "lse, two floats a row", "kept")],
            [("dout", "dout", "memory"), ("all", "q, k, v, out, lse", "kept")],
            [("p", "p = exp(t - lse) again", "work"), ("delta", "<dout, out> a row", "work")],
            [("ds", "ds = p (dout vᵀ - <dout, out>)", "work")],
            [
                ("dq", "dq = ds k", "memory"),
                ("dk", "dk = dsᵀ q", "memory"),
                ("dv", "dv = pᵀ dout", "memory"),
                ("dbias", "dbias", "memory"),
            ],
        ],
        "q>t k>t v>m t>o m>o o>out o>lse dout>p all>delta p>ds delta>ds ds>dq ds>dk ds>dv ds>dbias",
        [(1, 2, "key block after key block"), (5, 6, "the same blocks")],
    ),
    "recurrent": Flow(
        "A recurrent layer: one product before the loop, the loop, one product for each gradient after it",
        [
            [("x", "x, all tokens", "kept"), ("wih", "W_ih, b", "memory")],
            [("xw", "W_ih x + b: one product for all tokens", "memory")],
            [("gate", "gates = xw_t + W_hh h: W_hh stays packed", "work")],
            [("cell", "cell: h_t, c_t", "work")],
            [("y", "y: all h", "kept"), ("g", "gates", "kept"), ("c", "c", "kept")],
            [("dy", "dy", "memory"), ("saved", "gates, c", "kept")],
            [("back", "dh += W_hhᵀ dgates; cell'", "work")],
            [("dg", "dgates, all tokens", "memory")],
            [("dx", "dx", "memory"), ("dwi", "dW_ih", "memory"), ("dwh", "dW_hh", "memory"), ("db", "db", "memory")],
        ],
        "x>xw wih>xw xw>gate gate>cell cell>y cell>g cell>c dy>back saved>back back>dg dg>dx dg>dwi dg>dwh dg>db",
        [(2, 3, "t = 1 ... T"), (6, 6, "t = T ... 1")],
    ),
    "embedding": Flow(
        "A bag forward; its gradient, or the optimizer's step in its place",
        [
            [("ids", "ids, offsets", "kept"), ("table", "table, V rows of D", "memory")],
            [("bag", "rows asked for ahead; sum, mean or max in registers", "work")],
            [("y", "y, a row for each bag", "memory")],
            [("dy", "dy", "memory"), ("sort", "positions sorted by id (stable)", "memory")],
            [("run", "one run of equal ids: its sum, in order", "work")],
            [
                ("grad", "gradient: dense, or|coalesced rows", "memory"),
                ("step", "pykernels.optim: the row and|its state stepped, no gradient", "memory"),
            ],
        ],
        "ids>bag table>bag bag>y dy>run sort>run run>grad run>step",
        [(1, 1, ""), (4, 4, "")],
    ),
    "sampled_softmax": Flow(
        "Losses over many classes: logits exist as tiles only",
        [
            [("x", "input, N x D", "kept"), ("w", "weight: all rows, or the sample's", "memory")],
            [("tile", "a tile of logits, 256 x 480 on a CPU", "work")],
            [("fix", "+ bias - log E, hits to -inf; running max, sum", "work")],
            [("loss", "loss", "memory"), ("lse", "max and log-sum, a row", "kept")],
            [("dl", "dloss", "memory"), ("again", "input, weight, max, log-sum", "kept")],
            [("soft", "the tile again: softmax - label", "work")],
            [("dx", "dinput = tile · weight", "memory"), ("dw", "dweight = tileᵀ · input", "memory")],
        ],
        "x>tile w>tile tile>fix fix>loss fix>lse dl>soft again>soft soft>dx soft>dw",
        [(1, 2, "tile after tile"), (5, 5, "tile after tile")],
    ),
}


def pictures() -> dict[str, str]:
    return {"attention_masks.svg": masks(), **{f"{room}_flow.svg": draw(flow) for room, flow in FLOWS.items()}}


def main(check: bool) -> int:
    stale = 0
    for name, drawn in pictures().items():
        path = DOCS / name
        if not check:
            path.write_text(drawn)
        elif not path.exists() or path.read_text() != drawn:
            print(f"docs/{name}: run python benchmarks/pictures.py")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
