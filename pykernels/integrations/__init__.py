"""Other packages on our kernels. Nothing of theirs, nor torch.distributed, is imported before it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from . import transformers

__all__ = ["distributed", "hub", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
