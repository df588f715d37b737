"""Every operator as a function. Where `torch` or `torch.nn.functional` has it: the same name, arguments and results."""

from __future__ import annotations

from .ops.activation import *  # noqa: F403
