"""Every operator as a function. Where `torch` or `torch.nn.functional` has it: the same name, arguments and results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .ops.activation import *  # noqa: F403
from .ops.attention import *  # noqa: F403
from .ops.embedding import *  # noqa: F403
from .ops.recurrent import *  # noqa: F403
from .ops.sampled_softmax import *  # noqa: F403

if not TYPE_CHECKING:  # type checkers read the stars; a computed list would hide every name from them
    from .ops.activation import __all__ as _activation
    from .ops.attention import __all__ as _attention
    from .ops.embedding import __all__ as _embedding
    from .ops.recurrent import __all__ as _recurrent
    from .ops.sampled_softmax import __all__ as _sampled_softmax

    __all__ = [*_activation, *_attention, *_embedding, *_recurrent, *_sampled_softmax]
