"""Memory for large results on the CPU, kept after use for the next one (csrc/cpu/pool.h)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OutputPool:
    """The pool of output memory, now.

    Attributes:
        max_bytes: most that may lie idle; 0: the pool is off. Less is kept when less than four times as much is
            available, by the machine's figures and those of its control groups (versions 1 and 2).
        idle_bytes, idle_blocks: kept for reuse.
        used_bytes, used_blocks: under live tensors.
        reused, mapped, returned: blocks since the start that were taken from the idle ones, asked of the system, given
            back to it.
    """

    max_bytes: int
    idle_bytes: int
    idle_blocks: int
    used_bytes: int
    used_blocks: int
    reused: int
    mapped: int
    returned: int

    def __str__(self) -> str:
        if not self.max_bytes:
            return "off"
        kept, most, used = (n / 2**20 for n in (self.idle_bytes, self.max_bytes, self.used_bytes))
        return f"on: {used:,.0f} MiB in use, {kept:,.0f} MiB kept for reuse (at most {most:,.0f})"


def _extension() -> Any:
    return sys.modules.get(f"{__package__}._cpu_ext")  # loaded by the rooms, where it can be


def output_pool() -> OutputPool | None:
    """The state of the pool that the native CPU kernels take results of 1 MiB and more from.

    Returns:
        OutputPool, or None where the native CPU kernels are not built.
    """
    extension = _extension()
    return None if extension is None else OutputPool(**extension.pool_state())


def set_output_pool(enabled: bool = True, *, max_bytes: int | None = None) -> None:
    """Switch the pool of output memory on or off, or bound it.

    With the pool, a result of the native CPU kernels of 1 MiB or more takes the memory of an earlier one of about its
    size that has been freed, with huge pages where the system has them; without it, every result of 32 MiB and more
    costs the page faults of a fresh mapping, which is most of an activation's time. What lies idle is given back after
    five seconds, under memory pressure, and by `empty_cache()`. Does nothing where the native CPU kernels are not
    built; on a GPU torch's own caching allocator does the same.

    Args:
        enabled: False: results come from torch's CPU allocator, and what was kept is given back. Default True.
        max_bytes: most that may lie idle; 0 is the same as False. Default an eighth of the memory that this process may
            use.

    Raises:
        TypeError: enabled is not a bool, max_bytes not an integer.
        ValueError: max_bytes is negative.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"set_output_pool(): enabled must be a bool, not {type(enabled).__name__}")
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int)):
        raise TypeError(f"set_output_pool(): max_bytes must be an int or None, not {type(max_bytes).__name__}")
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"set_output_pool(): max_bytes must be 0 or more, got {max_bytes}")
    extension = _extension()
    if extension is not None:
        extension.pool_set_max_bytes(0 if not enabled else -1 if max_bytes is None else min(max_bytes, 2**63 - 1))


def empty_cache() -> None:
    """Give the output memory that the CPU kernels keep for reuse back to the system. Live tensors keep theirs."""
    extension = _extension()
    if extension is not None:
        extension.pool_empty()
