"""Lookup, bags over one table and many, quantised tables, interaction, fused row updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .interaction import *  # noqa: F403
from .lookup import *  # noqa: F403
from .multi import *  # noqa: F403
from .quantized import *  # noqa: F403
from .update import *  # noqa: F403

if not TYPE_CHECKING:  # type checkers read the stars; a computed list would hide every name from them
    from .interaction import __all__ as _interaction
    from .lookup import __all__ as _lookup
    from .multi import __all__ as _multi
    from .quantized import __all__ as _quantized
    from .update import __all__ as _update

    __all__ = [*_interaction, *_lookup, *_multi, *_quantized, *_update]
