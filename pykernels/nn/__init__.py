"""Modules with torch.nn's constructors, forward and state_dict, and the fused kernels inside."""

from __future__ import annotations

from .activation import *  # noqa: F403
from .attention import *  # noqa: F403
from .embedding import *  # noqa: F403
from .recurrent import *  # noqa: F403
from .sampled_softmax import *  # noqa: F403
from .transformer import *  # noqa: F403
