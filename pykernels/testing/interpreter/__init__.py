"""Triton's CPU interpreter, made trustworthy: right in bfloat16, complete where kernels need it, and checking.

Stock Triton (3.6 to 3.9) runs a `@triton.jit` kernel on CPU tensors when `TRITON_INTERPRET=1`, but multiplies bfloat16
*bit patterns*, truncates on casts to bfloat16, has no libdevice and no autotuner, and checks no address. `install()`
repairs this in place, for the process, and adds checks that a GPU does not make:

* every lane of every load, store and atomic stays inside the tensor its pointer came from, and is aligned;
* no two programs of one launch touch the same element when one of them writes it, and no store has two lanes with
  one address;
* signed offsets stay inside their integer type;
* the grid respects CUDA's limits, tensor descriptors the copy engine's, and matrix products the tensor core's smallest
  shape.

    from pykernels.testing import interpreter

    interpreter.install()                                   # before anything imports triton
    with interpreter.checks(races=False, order_seed=7):     # programs in a shuffled, reproducible order
        kernel[grid](x, y, n, BLOCK=1024)

Importing this package does not import triton.
"""

from __future__ import annotations

import os
import sys

from .state import (
    CheckError,
    Checks,
    IntegerOverflowError,
    LaunchError,
    MemoryCheckError,
    RaceError,
    UnsupportedError,
    checks,
    is_active,
)

__all__ = [
    "CheckError",
    "Checks",
    "IntegerOverflowError",
    "LaunchError",
    "MemoryCheckError",
    "RaceError",
    "UnsupportedError",
    "checks",
    "install",
    "is_active",
]


def install() -> None:
    """Set `TRITON_INTERPRET=1`, import triton and repair its interpreter. Calling it again does nothing.

    Raises:
        RuntimeError: triton was already imported without `TRITON_INTERPRET=1`. Its own library functions (`tl.sum`,
            `tl.sigmoid`) were compiled for a GPU at that moment and cannot be turned back.
    """
    if is_active():
        return
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not (triton.knobs.runtime.interpret and isinstance(tl.sum, InterpretedFunction)):
        raise RuntimeError(
            "triton was imported before pykernels.testing.interpreter.install(), without TRITON_INTERPRET=1; "
            "call install() first, or set that variable for the whole process"
        )
    from . import language, launch, memory, numerics, speed, state

    numerics.install()
    language.install()
    memory.install()
    launch.install()
    speed.install()
    state.installed = True
