"""Attention: torch's scaled dot product attention, `attention` with every mask, bias and layout, and `attention_decode`
for generation with a cache.

One kernel forward and one backward on every backend, O(L) memory: the scores are made block by block and never stored.
"""

from __future__ import annotations

from .attend import *  # noqa: F403
from .attend import __all__ as _attend
from .decode import *  # noqa: F403
from .decode import __all__ as _decode
from .sdpa import *  # noqa: F403
from .sdpa import __all__ as _sdpa
from .sdpa import attention_and_weights as attention_and_weights

__all__ = [*_attend, *_decode, *_sdpa]
