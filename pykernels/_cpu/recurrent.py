"""The recurrent room on native CPU code. Importing this loads `_cpu_ext`, which adds the `.cpu` implementations of
csrc/cpu/recurrent_ops.cpp to the operators that pykernels/ops/recurrent defines (in either order)."""

from __future__ import annotations

from importlib import import_module

import torch

# Not `from .. import _cpu_ext`: where it is not built that is an ImportError which does not name the module.
_BUILD = import_module(".._cpu_ext", __package__).build_info()

_REFUSAL: str = _BUILD["isa_refusal"]
_SERVED = frozenset(("proj_size", "peephole", "layer_norm", "zoneout"))
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def unsupported(x: torch.Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, or one of the features; None: they can."""
    if x.device.type != "cpu":
        return f"the native CPU kernels take CPU tensors, not {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"the native CPU kernels take float32, bfloat16 and float16, not {x.dtype}"
    missing = [feature for feature in features if feature not in _SERVED]
    if missing:
        return f"the native CPU kernels do not serve {' and '.join(missing)}"
    return _REFUSAL or None
