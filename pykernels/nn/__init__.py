"""Modules with torch.nn's constructors, forward and state_dict, and the fused kernels inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .activation import *  # noqa: F403
from .attention import *  # noqa: F403
from .embedding import *  # noqa: F403
from .recurrent import *  # noqa: F403
from .sampled_softmax import *  # noqa: F403
from .transformer import *  # noqa: F403

if not TYPE_CHECKING:  # type checkers read the stars; a computed list would hide every name from them
    from .activation import __all__ as _activation
    from .attention import __all__ as _attention
    from .embedding import __all__ as _embedding
    from .recurrent import __all__ as _recurrent
    from .sampled_softmax import __all__ as _sampled_softmax
    from .transformer import __all__ as _transformer

    __all__ = [*_activation, *_attention, *_embedding, *_recurrent, *_sampled_softmax, *_transformer]
