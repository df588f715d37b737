"""The demo's page: one HTML file with its plots inside, nothing to load from anywhere."""

from __future__ import annotations

from html import escape

from ...testing.training import CURVE_BOUND, Outcome
from .._plot import STYLE, Series, bars, lines
from .table import megabytes, notes, rows, served

_PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 48px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3em; } h2 { font-size: 1.15rem; margin: 2em 0 .6em; }
h3 { font-size: 1.05rem; margin: 0; } p { margin: .3em 0; max-width: 48rem; }
.quiet { color: var(--quiet); font-size: .85rem; }
.models { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.model { border: 1px solid var(--rule); border-radius: 10px; padding: 16px; min-width: 0; }
.model h4 { font-size: .85rem; font-weight: 600; margin: 1.1em 0 .2em; display: flex; gap: .6em;
  justify-content: space-between; }
@supports (grid-template-rows: subgrid) { .model { display: grid; grid-row: span 10; grid-template-rows: subgrid;
  grid-template-columns: minmax(0, 1fr); gap: 0; align-items: start; } }
.model h4 span { font-weight: 400; color: var(--quiet); } .model h4 b { font-weight: 600; color: var(--ink); }
.key { display: flex; flex-wrap: wrap; gap: .3em 1.2em; margin: .8em 0 1.2em; } .key i { display: inline-block;
  width: 22px; border-radius: 2px; vertical-align: middle; margin-right: .5em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; width: 100%; max-width: 760px;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3em .6em; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, .left td, .left th { text-align: left; } .left td { white-space: normal; }
tr.group td { font-weight: 600; padding-top: 1.1em; text-align: left; white-space: normal; }
td:first-child { overflow-wrap: anywhere; }
.model h4 { white-space: nowrap; flex-wrap: wrap; gap: 0 .6em; }
@media (max-width: 480px) { body { padding: 16px 10px 32px; } table { font-size: .72rem; } .model { padding: 12px; }
  th, td { padding: .3em .25em; } .left td { min-width: 4em; } .model h4 { font-size: .8rem; } }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 700; }
"""


def page(outcomes: list[Outcome], facts: list[str]) -> str:
    """The whole page. `facts`: text, versions and machine, one line each."""
    if all(outcome.equal for outcome in outcomes):
        verdict = '<b class="good">The losses are equal.</b>'
    else:
        wrong = ", ".join(outcome.task.name for outcome in outcomes if not outcome.equal)
        verdict = f'<b class="bad">The losses of {escape(wrong)} differ.</b>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pykernels demo</title><style>{STYLE}{_PAGE_STYLE}</style></head><body>
<h1>Three language models, trained twice</h1>
<p>Once as stock PyTorch models, once patched by pykernels: same seed, same parameters, same batches. {verdict}</p>
<p class="key"><span><i style="background:var(--stock);height:6px"></i>stock PyTorch</span>
<span><i style="background:var(--ours);height:3px"></i>pykernels</span></p>
<div class="models">{"".join(_model(outcome) for outcome in outcomes)}</div>
<h2>Figures</h2><div class="scroll">{_table(outcomes)}</div>
{"".join(f'<p class="quiet">{escape(note)}</p>' for note in notes())}
<h2>Which backend served</h2><div class="scroll">{_served(outcomes)}</div>
<h2>Where</h2>{"".join(f'<p class="quiet">{escape(fact)}</p>' for fact in facts)}
</body></html>
"""


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
    rates = [outcome.rate(side) for side in (stock, ours)]
    peaks = [side.peak for side in (stock, ours)]
    names = (("stock PyTorch", "stock"), ("pykernels", "ours"))
    speed = bars(
        [Series(name, [rate], color) for (name, color), rate in zip(names, rates, strict=True)],
        f"Training speed of {outcome.task.name}",
        [f"{rate:,.0f}" for rate in rates],
    )
    memory = bars(
        [Series(name, [peak], color) for (name, color), peak in zip(names, peaks, strict=True)],
        f"Peak memory of {outcome.task.name}",
        [megabytes(peak) for peak in peaks],
    )
    return (
        f'<section class="model"><h3>{escape(outcome.task.title)}</h3><p class="quiet">{escape(outcome.task.shape)}</p>'
        f"<h4>Loss <span>by step</span></h4>{loss}<h4>Difference of the losses <span>relative</span></h4>{difference}"
        f"<h4>Tokens a second <span>pykernels / stock <b>{outcome.speed_ratio[0]:.2f}x</b></span></h4>{speed}"
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
