"""Other packages on our kernels. Nothing of theirs is imported before it is asked for."""

from __future__ import annotations

from . import transformers

__all__ = ["transformers"]
