"""Activation functions: sigmoid, tanh, the ReLU family, GELU, SiLU/Swish, and the gated linear units.

Each is one kernel forward and one backward on every backend. Saved for backward: the pre-activation alone (the output
for sigmoid, tanh and relu, as torch does); everything else is recomputed. The gated forms save gate and up, or the one
tensor that holds both, and nothing of the size of their output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .feed_forward import *  # noqa: F403
from .fused import *  # noqa: F403
from .gated import *  # noqa: F403
from .unary import *  # noqa: F403

if not TYPE_CHECKING:  # type checkers read the stars; a computed list would hide every name from them
    from .feed_forward import __all__ as _feed_forward
    from .fused import __all__ as _fused
    from .gated import __all__ as _gated
    from .unary import __all__ as _unary

    __all__ = [*_feed_forward, *_fused, *_gated, *_unary]
