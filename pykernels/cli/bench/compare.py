"""What became slower between two records. Ratios against peers are judged: a busy or another machine changes them
least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ...testing.bench import OURS

Record = dict[str, Any]
VERDICTS = ("wrong", "worse", "gone", "better", "same", "new")
Spread = tuple[float, float, float]
"""Median, p20, p80."""


@dataclass(frozen=True)
class Change:
    """A row of both records, or of one.

    Attributes:
        old, new: ratio (or speed, calls a second), with its spread; None where the row is not there or has no speed.
        verdict: of VERDICTS; "wrong": its check fails now.
    """

    row: str
    peer: str
    old: Spread | None
    new: Spread | None
    verdict: str

    @property
    def factor(self) -> float | None:
        """New / old: below 1, it became slower."""
        return self.new[0] / self.old[0] if self.old and self.new else None


def compare(new: Record, old: Record, threshold: float = 0.1, absolute: bool = False) -> list[Change]:
    """Every row of either record, the worst first.

    A row is worse when its figure fell by more than `threshold` (0.1: ten percent) and the two spreads (20th to 80th
    percentile of the rounds) do not meet: what lies within the noise of either run is no change.

    Args:
        absolute: judge our own times in place of ratios; sensible on one idle machine only.
    """
    before, after = (dict(_figures(record, absolute)) for record in (old, new))
    found = []
    for name in dict.fromkeys((*before, *after)):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            found.append(Change(name, "", None, None, "new" if was is None else "gone"))
            continue
        # The old best peer, so that a peer which one run lacks is not taken for a change of ours.
        peer = was["best"] if was["best"] in now["spreads"] else now["best"]
        a, b = was["spreads"].get(peer), now["spreads"].get(peer)
        if now["wrong"]:
            found.append(Change(name, peer, a, None, "wrong"))
        elif a and b:
            found.append(Change(name, peer, a, b, _verdict(a, b, threshold)))
        elif was["spreads"] or now["spreads"]:  # no peer in common
            found.append(Change(name, peer, a, b, "gone" if was["spreads"] else "new"))
    return sorted(found, key=lambda change: (VERDICTS.index(change.verdict), change.factor or 0.0))


def _verdict(old: Spread, new: Spread, threshold: float) -> str:
    if new[0] < old[0] * (1 - threshold) and new[2] < old[1]:
        return "worse"
    return "better" if new[0] > old[0] / (1 - threshold) and new[1] > old[2] else "same"


def _figures(record: Record, absolute: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a row -> {"best": peer, "spreads": peer -> figure, "wrong": bool}. The backend is in the name only where
    a record has several: one that serves in place of another is judged by its speed."""
    work = [" ".join((row["op"], row["shape"], row["dtype"], row["direction"])) for row in record["rows"]]
    times = Counter(work)
    for row, name in zip(record["rows"], work, strict=True):
        name = f"{name} {row['backend']}" if times[name] > 1 else name
        spreads: dict[str, Spread] = {}
        ours = row["seconds"].get(OURS)
        if ours and absolute:
            spreads["(time)"] = 1 / ours["median"], 1 / ours["p80"], 1 / ours["p20"]
        elif ours:
            for peer, t in row["seconds"].items():
                if peer not in (OURS, "copy"):
                    spreads[peer] = t["median"] / ours["median"], t["p20"] / ours["p80"], t["p80"] / ours["p20"]
            if row["ratio"]:  # taken round by round, which is narrower
                spreads[row["best_peer"]] = _spread(row["ratio"])
        best = "(time)" if absolute else row["best_peer"] or ""
        yield name, {"best": best, "spreads": spreads, "wrong": not row["correct"]}
    for row in record.get("word2vec", {}).get("rows", ()) if not absolute else ():
        yield (
            f"word2vec {row['variant']}",
            {"best": "gensim", "spreads": {"gensim": _spread(row["ratio"])}, "wrong": False},
        )


def _spread(ratio: Record) -> Spread:
    return ratio["median"], ratio["p20"], ratio["p80"]


def table(changes: list[Change]) -> Table:
    """What changed; rows that did not are counted by the caller."""
    found = Table(box=None, padding=(0, 2, 0, 0))
    found.add_column("row")
    found.add_column("peer")
    for name in ("old", "new", "new / old"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("")
    for change in changes:
        if change.verdict in ("same", "new"):
            continue
        figures = [f"{s[0]:.3g} ({s[1]:.3g}-{s[2]:.3g})" if s else "-" for s in (change.old, change.new)]
        factor = f"{change.factor:.2f}" if change.factor else "-"
        style = "bold red" if change.verdict in ("worse", "wrong") else "green" if change.verdict == "better" else ""
        found.add_row(change.row, change.peer, *figures, factor, Text(change.verdict, style=style))
    return found
