"""The pure-torch twins of `pykernels.functional`: same names and arguments (no `backend`), any device, any dtype."""

from __future__ import annotations

from .activation import *  # noqa: F403
from .attention import *  # noqa: F403
from .embedding import *  # noqa: F403
from .recurrent import *  # noqa: F403
from .sampled_softmax import *  # noqa: F403
