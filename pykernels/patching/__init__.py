"""Swaps the modules of a model for ours, in place: `patch`, `unpatch`, and the registry of what becomes what.

A swapped module stays the same object: only its class changes. So parameters, buffers, hooks, names, the training mode
and every reference that somebody holds to it (parents, optimizers, lists, DDP, FSDP) stay what they were.

Integrations extend the registry: `register(Rule(torch_class, our_class))`, or a module named in `PROVIDERS`.
"""

from __future__ import annotations

from ._patch import patch, unpatch
from .registry import PROVIDERS, Rule, has_hooks, leave, register
from .report import Entry, PatchReport

__all__ = ["PROVIDERS", "Entry", "PatchReport", "Rule", "has_hooks", "leave", "patch", "register", "unpatch"]
