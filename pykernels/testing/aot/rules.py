"""What a kernel must satisfy, and what it measured: `Rules` are data, `Row` is one kernel for one target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .sass import DEVICES

#: Allowed growth of registers, instructions and hot-loop length against the committed baseline.
DRIFT = 1.10

MMA_FOR_TARGET = {80: "HMMA", 90: "HGMMA", 100: "UTC"}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Limits of one kernel. Those without a default here hold for all: it compiles, fits in shared memory, touches no
    local memory in its hot loop, is more than a trap, and ptxas reports no serialised tensor-core instructions."""

    spill_bytes: int = 0  #: bytes spilled outside the hot loop
    vector: bool = False  #: 128-bit loads and stores on the path of a full tile, and narrow ones only off it
    narrow: int = 0  #: 8- and 16-bit accesses allowed on that path: scalars that all threads share
    instructions_per_byte: float | None = None  #: on that path; checked where the entry says how many bytes move
    tensor_cores: bool = False  #: the target's own matrix instruction is used
    warp_mma: bool = False  #: mma.sync is used, which is one instruction on every target
    mma_efficiency: float = 0.0  #: useful over issued flops of the hot loop (`Entry.loop_flops`), sm_90
    tensor_share: float = 0.0  #: least tensor-core share of the hot loop where everything overlaps, sm_90
    beside: float = 0.0  #: share of the loop's exponentials made while a product runs, sm_90
    occupancy: float = 0.0  #: share of a multiprocessor's warps
    blocks: int = 1  #: blocks on one multiprocessor
    barriers: int | None = None  #: most barriers of a block
    copies: bool = False  #: global memory goes to shared memory by asynchronous copies
    unfused: bool = False  #: doubles are multiplied and added apart: the bits are those of other backends


#: A streaming kernel: wide accesses, enough warps to hide memory latency, and fewer instructions than a third of the
#: way below what the chip can issue per byte.
ELEMENTWISE = Rules(vector=True, instructions_per_byte=6.0, occupancy=0.5)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One call of a wrapper on CPU tensors, and the rules for the kernels it launches.

    rules: for every kernel, or by kernel name ("" for those not named).
    bytes: what the launch reads and writes in DRAM, for the kernels that the mapping names.
    loop_flops: useful flops of one turn of the hot loop, for `mma_efficiency`.
    """

    name: str
    launch: Callable[[], Any]
    rules: Rules | Mapping[str, Rules] = Rules()
    targets: tuple[int, ...] = (80, 90)
    bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    loop_flops: float | None = None

    def rules_for(self, kernel: str) -> Rules:
        return self.rules if isinstance(self.rules, Rules) else self.rules.get(kernel, self.rules.get("", Rules()))


@dataclasses.dataclass
class Row:
    """One kernel compiled for one target."""

    entry: str
    kernel: str
    target: int
    grid: tuple[int, ...] = ()
    warps: int = 0
    registers: int = 0
    spill_bytes: int = 0
    stack: int = 0
    shared: int = 0
    blocks: int = 0
    occupancy: float = 0.0
    limit: str = ""
    instructions: int = 0
    path: int = 0  #: instructions on the path of a full tile
    loop: int = 0  #: instructions of the hot loop
    local_in_loop: int = 0
    loads_128: int = 0
    stores_128: int = 0
    narrow: int = 0  #: 8- and 16-bit accesses on the path of a full tile
    mma: int = 0  #: the target's own matrix instructions
    warp_mma: int = 0  #: those of mma.sync
    barriers: int = 0
    copies: int = 0  #: asynchronous ones, global to shared
    fused: int = 0  #: fused multiply-adds of doubles
    instructions_per_byte: float | None = None
    issue_share: float | None = None  #: of the instructions the chip can issue while these bytes move
    roofline: float | None = None  #: tensor-core share of the hot loop without any overlap, sm_90
    overlapped: float | None = None  #: the same where everything overlaps
    beside: float | None = None  #: share of the exponentials made while a product runs
    bound: str = ""
    mma_efficiency: float | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.entry} | {self.kernel} | sm_{self.target}"


def check(row: Row, rules: Rules) -> list[str]:
    """The rules this row breaks."""
    faults = []

    def require(satisfied: bool, text: str) -> None:
        if not satisfied:
            faults.append(text)

    require(row.spill_bytes <= rules.spill_bytes, f"spills {row.spill_bytes} bytes, allowed {rules.spill_bytes}")
    require(row.local_in_loop == 0, f"{row.local_in_loop} local-memory accesses in the hot loop")
    most = DEVICES[row.target].max_shared
    require(row.shared <= most, f"{row.shared} bytes of shared memory, a block may have {most}")
    require(row.blocks >= rules.blocks, f"{row.blocks} blocks on a multiprocessor ({row.limit}), needed {rules.blocks}")
    require(
        row.occupancy >= rules.occupancy,
        f"occupancy {row.occupancy:.2f} (limited by {row.limit}), needed {rules.occupancy}",
    )
    faults += row.warnings
    if rules.vector:
        require(row.loads_128 > 0 and row.stores_128 > 0, "no 128-bit loads and stores on the path of a full tile")
        require(
            row.narrow <= rules.narrow,
            f"{row.narrow} accesses of 8 or 16 bits on the path of a full tile, allowed {rules.narrow}",
        )
    if rules.barriers is not None:
        require(row.barriers <= rules.barriers, f"{row.barriers} barriers, allowed {rules.barriers}")
    require(row.copies > 0 or not rules.copies, "no LDGSTS instructions: nothing is copied asynchronously")
    require(row.fused == 0 or not rules.unfused, f"{row.fused} fused multiply-adds of doubles: the bits will differ")
    if rules.tensor_cores:
        require(row.mma > 0, f"no {MMA_FOR_TARGET[row.target]} instructions: the tensor cores are not used")
    require(row.warp_mma > 0 or not rules.warp_mma, "no HMMA instructions: the tensor cores are not used")
    for name in ("tensor_share", "beside"):
        least, is_there = getattr(rules, name), row.overlapped if name == "tensor_share" else row.beside
        if least and row.target == 90:
            text = "tensor-core share where all overlaps" if name == "tensor_share" else "exponentials beside a product"
            require((is_there or 0.0) >= least, f"{text} {is_there or 0.0:.2f}, needed {least}")
    limit, found = rules.instructions_per_byte, row.instructions_per_byte
    if limit is not None and found is not None:
        require(found <= limit, f"{found:.2f} instructions a byte, allowed {limit}")
    if row.mma_efficiency is not None:
        require(
            row.mma_efficiency >= rules.mma_efficiency,
            f"{row.mma_efficiency:.2f} of the matrix work is useful, needed {rules.mma_efficiency}",
        )
    return faults


#: What the baseline keeps of a row.
BASELINE_FIELDS = ("registers", "instructions", "loop", "shared", "spill_bytes")


def drift(row: Row, baseline: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What has grown against the committed baseline."""
    before = baseline.get(row.key)
    if before is None:
        return ["has no baseline; accept it with --update-baseline"]
    faults = []
    for name in ("registers", "instructions", "loop", "shared"):
        now, then = getattr(row, name), before[name]
        if now > then * DRIFT:
            faults.append(f"{name} {then} -> {now}, more than {DRIFT - 1:.0%} over the baseline")
    if row.spill_bytes > before["spill_bytes"]:
        faults.append(f"spill_bytes {before['spill_bytes']} -> {row.spill_bytes}")
    return faults
