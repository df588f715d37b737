"""The demo's page: one HTML file with its plots inside, nothing to load from anywhere."""

from __future__ import annotations

import math
from html import escape

from ...testing.training import CURVE_BOUND, Outcome
from .._page import document
from .._plot import Series, bars, lines
from .table import NO_SPEED, megabytes, notes, rows, served


def page(
    outcomes: list[Outcome], facts: list[str], heading: str = "Three language models, trained twice", more: str = ""
) -> str:
    """The whole page. `facts`: text, versions and machine, one line each; `more`: HTML before them."""
    if all(outcome.equal for outcome in outcomes):
        verdict = '<b class="good">The losses are equal.</b>'
    else:
        wrong = ", ".join(outcome.task.name for outcome in outcomes if not outcome.equal)
        verdict = f'<b class="bad">The losses of {escape(wrong)} differ.</b>'
    body = f"""<p>Once as stock PyTorch, once patched by pykernels: same seed, same parameters, same batches.
{verdict}</p>
<p class="key"><span><i style="background:var(--stock);height:6px"></i>stock PyTorch</span>
<span><i style="background:var(--ours);height:3px"></i>pykernels</span></p>
<div class="models">{"".join(_model(outcome) for outcome in outcomes)}</div>
<h2>Figures</h2><div class="scroll">{_table(outcomes)}</div>
{"".join(f'<p class="quiet">{escape(note)}</p>' for note in notes())}
{f'<h2>Which backend served</h2><div class="scroll">{_served(outcomes)}</div>' if served(outcomes) else ""}{more}"""
    return document("pykernels", heading, body, facts)


def _model(outcome: Outcome) -> str:
    stock, ours = outcome.stock, outcome.ours
    loss = lines(
        [Series("stock PyTorch", stock.losses, "stock", 6), Series("pykernels", ours.losses, "ours", 2)],
        f"Loss of {outcome.task.name} against the training step",
    )
    difference = lines(
        [Series("difference", outcome.differences, "ours", 1.2)],
        f"Relative difference of the two losses of {outcome.task.name}, logarithmic",
        height=120,
        log=True,
        limit=(CURVE_BOUND, "bound"),
    )
    if outcome.equal:
        rates = [outcome.rate(side) for side in (stock, ours)]
        ratio = f"{outcome.speed_ratio[0]:.2f}x"
    else:  # a wrong training has no speed
        rates, ratio = [math.nan, math.nan], NO_SPEED
    peaks = [side.peak for side in (stock, ours)]
    names = (("stock PyTorch", "stock"), ("pykernels", "ours"))
    speed = bars(
        [Series(name, [rate], color) for (name, color), rate in zip(names, rates, strict=True)],
        f"Training speed of {outcome.task.name}",
        [f"{rate:,.0f}" if outcome.equal else NO_SPEED for rate in rates],
    )
    memory = bars(
        [Series(name, [peak], color) for (name, color), peak in zip(names, peaks, strict=True)],
        f"Peak memory of {outcome.task.name}",
        [megabytes(peak) for peak in peaks],
    )
    return (
        f'<section class="model"><h3>{escape(outcome.task.title)}</h3><p class="quiet">{escape(outcome.task.shape)}</p>'
        f"<h4>Loss <span>by step</span></h4>{loss}<h4>Difference of the losses <span>relative</span></h4>{difference}"
        f"<h4>Tokens a second <span>pykernels / stock <b>{ratio}</b></span></h4>{speed}"
        f"<h4>Peak memory <span>stock / pykernels <b>{outcome.memory_ratio:.2f}x</b></span></h4>{memory}</section>"
    )


def _table(outcomes: list[Outcome]) -> str:
    head = "".join(f"<th>{escape(outcome.task.name)}</th>" for outcome in outcomes)
    body = []
    for label, cells in rows(outcomes):
        if not cells:
            body.append(f'<tr class="group"><td colspan="{len(outcomes) + 1}">{escape(label)}</td></tr>')
        else:
            body.append(f"<tr><td>{escape(label)}</td>{''.join(_cell(cell) for cell in cells)}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(cell: str) -> str:
    style = {"equal": ' class="good"', "DIFFERENT": ' class="bad"'}.get(cell, "")
    return f"<td{style}>{escape(cell)}</td>"


def _served(outcomes: list[Outcome]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("operator", "in", "backend"))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in served(outcomes))
    return f'<table class="left"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
