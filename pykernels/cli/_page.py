"""The frame of an HTML page that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ._plot import STYLE

_PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 48px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3em; } h2 { font-size: 1.15rem; margin: 2em 0 .6em; }
h3 { font-size: 1.05rem; margin: 0; } p { margin: .3em 0; max-width: 48rem; }
.quiet { color: var(--quiet); font-size: .85rem; }
.models { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.model:only-child { max-width: 480px; }
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


def document(title: str, heading: str, body: str, facts: Sequence[str]) -> str:
    """The whole page. `body`: HTML; `facts`: text, versions and machine, one line each."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}{_PAGE_STYLE}</style></head><body>
<h1>{escape(heading)}</h1>
{body}
<h2>Where</h2>{"".join(f'<p class="quiet">{escape(fact)}</p>' for fact in facts)}
</body></html>
"""
