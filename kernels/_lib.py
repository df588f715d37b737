"""What two Triton rooms or more share: launch-time questions about the device, and small jit helpers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton


class DeviceProperties(NamedTuple):
    """The two figures of a device that change how a wrapper launches."""

    capability: int  #: 80, 86, 90, 100: ten times the major plus the minor compute capability
    sm_count: int  #: streaming multiprocessors


#: What wrappers see for a CPU tensor, which only the interpreter can serve: the portable code path, and so few
#: multiprocessors that a persistent kernel's loop over tiles turns more than once on a test-sized input.
INTERPRETED_DEVICE = DeviceProperties(capability=80, sm_count=4)

_override: DeviceProperties | None = None


def interpreting() -> bool:
    """Whether Triton kernels run on its CPU interpreter in this process, so that they can serve CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def device_properties(device: torch.device) -> DeviceProperties:
    """Capability and multiprocessor count of `device`: the only place where a wrapper may ask for them.

    A CPU device gives `INTERPRETED_DEVICE`. `override_device_properties` replaces the answer for every device.
    """
    if _override is not None:
        return _override
    if device.type == "cuda":
        return _cuda_properties(torch.cuda.current_device() if device.index is None else device.index)
    return INTERPRETED_DEVICE


@contextlib.contextmanager
def override_device_properties(properties: DeviceProperties) -> Iterator[None]:
    """Make `device_properties` answer `properties`: how the ahead-of-time lint compiles for a GPU that is not there."""
    global _override
    previous, _override = _override, properties
    try:
        yield
    finally:
        _override = previous


@functools.lru_cache(maxsize=None)
def _cuda_properties(index: int) -> DeviceProperties:
    properties = torch.cuda.get_device_properties(index)
    return DeviceProperties(10 * properties.major + properties.minor, properties.multi_processor_count)
