"""Dependence on the order of programs, seen although the interpreter runs them one after the other.

For each element of each argument the check remembers which program last stored it and which one loaded it. Two
programs that meet on an element, one of them storing, race: a GPU may run them in any order or at once. Atomic
operations do not race with each other; an atomic that acquires makes the programs whose release it reads visible.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from . import state
from .memory import Extent, lane_name
from .state import RaceError

SEVERAL = -1


@dataclasses.dataclass
class Region:
    """Adjoining memory of one or more arguments: who stored and who loaded each granule (0: nobody)."""

    low: int
    high: int
    granule: int
    writer: np.ndarray | None = None  # program + 1 for a plain store, negative for an atomic
    reader: np.ndarray | None = None  # program + 1, or SEVERAL

    def allocate(self) -> None:
        # np.zeros maps pages only when touched, so a large tensor costs what the kernel visits of it.
        size = -(-(self.high - self.low) // self.granule)
        self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)


class Races:
    """The memory of one launch."""

    def __init__(self, extents: list[Extent]) -> None:
        self.regions: list[Region] = []
        for extent in sorted(extents, key=lambda e: e.low):
            if extent.low == extent.high:
                continue
            last = self.regions[-1] if self.regions else None
            if last is not None and extent.low < last.high:
                last.high = max(last.high, extent.high)
                last.granule = min(last.granule, extent.itemsize)
            else:
                self.regions.append(Region(extent.low, extent.high, extent.itemsize))
        self.extents = extents
        self.grid = (1, 1, 1)
        self.program = 0
        self.visible: set[int] = set()
        self.released: dict[int, set[int]] = {}

    def start_program(self, grid: tuple[int, int, int], index: tuple[int, int, int]) -> None:
        self.grid = grid
        self.program = (index[0] * grid[1] + index[1]) * grid[2] + index[2] + 1
        self.visible = set()

    def synchronise(self, pointers: Any, semantic: str) -> None:
        """Acquire and release of the running program at the addresses of an atomic."""
        for address in np.unique(pointers.data):
            released = self.released.setdefault(int(address), set())
            if "ACQUIRE" in semantic:
                self.visible |= released
            if "RELEASE" in semantic:
                released |= self.visible | {self.program}

    def check(
        self, index: tuple[Any, ...], origin: Extent | None, addresses: np.ndarray, nbytes: int, lanes: np.ndarray,
        shape: Any, kind: str,
    ) -> None:  # fmt: skip
        if kind == "store":
            self._check_lanes(index, origin, addresses, lanes, shape)
        for region in self.regions:
            inside = (addresses >= region.low) & (addresses < region.high)
            if not inside.any():
                continue
            if region.writer is None:
                region.allocate()
            offset = (addresses[inside] - np.uint64(region.low)).astype(np.int64) // region.granule
            for step in range(max(1, nbytes // region.granule)):
                clash, other, deed = self._visit(region, offset + step, kind)
                if clash is not None:
                    where = np.flatnonzero(inside)[clash]
                    raise RaceError(self._message(index, origin, addresses, lanes, shape, kind, where, other, deed))
            if inside.all():
                return

    def _visit(self, region: Region, at: np.ndarray, kind: str) -> tuple[np.ndarray | None, int, str]:
        """Record the access; the lanes that clash, the other program and what it did, or None."""
        assert region.writer is not None and region.reader is not None
        me = self.program
        writer = region.writer[at]
        clash = (writer != 0) & (np.abs(writer) != me)
        if kind == "atomic":
            clash &= writer > 0
        clash = self._not_visible(clash, np.abs(writer))
        if clash.any():
            other = int(writer[clash][0])
            return np.flatnonzero(clash), abs(other) - 1, "stored" if other > 0 else "updated by an atomic"
        reader = region.reader[at]
        if kind == "load":
            region.reader[at] = np.where((reader == 0) | (reader == me), me, SEVERAL)
            return None, 0, ""
        if kind == "store" or not self.visible:
            clash = self._not_visible((reader != 0) & (reader != me), reader)
            if clash.any():
                return np.flatnonzero(clash), int(reader[clash][0]) - 1, "loaded"
        region.writer[at] = me if kind == "store" else -me
        return None, 0, ""

    def _not_visible(self, clash: np.ndarray, programs: np.ndarray) -> np.ndarray:
        if self.visible and clash.any():
            clash &= ~np.isin(programs, [*self.visible, SEVERAL])
        return clash

    def _check_lanes(
        self, index: tuple[Any, ...], origin: Extent | None, addresses: np.ndarray, lanes: np.ndarray, shape: Any
    ) -> None:
        unique, first = np.unique(addresses, return_index=True)
        if unique.size == addresses.size:
            return
        second = np.setdiff1d(np.arange(addresses.size), first)[0]
        twin = np.flatnonzero(addresses == addresses[second])[0]
        raise RaceError(
            f"{self._place('store', index, origin, addresses[second])}: lanes {lane_name(lanes[twin], shape)} and "
            f"{lane_name(lanes[second], shape)} of one store write the same element, and either may win "
            f"[{state.kernel_line()}]"
        )

    def _message(
        self, index: tuple[Any, ...], origin: Extent | None, addresses: np.ndarray, lanes: np.ndarray, shape: Any,
        kind: str, where: np.ndarray, other: int, deed: str,
    ) -> str:  # fmt: skip
        if other < 0:
            who = "several other programs have"
        else:
            _, ny, nz = self.grid
            who = f"program {(other // (ny * nz), other // nz % ny, other % nz)} has"
        return (
            f"{self._place(kind, index, origin, addresses[where[0]])}, which {who} {deed}; {where.size} of "
            f"{np.prod(shape)} lanes, first lane {lane_name(lanes[where[0]], shape)}; programs run in no fixed order "
            f"[{state.kernel_line()}]"
        )

    def _place(self, kind: str, index: tuple[Any, ...], origin: Extent | None, address: int) -> str:
        assert state.launch is not None
        owner = origin or next((e for e in self.extents if e.low <= address < e.high), None)
        place = f"address {int(address):#x}" if owner is None else f"{owner.name}, element {owner.element(address)}"
        return f"race in {state.launch.kernel}: {kind} by program {index} to {place}"
