"""The same table for CUDA C++: nvcc makes PTX, ptxas reports resources, and the machine code is read as for Triton.

Where the build has just compiled a source for the target (setup.py, with the same optimization and ptxas' report beside
the object), its machine code is read, and nothing is compiled a second time.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import measure, sass
from .rules import Row, Rules, check

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
ARCHITECTURES = {80: "80", 90: "90a"}

#: By a regular expression on the readable name, first match; the default is `Rules()`.
RULES: dict[str, Rules] = {
    # One block, whose warpgroups overlap each other; the general ones take whatever the features of a call cost.
    r"attention_\w+_sm90_kernel<\w+, \d+, false>": Rules(tensor_cores=True, tensor_share=0.98, beside=0.98),
    r"attention_\w+_sm90_kernel<": Rules(tensor_cores=True, tensor_share=0.7, beside=0.98),
    # mma.sync on every target. By their registers two blocks share a multiprocessor.
    r"attention_fwd_kernel<\w+, (64|128),": Rules(warp_mma=True, blocks=2),
    r"attention_(fwd|bwd_dq|bwd_dkdv|bwd_dbias)_kernel<": Rules(warp_mma=True),
    r"attention_\w*rows_kernel<": Rules(occupancy=0.5),
    # Two or three stages of keys and values in flight: 32 to 64 KiB of them a block.
    r"attention_decode_kernel<\w+, (64|128)>": Rules(copies=True, warp_mma=True, blocks=3),
    r"attention_decode_kernel<": Rules(copies=True, warp_mma=True, blocks=2),
    r"attention_decode_merge_kernel<": Rules(occupancy=0.5),
    # Few warps, but each thread has three 128-bit loads in flight: 36 KiB a multiprocessor, where memory latency times
    # bandwidth asks for 15 on an H100.
    r"rows_kernel<(__half|__nv_bfloat16), .*GatedBackward": Rules(vector=True, occupancy=0.375),
    r"rows_kernel<": Rules(vector=True, occupancy=0.5),
    # Random words and activations keep them busy: few warps cost them little.
    r"fused_(fwd|bwd)_kernel<": Rules(vector=True, occupancy=0.375),
    # Four rows in flight in every thread, of 16 bytes: 12 warps are 24 KiB, and with "max" twice that of the maxima.
    # Narrow loads: the factor of each row, the same for all of its columns.
    r"bag_forward_kernel<\w+, [48],": Rules(vector=True, narrow=4, occupancy=0.375),
    # Eight columns are 8 or 4 bytes, and a 128-bit store or two.
    r"quantized_bag_kernel<\w+, 8,": Rules(occupancy=0.5),
    r"segment_kernel<\w+, [48], 1,": Rules(vector=True, occupancy=0.18, barriers=0),
    r"segment_kernel<\w+, [48], [24],": Rules(vector=True, occupancy=0.12, barriers=0),
    r"segment_kernel<": Rules(barriers=0),
    r"draw_(unique_)?kernel$": Rules(unfused=True),
    # A lane copies what it will read itself: eight rows in flight without a barrier, 32 to 64 KiB of them a block.
    r"own_classes_kernel<": Rules(copies=True, barriers=0, occupancy=0.25),
    # One block on a multiprocessor: its registers hold half of the weights.
    r"recurrent_cluster_(forward|backward)_kernel<": Rules(warp_mma=True),
    # mma.sync on every target. By their registers two blocks share a multiprocessor.
    r"(logits_fwd|logits_bwd|product)_kernel<": Rules(copies=True, warp_mma=True, blocks=2),
}

_THREADS = re.compile(r"\.entry\s+(\w+)\s*\((?:[^)]*)\)\s*((?:\.\w+[^\n{]*\n)*)")
_MAXNTID = re.compile(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?")
_MAX_THREADS = re.compile(
    r"^\.nv\.info\.(\w+)\n(?:(?!\.nv\.info|\.text).*\n)*?"
    r"\s*Attribute:\s*EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*([0-9a-fx ]+)",
    re.M,
)
#: wgmma that ptxas serialised (C7514) or gave a fence of its own (C7519), which it calls information.
_NOTE = re.compile(r"[^\n]*C75\d\d[^\n]*")
_LOG = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.S)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def release(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def targets(source: Path) -> tuple[int, ...]:
    """A file named *_sm90.cu holds Hopper's own instructions, which other targets do not compile."""
    return (90,) if source.stem.endswith("_sm90") else tuple(ARCHITECTURES)


