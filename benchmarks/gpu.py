"""`make gpu`: build for the GPU that is here, run the contract on it, measure, write a record.

    python benchmarks/gpu.py                    everything, inside nine minutes
    python benchmarks/gpu.py --only bench       one step or several (build, tests, sanitizer, bench), e.g. to resume

Needs no network: what is missing (compute-sanitizer, pytest-xdist) is left out and said so. Each step has its share of
the time; a step that runs out of it is recorded as such, with what it had printed. The summary table is printed last,
the record is benchmarks/results/<gpu>-<date>.json. Without a GPU: exit code 3.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# seconds for each step; together under nine minutes
SHARE = {"build": 150, "tests": 170, "sanitizer": 50, "bench": 150}
GPU_TESTS = (
    "tests/test_contract.py",
    "tests/test_activation.py",
    "tests/test_attention_sm90.py",
    "tests/test_recurrent_kernels.py",
    "tests/test_recurrent_cluster.py",
    "tests/test_backends.py",
    "tests/test_emulator_collectives.py",  # on a GPU these compare our definitions with the hardware
)


def _text(stream: str | bytes | None) -> str:
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""


def run(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Runs one step; its exit code, time, what it wrote to standard output, and the end of all it wrote."""
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, timeout=seconds, capture_output=True, text=True
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, output, errors = 124, _text(late.stdout), f"{_text(late.stderr)}\n(out of time)"
    except FileNotFoundError as missing:
        code, output, errors = 127, "", str(missing)
    tail = f"{output[-8000:]}\n{errors[-4000:]}".strip()
    print(tail[-4000:], flush=True)
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "output_tail": tail,
        "output": output,
    }


def step_build(seconds: float) -> dict[str, Any]:
    """The CUDA module for this GPU alone, and the CPU module; no pip, no network."""
    major, minor = _capability()
    number = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run(command, seconds, TORCH_CUDA_ARCH_LIST=number, PYKERNELS_BUILD="auto")


def step_tests(seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", *GPU_TESTS]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "6"]
    outcome = run(command, seconds)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", outcome["output"][-400:])
    }
    outcome["counts"] = counts
    outcome["failed"] = re.findall(r"^FAILED (\S+)", outcome["output"], re.M)
    return outcome


SANITIZED = """
import torch
from pykernels.testing.run import evaluate
from pykernels.testing.spec import load
for spec in load():
    for backend in {"triton", "cuda"} & set(spec.kernels):
        for case in spec.cases[:6]:
            evaluate(spec.function, case, case.make(torch.float32, "cuda"), backend=backend)
torch.cuda.synchronize()
"""


def step_sanitizer(seconds: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"exit_code": None, "why": "compute-sanitizer is not installed here"}
    return run([tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SANITIZED], seconds)


def served(backend: str) -> list[str]:
    """The rooms with benchmark shapes that this backend serves."""
    from pykernels.testing.spec import ROOMS, load

    return [room for room in ROOMS if any(backend in spec.kernels and spec.bench for spec in load(room))]


# What the registry does not choose by itself, beside what it does: the same shapes, rows named by the way they ran.
CLUSTERS = """
import json
import torch
from pykernels._cuda import recurrent
from pykernels.testing import bench
from pykernels.testing.spec import load
found = []
with recurrent.run_as("cluster"):
    for spec in load("recurrent"):
        for case in spec.timed("cuda") if spec.name in ("lstm", "gru") else ():
            if case.inputs["h0"].shape[-1] > 512:  # refused: its weights do not fit a cluster's shared memory
                continue
            rows = bench.rows(spec, case, torch.bfloat16, backend="cuda", device="cuda", compile_modes=(), seconds=0.15)
            found += [row.as_dict() | {"backend": "cuda, clusters"} for row in rows]
print(json.dumps({"rows": found}))
"""


