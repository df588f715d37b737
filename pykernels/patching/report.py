"""What `patch` did to every module of a model, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["patched", "already", "left"]


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: its first name in the model; "" is the model itself.
        kind: its class before.
        status: "patched" (now), "already" (a pykernels module before this call) or "left".
        detail: the class it has now, or why it was left.
    """

    name: str
    kind: str
    status: Status
    detail: str


@dataclass
class PatchReport:
    """Every module of the model, in the order of `named_modules`. Prints as a table, one line for equal fates.

    Attributes:
        entries: one of each module.
    """

    entries: list[Entry] = field(default_factory=list)

    @property
    def patched(self) -> list[str]:
        """Names of the modules swapped by this call."""
        return [entry.name for entry in self.entries if entry.status == "patched"]

    @property
    def left(self) -> dict[str, str]:
        """Name -> why it was left."""
        return {entry.name: entry.detail for entry in self.entries if entry.status == "left"}

    def as_dict(self) -> list[dict[str, Any]]:
        """The entries as plain data."""
        return [vars(entry).copy() for entry in self.entries]

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for entry in self.entries:
            groups.setdefault((entry.status, entry.kind, entry.detail), []).append(entry.name or "(the model)")
        order = ("patched", "already", "left")
        keys = sorted(groups, key=lambda key: order.index(key[0]))
        lines = [(kind, str(len(groups[key])), status, detail, _some(groups[key])) for key in keys
                 for status, kind, detail in (key,)]  # fmt: skip
        count = len(self.patched)
        head = f"pykernels.patch: {count} of {len(self.entries)} modules swapped"
        return "\n".join([head, *_columns([("kind", "count", "fate", "now, or why not", "names"), *lines])])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
