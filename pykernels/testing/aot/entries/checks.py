"""Ids and ends of sequences, looked at before other kernels."""

from __future__ import annotations

import torch

from ..dryrun import room
from ..rules import Entry, Rules

IDS, ENDS = torch.zeros(65536, dtype=torch.int64), torch.zeros(1025, dtype=torch.int64)

ENTRIES = [
    Entry(
        f"checks {kind}",
        lambda values=values, kind=kind: room("checks").check_values(values, "f", "x", kind, 100_000, -1, False),
        Rules(),
        (80, 90),
    )
    for kind, values in (("ids", IDS), ("ends", ENDS))
]