def run(compiler: str, source: Path, target: int) -> list[Row]:
    """A row for each kernel of `source`; one row with the fault where it does not compile."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            code = _built(source, target, Path(folder)) or _compiled(compiler, source, target, Path(folder))
        except subprocess.CalledProcessError as error:
            text = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
            return [Row(source.name, "?", target, faults=[f"does not compile: {text}"])]
        logs = dict(_LOG.findall(code.log))
        functions = sass.disassemble(code.cubin.read_bytes()) if logs else []
    rows = []
    for function, name in zip(functions, readable([f.name for f in functions]), strict=True):
        row = Row(source.name, name, target)
        warps = -(-code.threads.get(function.name, 1024) // 32)
        measure.from_function(row, function, warps, function.shared, logs.get(function.name, ""))
        row.seconds = (time.perf_counter() - start) / len(functions)
        rules = next((r for pattern, r in RULES.items() if re.search(pattern, row.kernel)), Rules())
        row.faults += check(row, rules)
        rows.append(row)
    for row, notes in zip(rows, noted(code.log, [function.name for function in functions]), strict=True):
        row.faults += notes
    return rows


def noted(log: str, names: Sequence[str]) -> list[list[str]]:
    """ptxas' C75xx notes for each of these functions; the first one has those that name none of them."""
    found: list[list[str]] = [[] for _ in names]
    for note in _NOTE.findall(log) if names else ():
        found[next((i for i, name in enumerate(names) if name in note), 0)].append(note.strip())
    return found


class Code(NamedTuple):
    """Machine code of one source for one target: the file, threads of each kernel's largest block, ptxas' report."""

    cubin: Path
    threads: dict[str, int]
    log: str


def _compiled(compiler: str, source: Path, target: int, folder: Path) -> Code:
    arch, ptx, cubin = ARCHITECTURES[target], folder / "out.ptx", folder / "out.cubin"
    flags = ["-std=c++20", "-O3", f"-I{SOURCES.parent}", f"-arch=compute_{arch}"]
    _output(compiler, "-ptx", *flags, str(source), "-o", str(ptx))
    log = _output(str(_beside(compiler)), "-v", "-O3", f"--gpu-name=sm_{arch}", str(ptx), "-o", str(cubin)).stderr
    return Code(cubin, _threads(ptx.read_text()), log)


def _built(source: Path, target: int, folder: Path) -> Code | None:
    """From the object of the build, unless that is older than any source, or was made for other targets."""
    newest = max(path.stat().st_mtime for path in SOURCES.iterdir())
    for made in SOURCES.parents[1].glob(f"build/ninja-*/cuda/{source.name}.o"):
        report = Path(f"{made}.log")
        if made.stat().st_mtime < newest or not report.exists():
            continue
        text = report.read_text()
        reports = re.split(r"(?=ptxas info\s*: Compiling entry function)", text)
        log = "".join(part for part in reports if f"for 'sm_{ARCHITECTURES[target]}'" in part)
        log += "".join(f"\n{note}" for note in _NOTE.findall(text) if note not in log)
        cubin = folder / f"{source.stem}.sm_{ARCHITECTURES[target]}.cubin"
        subprocess.run(
            [sass.tool("cuobjdump"), "-xelf", cubin.name, str(made)], cwd=folder, check=True, capture_output=True
        )
        if log and cubin.exists():
            text = _output(sass.tool("cuobjdump"), "-elf", str(cubin)).stdout
            threads = {name: math.prod(int(n, 16) for n in sizes.split()) for name, sizes in _MAX_THREADS.findall(text)}
            return Code(cubin, threads, log)
    return None


def _output(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def readable(names: Sequence[str]) -> list[str]:
    """The demangled names without their parameter lists."""
    if shutil.which("c++filt") is None:
        return list(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_without_parameters(name) for name in text.split("\n")[: len(names)]]


def _without_parameters(name: str) -> str:
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and not name.startswith("(anonymous", i):
            name = name[:i]
            break
    return name.removeprefix("void ").replace("(anonymous namespace)::", "")


def _beside(compiler: str) -> Path:
    """ptxas of the toolkit that nvcc belongs to (nvcc may be a wrapper script, so ask it)."""
    trace = subprocess.run([compiler, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    match = re.search(r"#\$ TOP=(\S+)", trace)
    found = Path(match.group(1), "bin", "ptxas") if match else None
    return found if found is not None and found.exists() else Path(shutil.which("ptxas") or "ptxas")


def _threads(ptx: str) -> dict[str, int]:
    """Kernel -> threads of its largest block, from __launch_bounds__."""
    found: dict[str, int] = {}
    for name, directives in _THREADS.findall(ptx):
        match = _MAXNTID.search(directives)
        sizes = [int(n) for n in match.groups() if n] if match else [1024]
        found[name] = math.prod(sizes)
    return found
