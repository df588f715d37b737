"""Attention: torch's scaled dot product attention, and `attention` with every mask, bias and layout.

One kernel forward and one backward on every backend, O(L) memory: the scores are made block by block and never stored.
"""

from __future__ import annotations

from .attend import *  # noqa: F403
from .attend import __all__ as _attend
from .sdpa import *  # noqa: F403
from .sdpa import __all__ as _sdpa
from .sdpa import attention_and_weights as attention_and_weights

__all__ = [*_attend, *_sdpa]
