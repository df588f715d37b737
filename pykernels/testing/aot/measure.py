"""From a compiled launch to a `Row`."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

from . import roofline, sass
from .dryrun import Launch, cache, dry
from .rules import Entry, Row, check

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_WARNING = re.compile(r"Potential Performance Loss[^\n]*")


def run(entry: Entry, target: int) -> list[Row]:
    """Compile everything that `entry` launches for `target`; a failure to compile is a row with that fault."""
    start = time.perf_counter()
    try:
        with dry(target) as launches:
            entry.launch()
    except Exception as error:  # any compiler failure is a finding, whatever its class
        text = str(error).strip().splitlines()
        return [Row(entry.name, "?", target, faults=[f"does not compile: {type(error).__name__}: {(text or [''])[0]}"])]
    if not launches:
        return [Row(entry.name, "?", target, faults=["launched no kernel"])]
    rows = [from_launch(entry, target, launch) for launch in launches]
    names = [row.kernel for row in rows]
    for i, row in enumerate(rows):
        row.faults += check(row, entry.rules_for(row.kernel))
        if names.count(row.kernel) > 1:  # configurations of one kernel
            row.kernel = f"{row.kernel}#{names[:i].count(row.kernel)}"
        row.seconds = (time.perf_counter() - start) / len(rows)
    return rows


def from_launch(entry: Entry, target: int, launch: Launch) -> Row:
    kernel = launch.kernel
    function = sass.disassemble(kernel.asm["cubin"], cache())[0]
    row = Row(entry.name, kernel.metadata.name, target, grid=launch.grid)
    from_function(row, function, kernel.metadata.num_warps, kernel.metadata.shared, launch.log)
    if row.kernel in entry.bytes:
        threads = math.prod(launch.grid) * row.warps * 32
        row.instructions_per_byte = row.path * threads / entry.bytes[row.kernel]
        row.issue_share = row.instructions_per_byte / sass.DEVICES[target].issue_per_byte
    if entry.loop_flops and (issued := roofline.hgmma_flops(function.hot_loop()) * row.warps / 4):
        row.mma_efficiency = entry.loop_flops / issued
    return row


def from_function(row: Row, function: sass.Function, warps: int, shared: int, log: str) -> None:
    """Fill `row` with what the machine code and the assembler's log say."""
    path, loop = function.full_path(), function.hot_loop()
    counts = sass.count(path)
    row.warps, row.shared = warps, shared
    row.registers, row.stack = function.registers, function.stack
    row.blocks, row.occupancy, row.limit = sass.occupancy(row.target, function.registers, shared, warps)
    row.instructions, row.path, row.loop = len(function.instructions), len(path), len(loop)
    row.local_in_loop = _number(loop, ("LDL", "STL"))
    row.loads_128 = counts["LDG.128"] + counts["LDG.256"]
    row.stores_128 = counts["STG.128"] + counts["STG.256"]
    row.narrow = sum(counts[f"{op}.{bits}"] for op in ("LDG", "STG") for bits in (8, 16))
    row.mma = sum(_uses_tensor_core(i.base, row.target) for i in function.instructions)
    row.warp_mma = _number(function.instructions, ("HMMA",))
    row.barriers = _number(function.instructions, ("BAR",))
    row.copies = _number(function.instructions, ("LDGSTS",))
    row.fused = _number(function.instructions, ("DFMA",))
    row.warnings = _WARNING.findall(log)[:1]
    if not any(i.base == "EXIT" for i in function.instructions):
        row.warnings.append("a trap: the compiler took this kernel for impossible, and made nothing else of it")
    # Every function of the file has a line of its own; a kernel's device functions are inlined.
    spills = _SPILLS.findall(log)
    row.spill_bytes = max((int(stores) + int(loads) for _, stores, loads in spills), default=0)
    if not spills and _number(function.instructions, ("LDL", "STL")):
        row.spill_bytes = row.stack
    if row.target == 90 and row.mma:
        quick = function.hot_path()
        estimate = roofline.hopper(quick, warps)
        row.roofline, row.bound = estimate.tensor_share, estimate.bound
        row.overlapped, row.beside = estimate.overlapped_share, roofline.beside(quick)


def _number(instructions: Sequence[sass.Instruction], bases: tuple[str, ...]) -> int:
    return sum(i.base in bases for i in instructions)


def _uses_tensor_core(base: str, target: int) -> bool:
    kinds = {80: ("HMMA", "IMMA", "DMMA"), 90: ("HGMMA", "IGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA", "UTCIMMA")}
    return base in kinds[target]
