"""A static estimate of a matrix kernel's hot loop on Hopper, from instruction counts alone.

Cycles of one turn for each unit of a multiprocessor: tensor cores 4096 bfloat16 flops a cycle, 16 special functions,
128 float32 and 64 integer lanes, one warp instruction a cycle and sub-core. It knows nothing of memory latency,
barriers or clocks. Compared with published H100 figures of plain Triton attention it is good to about 15 %: it ranks
configurations, and is never quoted as a speed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from . import sass

_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")
_INTEGER = (
    *("FMNMX", "FMNMX3", "FSEL", "SEL", "ISETP", "FSETP", "LOP3", "PLOP3", "SHF", "PRMT", "IADD", "IADD3", "LEA"),
    *("IMNMX", "VIMNMX", "VIADD", "F2FP", "FCHK", "MOV", "SGXT", "CS2R", "R2P", "VOTE"),
)
_FLOAT = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FMUL2", "FADD2")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "LDG", "STG")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """tensor_share: the tensor cores' part of the loop's time if nothing overlaps; overlapped_share: if everything
    does; bound: the busiest other unit."""

    tensor_share: float
    overlapped_share: float
    bound: str


def hgmma_flops(loop: Sequence[sass.Instruction]) -> float:
    """Flops that one warpgroup issues in the loop."""
    flops = 0.0
    for instruction in loop:
        if instruction.base == "HGMMA" and (shape := _SHAPE.search(instruction.opcode)):
            m, n, k = map(int, shape.groups())
            flops += 2.0 * m * n * k
    return flops


def hopper(loop: Sequence[sass.Instruction], warps: int) -> Estimate:
    groups = warps / 4
    tf32 = any("TF32" in i.opcode for i in loop)
    tensor = hgmma_flops(loop) / 4096 * (2 if tf32 else 1) * groups
    bases = [i.base for i in loop]
    other = {
        "special functions": 8.0 * bases.count("MUFU"),
        "integer": 2.0 * sum(b in _INTEGER for b in bases),
        "float": 1.0 * sum(b in _FLOAT for b in bases),
        "shared memory": 2.0 * sum(b in _SHARED for b in bases),
        "issue": float(len(bases)),
    }
    bound = max(other, key=other.__getitem__)
    busiest = other[bound] * groups
    if not tensor:
        return Estimate(0.0, 0.0, bound)
    return Estimate(tensor / (tensor + busiest), tensor / max(tensor, busiest), bound)


def beside(loop: Sequence[sass.Instruction]) -> float | None:
    """Share of the exponentials made while a group of products runs: the last wait before them leaves one in flight.
    None without such waits. ptxas may move work below a wait without saying so, and then nothing overlaps."""
    waits = [(i, "gsb0, 0x0" not in x.operands) for i, x in enumerate(loop) if "DEPBAR" in x.opcode]
    exponentials = [i for i, x in enumerate(loop) if x.opcode.startswith("MUFU.EX2")]
    if not any(leaves for _, leaves in waits) or not exponentials:
        return None
    last = [next((leaves for at, leaves in reversed(waits) if at < i), waits[-1][1]) for i in exponentials]
    return sum(last) / len(last)
