"""Loads the extension modules built from csrc/cuda and calls their launchers with tensors.

`_cuda_ext` (nvcc) and `_emulator_ext` (g++) bind the same launchers, functions on raw pointers, so the modules of
`pykernels/_cuda` serve both: what differs is in :class:`Extension`.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/dtype.h

_REBUILD = {
    "_cuda_ext": "pip install --force-reinstall --no-deps .",
    "_emulator_ext": "PYKERNELS_BUILD=all pip install --force-reinstall --no-deps .",
}


def _runs(architecture: str, capability: int) -> bool:
    number = architecture.removesuffix("+PTX")
    if number.endswith("a"):
        return capability == int(number[:-1])
    if architecture.endswith("+PTX"):
        return capability >= int(number)
    return capability // 10 == int(number) // 10 and capability >= int(number)


class Extension:
    """One of the two extension modules.

    Attributes:
        available: whether the module was built and is loaded.
        reason: why it is not, with the command that builds it; None where it is available.
    """

    def __init__(self, name: str) -> None:
        if name not in _REBUILD:
            raise ValueError(f"unknown extension {name!r}, expected one of {sorted(_REBUILD)}")
        self.name = name
        self.module: ModuleType | None = None
        self.reason: str | None = None
        package = __package__.rpartition(".")[0]
        # found but broken is an error of ours and is raised; only a module that was never built counts as absent
        if importlib.util.find_spec(f"{package}.{name}") is None:
            needs = "where nvcc is found" if name == "_cuda_ext" else "for tests"
            self.reason = f"{package}.{name} was not built; {needs}: {_REBUILD[name]}"
        else:
            self.module = importlib.import_module(f"{package}.{name}")
        self._emulated = name == "_emulator_ext"
        self._lock = threading.Lock()  # the emulator is one machine: extents belong to the launch that follows

    @property
    def available(self) -> bool:
        return self.module is not None

    @property
    def architectures(self) -> list[str]:
        """What the module was built for: "80", "90a", "90+PTX"."""
        return [] if self.module is None else self.module.build_info()["architectures"]

    def device_reason(self, device: torch.device) -> str | None:
        """Why the built kernels cannot run on this GPU, or None: machine code serves its own major version from its
        minor version on ("90a" exactly 9.0), PTX everything later."""
        if self._emulated or self.module is None or device.type != "cuda":
            return None
        major, minor = torch.cuda.get_device_capability(device)
        built = self.architectures
        if any(_runs(architecture, 10 * major + minor) for architecture in built):
            return None
        return f"{self.name} was built for {', '.join(built)}, this GPU is sm_{major}{minor}; {_REBUILD[self.name]}"

    def multiprocessors(self, device: torch.device) -> int:
        """Of the GPU. The emulator's are few, so that small cases have several parts and several turns in each."""
        return 3 if self._emulated else torch.cuda.get_device_properties(device).multi_processor_count

    def call(self, launcher: str, *args: Any, reached: Sequence[torch.Tensor] = ()) -> None:
        """Runs a launcher on the current stream of the tensors' device.

        Args:
            launcher: its name in the module.
            *args: its arguments without the stream. A tensor is passed as its address, None as the null pointer, a
                dtype as its code, anything else as it is. The tensors stay alive until the launch is queued.
            reached: tensors whose addresses the launcher finds in the memory of others.

        Raises:
            RuntimeError: the extension is not available, the launch failed, or the emulator found an error in the
                kernel (with file, line and thread).
        """
        if self.module is None:
            raise RuntimeError(self.reason)
        function = getattr(self.module, launcher)
        raw: list[Any] = []
        tensors: list[torch.Tensor] = []
        for a in args:
            if isinstance(a, torch.Tensor):
                tensors.append(a)
                raw.append(a.data_ptr())
            elif a is None:
                raw.append(0)
            elif isinstance(a, torch.dtype):
                raw.append(DTYPE_CODES[a])
            else:
                raw.append(a)
        if not self._emulated:
            function(*raw, _raw_stream(tensors))
            return
        buffers = [(t.data_ptr(), t.element_size(), t.shape, t.stride()) for t in (*tensors, *reached)]
        with self._lock:
            self.module.set_buffers(buffers)
            function(*raw, 0)


# The handle itself: a torch.cuda.Stream costs more to make than a launcher to call. CPU builds of torch lack it.
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda i: torch.cuda.current_stream(i).cuda_stream
)


def _raw_stream(tensors: list[torch.Tensor]) -> int:
    for t in tensors:
        if t.is_cuda:
            return _stream_of(t.get_device())
    return 0
