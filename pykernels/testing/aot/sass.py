"""Machine code as data: disassembly, basic blocks, the path of a full tile, hot loops, occupancy.

The disassembler and the resource reader (nvdisasm, cuobjdump) come with the triton package.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\b([^;]*);")
_LABEL = re.compile(r"^\.?(\.L\w*):")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_RESOURCES = re.compile(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

MMA = ("HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits of one multiprocessor, and the instruction budget of a streaming kernel."""

    registers: int
    shared: int  # bytes a multiprocessor has
    max_shared: int  # bytes one block may use
    warps: int
    blocks: int
    sm_count: int
    issue_per_byte: float  #: thread instructions the chip can issue while it moves one byte of DRAM


DEVICES = {
    80: Device(65536, 164 << 10, 163 << 10, 64, 32, 108, 9.6),  # A100-80GB
    90: Device(65536, 228 << 10, 227 << 10, 64, 32, 132, 8.6),  # H100 SXM
    100: Device(65536, 228 << 10, 227 << 10, 64, 32, 148, 4.4),  # B200
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    predicate: str | None
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bits that one thread moves, for memory instructions."""
        sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8, "8": 8}
        return next((sizes[part] for part in self.opcode.split(".")[1:] if part in sizes), 32)

    @property
    def target(self) -> str | None:
        """The label a branch goes to. A conditional call is one too: that is how ptxas leaves some loops."""
        if self.base not in ("BRA", "JMP") and not (self.base == "CALL" and self.conditional):
            return None
        match = re.search(r"`\((\.L\w*)\)", self.operands)
        return match.group(1) if match else None

    @property
    def conditional(self) -> bool:
        return self.predicate is not None or bool(re.match(r"\s*!?U?P\w", self.operands))


@dataclasses.dataclass
class Function:
    """One kernel's code, and what the assembler reserved for it."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int = 0
    stack: int = 0
    shared: int = 0

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of each innermost loop."""
        found = set()
        for i, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target or "")
            if start is not None and start < i:
                found.add((start, i))
        return sorted(
            (a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)
        )  # fmt: skip

    def hot_loop(self) -> list[Instruction]:
        """The innermost loop with the most tensor-core instructions, of several the shortest: the one over full tiles.

        Without such instructions it is the longest loop; empty without loops.
        """

        def heat(body: list[Instruction]) -> tuple[int, int]:
            matrix = sum(i.base in MMA for i in body)
            return matrix, -len(body) if matrix else len(body)

        return max((self.instructions[a : b + 1] for a, b in self.loops()), key=heat, default=[])

    def hot_path(self) -> list[Instruction]:
        """The shortest way through the hot loop: what a tile costs that takes none of the rare branches."""
        loop = self.hot_loop()
        if not loop:
            return []
        first = next(a for a, b in self.loops() if self.instructions[a : b + 1] == loop)
        steps: list[float] = [1.0] * len(loop)
        jumps: list[int | None] = [None] * len(loop)
        for i in reversed(range(len(loop) - 1)):
            x, target = loop[i], self.labels.get(loop[i].target or "", -1) - first
            ways: list[tuple[float, int]] = []
            if x.base not in _ENDS or x.conditional:
                ways.append((steps[i + 1], i + 1))
            if i < target < len(loop):
                ways.append((steps[target], target))
            best, jumps[i] = min(ways, default=(math.inf, None))
            steps[i] = 1 + best
        path, i = [], 0
        while True:
            path.append(loop[i])
            following = jumps[i]
            if following is None:
                return path if i == len(loop) - 1 else loop
            i = following

    def full_path(self) -> list[Instruction]:
        """From entry to exit along the branches a full tile takes, each loop's body counted once.

        Of all paths it is the one with the most 128-bit accesses (where there are none: that moves the most bytes), and
        of those the shortest: the unmasked branch of a kernel that has one, without the tail, and without the rare
        detours of a division.
        """
        path = self._best_path(lambda i: i.width if i.width >= 128 else 0)
        if any(i.base in _GLOBAL and i.width >= 128 for i in path):
            return path
        return self._best_path(lambda i: i.width)

    def _best_path(self, worth: Callable[[Instruction], int]) -> list[Instruction]:
        code = self.instructions
        ends_block = [x.base in _ENDS or x.target is not None for x in code]
        starts = sorted({0, *self.labels.values(), *(i + 1 for i, ends in enumerate(ends_block) if ends)})
        starts = [s for s in starts if s < len(code)]
        ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
        best: dict[int, tuple[int, int]] = {}
        follow: dict[int, int | None] = {}
        for start in reversed(starts):
            end, last = ends[start], code[ends[start] - 1]
            successors: list[int | None] = [None] if last.base == "EXIT" else []
            if last.target is not None and self.labels.get(last.target, 0) > start:
                successors.append(self.labels[last.target])
            if (last.base not in _ENDS or last.conditional) and end < len(code):
                successors.append(end)
            options = [((0, 0) if s is None else best[s], s) for s in successors]
            (beyond, steps), follow[start] = max(options, key=lambda option: option[0], default=((0, 0), None))
            moved = sum(worth(x) for x in code[start:end] if x.base in _GLOBAL)
            best[start] = moved + beyond, steps - (end - start)
        path: list[Instruction] = []
        block: int | None = 0
        while block is not None:
            path += code[block : ends[block]]
            block = follow[block]
        return path


_GLOBAL = ("LDG", "STG", "LDGSTS")
_ENDS = ("BRA", "JMP", "EXIT", "RET", "BRX", "JMX")


def count(instructions: Iterable[Instruction]) -> collections.Counter[str]:
    """How often each opcode occurs; memory accesses as LDG.128, MUFU by its function."""
    counter: collections.Counter[str] = collections.Counter()
    for i in instructions:
        if i.base in _GLOBAL:
            counter[f"{i.base}.{i.width}"] += 1
        elif i.base == "MUFU":
            counter[".".join(i.opcode.split(".")[:2])] += 1
        else:
            counter[i.base] += 1
    return counter


@functools.cache
def tool(name: str) -> str:
    """Path of nvdisasm or cuobjdump inside the triton package."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the ahead-of-time lint needs the triton package, for its compiler and disassembler")
    path = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    if not path.exists():
        raise FileNotFoundError(f"this triton package has no {name} ({path})")
    return str(path)


