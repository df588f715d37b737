"""What both GPU floors of the recurrent room do in torch, around time loops of their own."""

from __future__ import annotations

from .floor import GATES, SERVED, Backward, Floor, Forward
from .steps import Steps, Visit

__all__ = ["GATES", "SERVED", "Backward", "Floor", "Forward", "Steps", "Visit"]
