"""The sampled_softmax room on native CPU code. Importing this loads `_cpu_ext`, which adds the `.cpu` implementations
of csrc/cpu/sampled_softmax*.cpp to the operators that pykernels/ops/sampled_softmax defines (in either order)."""

from __future__ import annotations

from importlib import import_module

import torch

# Not `from .. import _cpu_ext`: where it is not built that is an ImportError which does not name the module.
_BUILD = import_module(".._cpu_ext", __package__).build_info()

_REFUSAL: str = _BUILD["isa_refusal"]
_IDS = frozenset((torch.int32, torch.int64))  # what a sampler is asked with
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16)) | _IDS


def unsupported(x: torch.Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, or one of the features; None: they can."""
    if x.device.type != "cpu":
        return f"the native CPU kernels take CPU tensors, not {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"the native CPU kernels take float32, bfloat16 and float16, not {x.dtype}"
    if type(x).__name__ == "DTensor":
        return "the native CPU kernels have no sharding rule for DTensor"
    if "word2vec_step_" in features and x.dtype != torch.float32:
        return f"the native training step of word2vec takes float32, not {x.dtype}"
    others = [feature for feature in features if feature != "word2vec_step_"]
    if others:
        return f"the native CPU kernels do not serve {' and '.join(others)}"
    return _REFUSAL or None
