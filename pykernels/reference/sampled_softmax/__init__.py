"""Losses over a sample of the classes, in plain torch. Autograd of these functions is the truth for gradients."""

from __future__ import annotations

from .linear import *  # noqa: F403
from .losses import *  # noqa: F403
from .samplers import *  # noqa: F403
from .tables import *  # noqa: F403
from .word2vec import *  # noqa: F403
