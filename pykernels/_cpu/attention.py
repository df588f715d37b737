"""The attention room on native CPU code. Importing this loads `_cpu_ext`, which adds the `.cpu` implementations of
csrc/cpu/attention.cpp to the operators that pykernels/ops/attention defines (in either order)."""

from __future__ import annotations

from importlib import import_module

import torch

# Not `from .. import _cpu_ext`: where it is not built that is an ImportError which does not name the module.
_REFUSAL: str = import_module(".._cpu_ext", __package__).build_info()["isa_refusal"]
_SERVED = frozenset(("head sizes above 256", "more than 2^30 keys a sequence"))
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def unsupported(x: torch.Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, or such a call; None: they can."""
    if x.device.type != "cpu":
        return f"the native CPU kernels take CPU tensors, not {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"the native CPU kernels of attention take float32, bfloat16 and float16, not {x.dtype}"
    refused = [feature for feature in features if feature not in _SERVED]
    if refused:
        return f"the native CPU kernels of attention do not serve: {', '.join(refused)}"
    return _REFUSAL or None
