"""When the kernels for compute capability 9.0 alone (csrc/cuda/*_sm90.cu) serve in place of those for every GPU.

`pykernels.sm90_kernels` sets the mode:

    auto    where a GPU record in benchmarks/results shows them faster: FASTER, which is empty as yet
    always  every call they can serve; a call on a GPU they do not run on is refused
    never
"""

from __future__ import annotations

import torch

from ._extension import Extension

MODES = ("auto", "always", "never")

#: (kernel, dtype, head size) measured ahead of the kernels for every GPU.
FASTER: frozenset[tuple[str, torch.dtype, int]] = frozenset()

mode = "auto"


def refusal(ext: Extension, device: torch.device) -> str | None:
    """Why these kernels, where they are demanded, cannot run on this device, or None."""
    return unavailable(ext, device) if mode == "always" else None


def unavailable(ext: Extension, device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None. The emulator has the whole instruction set."""
    if ext.name == "_emulator_ext" or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the kernels for sm_90a run on compute capability 9.0 alone, this GPU has {major}.{minor}"
    if "90a" not in ext.architectures:
        return f"{ext.name} was built without sm_90a (for {', '.join(ext.architectures)})"
    return None


def declined(ext: Extension, device: torch.device, kernel: str, dtype: torch.dtype, size: int) -> str | None:
    """Why the other kernels serve a call that these could serve, or None."""
    if mode == "always":
        return None
    if mode == "never":
        return 'sm90_kernels("never")'
    if (kernel, dtype, size) not in FASTER:
        return 'no GPU record shows the kernels for sm_90a faster; sm90_kernels("always") takes them'
    return unavailable(ext, device)
