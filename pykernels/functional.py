"""Every operator as a function. Where `torch` or `torch.nn.functional` has it: the same name, arguments and results."""

from __future__ import annotations

from .ops.activation import *  # noqa: F403
from .ops.attention import *  # noqa: F403
from .ops.embedding import *  # noqa: F403
from .ops.recurrent import *  # noqa: F403
from .ops.sampled_softmax import *  # noqa: F403