def disassemble(cubin: bytes, cache: Path | None = None) -> list[Function]:
    """Every kernel of a cubin. `cache`: a folder to keep the tools' output in, a quarter of a second for each cubin."""
    kept = cache / f"{hashlib.sha256(cubin).hexdigest()}.sass" if cache is not None else None
    if kept is not None and kept.exists():
        text = kept.read_text()
    else:
        text = _tools_output(cubin)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(text)
    functions = {f.name: f for f in parse(text)}
    for name, registers, stack, shared, _ in _RESOURCES.findall(text):
        if name in functions:
            function = functions[name]
            function.registers, function.stack, function.shared = int(registers), int(stack), int(shared)
    return [f for f in functions.values() if f.registers]


def _tools_output(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tool("cuobjdump"), "--dump-resource-usage", file.name], [tool("nvdisasm"), "-c", "-ndf", file.name]
        return "\n".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)


def parse(text: str) -> list[Function]:
    functions: list[Function] = []
    for line in text.splitlines():
        if section := _SECTION.match(line):
            functions.append(Function(section.group(1), [], {}))
        elif not functions:
            continue
        elif label := _LABEL.match(line.strip()):
            functions[-1].labels[label.group(1)] = len(functions[-1].instructions)
        elif match := _INSTRUCTION.match(line):
            functions[-1].instructions.append(Instruction(match.group(1), match.group(2), match.group(3).strip()))
    return functions


def occupancy(target: int, registers: int, shared: int, warps: int) -> tuple[int, float, str]:
    """(blocks a multiprocessor holds, share of its warps, what limits it)."""
    device = DEVICES[target]
    per_warp = math.ceil(max(registers, 1) / 8) * 8 * 32
    limits = {
        "registers": device.registers // per_warp // warps,
        "shared memory": device.shared // (shared + 1024),  # the system takes 1 KiB of each block
        "warps": device.warps // warps,
        "blocks": device.blocks,
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limits[limit] * warps / device.warps, limit
