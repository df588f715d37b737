"""pykernels: fused attention, recurrent, activation, embedding and sampled-softmax kernels for PyTorch.

`pykernels.functional` (functions), `pykernels.nn` (modules) and `pykernels.reference` (the pure-torch twins) hold the
same operators. `explain` tells which backend serves a call and why.
"""

from __future__ import annotations

__version__ = "0.1.0"

import importlib
from typing import Any

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"pykernels needs torch 2.11 or later, this is {torch.__version__}: pip install --upgrade torch")

from . import functional, integrations, nn, optim, reference
from ._backends import BackendError, Explanation, explain, sm90_kernels
from ._errors import check_errors
from ._pool import OutputPool, empty_cache, output_pool, set_output_pool
from .patching import PatchReport, patch, unpatch

__all__ = [
    "BackendError",
    "Explanation",
    "OutputPool",
    "PatchReport",
    "__version__",
    "check_errors",
    "empty_cache",
    "explain",
    "functional",
    "integrations",
    "nn",
    "optim",
    "output_pool",
    "patch",
    "reference",
    "set_output_pool",
    "sm90_kernels",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """`pykernels.word2vec`, the trainer, imported when somebody asks for it."""
    if name == "word2vec":
        return importlib.import_module(f"{__name__}.word2vec")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
