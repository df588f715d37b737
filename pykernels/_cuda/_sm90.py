"""When the kernels for compute capability 9.0 alone (csrc/cuda/*_sm90.cu) serve in place of those for every GPU.

`pykernels.sm90_kernels` sets the mode, for all rooms that have such kernels:

    auto    where a GPU record in benchmarks/results shows them faster: FASTER, which is empty as yet
    always  every call they can serve; a call on a GPU they do not run on is refused
    never
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._extension import Extension

MODES = ("auto", "always", "never")


class Kernels(NamedTuple):
    """Kernels that a record judges together. name: "attention", "lstm" or "gru"; general: attention's for what is more
    than masks by position."""

    name: str
    backward: bool
    dtype: torch.dtype
    general: bool = False


#: -> head sizes or hidden sizes, first and last, at which a record shows them ahead of the kernels for every GPU.
FASTER: dict[Kernels, tuple[int, int]] = {}

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


def declined(ext: Extension, device: torch.device, kernels: Kernels, size: int) -> str | None:
    """Why the other kernels serve a call that these could serve, or None. size: of a head, or hidden."""
    if mode == "never":
        return 'sm90_kernels("never")'
    if mode == "auto":
        first, last = FASTER.get(kernels, (1, 0))
        if not first <= size <= last:
            return 'no GPU record shows the kernels for sm_90a faster; sm90_kernels("always") takes them'
    return unavailable(ext, device)


def described(forward: str | None, backward: str | None, how: str = "") -> str:
    """For `explain`. Of each direction why the kernels for sm_90a do not serve it, or None; how: they run."""
    if forward is None:
        rest = "" if backward is None else f"; backward those for every GPU: {backward}"
        return f"kernels for sm_90a{how}{rest}"
    rest = "; backward those for sm_90a" if backward is None else ""
    return f"kernels for every GPU{how}; not those for sm_90a: {forward}{rest}"
