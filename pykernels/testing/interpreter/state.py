"""What the parts of the interpreter share: the options, the launch in progress, the errors. Imports no triton."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .launch import Launch


class CheckError(Exception):
    """A kernel did what would be a fault on a GPU. The message names kernel, argument, program and lanes."""


class MemoryCheckError(CheckError):
    """A lane addressed memory outside the tensor its pointer came from, or not aligned to its element."""


class RaceError(CheckError):
    """The result depends on the order in which programs, or the lanes of one store, happen to run."""


class IntegerOverflowError(CheckError):
    """A signed integer sum, difference or product left its type: usually an offset that should be int64."""


class LaunchError(CheckError):
    """The grid is larger than CUDA allows, or a tensor descriptor is none that the hardware takes."""


class UnsupportedError(NotImplementedError):
    """The interpreter cannot execute this construct; the message says what to write instead."""


@dataclasses.dataclass(frozen=True)
class Checks:
    """Options of the interpreter, see `checks`."""

    memory: bool = True
    races: bool = True
    overflow: bool = True
    order_seed: int | None = None


installed = False
current = Checks()
launch: Launch | None = None


def is_active() -> bool:
    """Whether `install()` has been called: Triton kernels then run on the repaired interpreter."""
    return installed


@contextlib.contextmanager
def checks(
    memory: bool = True, races: bool = True, overflow: bool = True, order_seed: int | None = None
) -> Iterator[Checks]:
    """Options for the launches inside the `with` block; outside of any block the defaults hold.

    Args:
        memory: check every lane's address against the exact extent of the tensor it came from, and its alignment.
        races: check that programs of one launch do not depend on each other's order.
        overflow: check signed integer arithmetic below 64 bits; unsigned types wrap, as Philox needs.
        order_seed: run the programs of each launch in an order drawn from this seed. None: in row-major order.
    """
    global current
    previous, current = current, Checks(memory, races, overflow, order_seed)
    try:
        yield current
    finally:
        current = previous


def kernel_line() -> str:
    """`file:line` of the kernel statement being interpreted."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("triton.", "pykernels.testing.interpreter")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "unknown line"
