"""Losses over a sample of the classes or over all of them without their logits, and the samplers that go with them."""

from __future__ import annotations

from .linear import *  # noqa: F403
from .losses import *  # noqa: F403
from .samplers import *  # noqa: F403
from .tables import *  # noqa: F403
from .word2vec import *  # noqa: F403
