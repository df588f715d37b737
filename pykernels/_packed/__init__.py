"""What both GPU floors of the recurrent room do in torch, around time loops of their own."""

from __future__ import annotations

from .floor import GATES, Backward, Floor, Forward, unserved
from .rows import RowsBackward, RowsFloor, RowsForward
from .steps import Steps, Visit

__all__ = [
    "GATES", "Backward", "Floor", "Forward", "RowsBackward", "RowsFloor", "RowsForward", "Steps", "Visit", "unserved",
]  # fmt: skip
