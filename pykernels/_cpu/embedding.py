"""The embedding room on native CPU code. Importing this loads `_cpu_ext`, which adds the `.cpu` implementations of
csrc/cpu/embedding.cpp, embedding_backward.cpp and others to the operators that pykernels/ops/embedding defines (in
either order)."""

from __future__ import annotations

from importlib import import_module

import torch

# Not `from .. import _cpu_ext`: where it is not built that is an ImportError which does not name the module.
_BUILD = import_module(".._cpu_ext", __package__).build_info()

_REFUSAL: str = _BUILD["isa_refusal"]
_SERVED = frozenset(("quantised rows", "samples of more than 160 KiB"))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def unsupported(x: torch.Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve a table of this device and dtype, or one of the features; None: they can."""
    if x.device.type != "cpu":
        return f"the native CPU kernels take CPU tensors, not {x.device.type}"
    quantised = "quantised rows" in features and x.dtype == torch.uint8
    if x.dtype not in _DTYPES and not quantised:
        return f"the native CPU kernels take float32, float64, bfloat16 and float16, not {x.dtype}"
    if type(x).__name__ == "DTensor":
        return "the native CPU kernels have no sharding rule for DTensor"
    refused = [feature for feature in features if feature not in _SERVED]
    if refused:
        return f"the native CPU kernels do not serve {' and '.join(refused)}"
    return _REFUSAL or None
