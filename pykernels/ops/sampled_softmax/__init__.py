"""Losses over a sample of the classes or over all of them without their logits, and the samplers that go with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .linear import *  # noqa: F403
from .losses import *  # noqa: F403
from .samplers import *  # noqa: F403
from .tables import *  # noqa: F403
from .word2vec import *  # noqa: F403

if not TYPE_CHECKING:  # type checkers read the stars; a computed list would hide every name from them
    from .linear import __all__ as _linear
    from .losses import __all__ as _losses
    from .samplers import __all__ as _samplers
    from .tables import __all__ as _tables
    from .word2vec import __all__ as _word2vec

    __all__ = [*_linear, *_losses, *_samplers, *_tables, *_word2vec]
