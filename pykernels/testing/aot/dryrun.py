"""Run the real wrappers on CPU tensors, compiling every launch for a GPU that is not there and launching nothing.

Triton itself specialises the arguments (alignment, divisibility, None, descriptors), walks the configurations of an
autotuner and compiles to a cubin, exactly as it would on the device: only the driver is a fake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .sass import DEVICES


@dataclasses.dataclass
class Launch:
    """A kernel that would have run: Triton's compiled kernel, its grid, and what ptxas said."""

    kernel: Any
    grid: tuple[int, ...]
    log: str


class FakeDriver:
    """As much of a Triton driver as specialising and compiling asks for."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target  # kernel caches are per device: targets must not share one

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None: ...

    def get_benchmarker(self) -> Any:
        """An autotuner compiles each configuration to "time" it, and takes the first."""

        def benchmark(function: Any, quantiles: Any = None, **options: Any) -> list[float]:
            function()
            return [1.0, 1.0, 1.0]

        return benchmark

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def room(name: str) -> ModuleType:
    """The wrappers of one room of the Triton floor.

    The lint is the one part of `testing` that looks behind the public functions: they would refuse CPU tensors here.
    """
    return importlib.import_module(f"pykernels._triton.{name}")


def cache() -> Path:
    """Beside Triton's own cache: the logs and the disassembly of what is in it."""
    return Path(triton.knobs.cache.dir, "pykernels_lint")


def _compile(launch: Callable[[], Any]) -> tuple[Any, str]:
    """The kernel of one launch and the assembler's log, which is kept with the kernel; "" if it is lost."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        kernel = launch()
    kept = cache() / f"{kernel.hash}.log"
    if "ptxas" in output.getvalue():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(output.getvalue())
    return kernel, kept.read_text() if kept.exists() else ""


@contextlib.contextmanager
def dry(target: int) -> Iterator[list[Launch]]:
    """Collect the launches made inside the `with` block, compiled for sm_`target`.

    Raises:
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET=1), so they cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the ahead-of-time lint compiles kernels: run it without TRITON_INTERPRET=1")
    lib: Any = room("_lib")
    properties = lib.DeviceProperties(target, DEVICES[target].sm_count)
    launches: list[Launch] = []
    original, driver_before = JITFunction.run, driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if callable(grid):
            named = dict(zip(self.arg_names, args, strict=False))
            grid = grid({**named, **{k: v for k, v in options.items() if k in self.arg_names}})
        kernel, log = _compile(functools.partial(original, self, *args, grid=grid, warmup=True, **options))
        if not log:  # found in Triton's cache, but not its log
            self.device_caches.clear()
            triton.knobs.compilation.always_compile = True
            kernel, log = _compile(functools.partial(original, self, *args, grid=grid, warmup=True, **options))
            triton.knobs.compilation.always_compile = False
        if not any(known.kernel.hash == kernel.hash for known in launches):
            launches.append(Launch(kernel, tuple(int(n) for n in grid), log))
        return kernel

    triton.knobs.nvidia.dump_ptxas_log = True
    driver.set_active(FakeDriver(target))
    JITFunction.run = run
    try:
        with lib.override_device_properties(properties):
            yield launches
    finally:
        JITFunction.run = original
        driver._active = driver_before  # reset_active() would ask for a real one