def step_bench(seconds: float) -> dict[str, Any]:
    """Each backend over each room's benchmark shapes; the tables are in the record as `rows`.

    "cuda-sm90" is `cuda` with `--sm90 always`; its rows say where `auto` may take those kernels.
    """
    found: dict[str, Any] = {"exit_code": 0, "rows": []}
    deadline = time.monotonic() + seconds
    jobs = [(room, b, d) for d in ("bfloat16", "float32") for b in ("triton", "cuda") for room in served(b)]
    jobs[:0] = [("attention", "cuda-sm90", "bfloat16")] if _capability() == (9, 0) else []
    for room, backend, dtype in jobs:
        command = [sys.executable, "-m", "pykernels", "bench", room, "--json", "--device", "cuda"]
        command += ["--dtype", dtype, "--backend", backend.removesuffix("-sm90"), "--seconds", "0.15"]
        command += ["--sm90", "always" if backend.endswith("-sm90") else "never"]
        outcome = run(command, max(deadline - time.monotonic(), 1))
        found["exit_code"] = found["exit_code"] or outcome["exit_code"]
        try:
            report = json.loads(outcome["output"][outcome["output"].find("{") :])
        except ValueError:
            found.setdefault("unreadable", []).append(f"{room} {backend} {dtype}: {outcome['output_tail'][-2000:]}")
            continue
        found["rows"] += [{**row, "backend": backend} for row in report["rows"]]
        found["copy_bytes_per_second"], found["limits"] = report["copy_bytes_per_second"], report["limits"]
    if _capability() == (9, 0):
        outcome = run([sys.executable, "-c", CLUSTERS], max(deadline - time.monotonic(), 1))
        found["exit_code"] = found["exit_code"] or outcome["exit_code"]
        if outcome["exit_code"] == 0:
            found["rows"] += json.loads(outcome["output"].splitlines()[-1])["rows"]
    return found


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


def describe() -> dict[str, Any]:
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver, clock, maximum clock, power limit": smi,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def summary(record: dict[str, Any]) -> str:
    lines = [f"{record['machine']['gpu']}, torch {record['machine']['torch']}, {record['machine']['commit'][:10]}"]
    for name, outcome in record["steps"].items():
        state = {None: f"left out: {outcome.get('why')}", 0: "ok", 124: "OUT OF TIME"}.get(
            outcome["exit_code"], "FAILED"
        )
        lines.append(f"{name:10} {state:12} {outcome.get('seconds', '')} s  {outcome.get('counts', '')}")
        lines += [f"    {test}" for test in outcome.get("failed", [])[:20]]
    rows = record["steps"].get("bench", {}).get("rows", [])
    if rows:
        lines.append(
            f"{'op':16} {'shape':12} {'dtype':9} {'backend':9} {'direction':17} {'ms':>8} {'GB/s':>7} {'x peer':>7}"
        )
    for row in rows:
        ours = row["seconds"].get("pykernels")
        what = f"{row['op']:16} {row['shape']:12} {row['dtype']:9} {row['backend']:9} {row['direction']:17}"
        if ours is None:
            lines.append(f"{what} check FAILED")
            continue
        peers = [t["median"] for name, t in row["seconds"].items() if name not in ("pykernels", "copy")]
        rate = f"{row['moved'] / ours['median'] / 1e9:7.0f}" if row.get("moved") else " " * 7
        ratio = f"{min(peers) / ours['median']:7.2f}" if peers else ""
        lines.append(f"{what} {ours['median'] * 1e3:8.4f} {rate} {ratio}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHARE), help="steps to run (default: all)")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("make gpu: torch is not installed for this python", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device is visible to torch here; nothing was run", file=sys.stderr)
        return 3
    os.environ.pop("TRITON_INTERPRET", None)
    machine = describe()
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = RESULTS / f"{name}-{machine['date'][:10]}.json"
    record: dict[str, Any] = {"machine": machine, "steps": {}}
    if arguments.only and path.exists():
        record["steps"] = json.loads(path.read_text())["steps"]
    for step in arguments.only or SHARE:
        outcome = globals()[f"step_{step}"](SHARE[step])
        outcome.pop("output", None)
        record["steps"][step] = outcome
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")  # after each step: what was measured is never lost
    print(f"\nrecord: {path.relative_to(ROOT)}\n{summary(record)}")
    return 0 if all(outcome["exit_code"] in (0, None) for outcome in record["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
