"""Ids and ends of sequences, looked at before other kernels."""

from __future__ import annotations

import torch

from ..dryrun import room
from ..rules import Entry, Rules

IDS, ENDS = torch.zeros(65536, dtype=torch.int64), torch.zeros(1025, dtype=torch.int64)


def entry(kind: str, values: torch.Tensor) -> Entry:
    arguments = (values, "f", "x", kind, 100_000, -1, False)
    return Entry(f"checks {kind}", lambda: room("checks").check_values(*arguments), Rules(), (80, 90))


ENTRIES = [entry("ids", IDS), entry("ends", ENDS)]
