"""Attention: torch's scaled dot product attention, `attention` with every mask, bias and layout, and `attention_decode`
for generation with a cache.

One kernel forward and one backward on every backend, O(L) memory: the scores are made block by block and never stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attend import *  # noqa: F403
from .decode import *  # noqa: F403
from .sdpa import *  # noqa: F403
from .sdpa import attention_and_weights as attention_and_weights

if not TYPE_CHECKING:  # type checkers read the stars; a computed list would hide every name from them
    from .attend import __all__ as _attend
    from .decode import __all__ as _decode
    from .sdpa import __all__ as _sdpa

    __all__ = [*_attend, *_decode, *_sdpa]
