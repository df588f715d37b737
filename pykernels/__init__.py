"""pykernels: fused attention, recurrent, activation, embedding and sampled-softmax kernels for PyTorch.

`pykernels.functional` (functions), `pykernels.nn` (modules) and `pykernels.reference` (the pure-torch twins) hold the
same operators. `explain` tells which backend serves a call and why.
"""

from __future__ import annotations

__version__ = "0.1.0"

from . import functional, nn, optim, reference
from ._backends import BackendError, Explanation, explain
from ._errors import check_errors
from .patching import PatchReport, patch, unpatch

__all__ = [
    "BackendError",
    "Explanation",
    "PatchReport",
    "__version__",
    "check_errors",
    "explain",
    "functional",
    "nn",
    "optim",
    "patch",
    "reference",
    "unpatch",
]
