"""`make gpu`: build for the GPU that is here, run the contract on it, measure, write a record.

    python benchmarks/gpu.py                    everything, inside nine minutes
    python benchmarks/gpu.py --only bench       some of build, tests, sanitizer, bench: all the time is theirs
    python benchmarks/gpu.py --output FOLDER    the record and each step's whole output there
    python benchmarks/gpu.py --dry-run          the same script without a GPU: the emulator in its place, small shapes

Needs no network: what is missing (compute-sanitizer, pytest-xdist) is left out and said so. Each step has its share of
the time and what the steps before it left of theirs; one that runs out of it is stopped, with all its processes, and
recorded as such, with what it had printed. The summary table is printed last, whatever failed; the record,
<gpu>-<date>.json, is written after each step. Without a GPU: exit code 3.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# seconds for each step; together under nine minutes
SHARE = {"build": 150, "tests": 170, "sanitizer": 50, "bench": 150}
GRACE = 10  # of these, for a step that ran out of time to say what it knows
GPU_TESTS = (
    "tests/test_contract.py",
    "tests/test_activation.py",
    "tests/test_sm90_kernels.py",
    "tests/test_attention_sm90.py",
    "tests/test_recurrent_kernels.py",
    "tests/test_recurrent_cluster.py",
    "tests/test_backends.py",
    "tests/test_emulator_collectives.py",  # on a GPU these compare our definitions with the hardware
)
DRY_TESTS = ("tests/test_emulator_collectives.py", "-k", "vote or shuffle")

dry = False  # --dry-run


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C, on which pytest says what failed so far; then all its processes, which would disturb what follows."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def _read(stream: Any) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def run(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Runs a command; its exit code (124: out of time), time, what it wrote to standard output, and the end of all."""
    print(f"\n$ {' '.join(part if len(part) < 100 else '...' for part in command)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    late = ""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # pipes would stay open in grandchildren
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as missing:
            code, late = 127, str(missing)
        else:
            try:
                code = process.wait(max(seconds - GRACE, seconds / 2))
            except subprocess.TimeoutExpired:
                code, late = 124, "(out of time)"
                _stop(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        output, errors = _read(out), _read(err)
    errors = f"{errors}\n{late}".strip()
    tail = f"{output[-8000:]}\n{errors[-4000:]}".strip()
    print(tail[-4000:], flush=True)
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "output_tail": tail,
        "output": output,
        "errors": errors,
    }


def _joined(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One outcome of several commands: the first failure's code."""
    texts = {key: "\n".join(part[key] for part in parts.values()) for key in ("output", "errors", "output_tail")}
    code = next((part["exit_code"] for part in parts.values() if part["exit_code"]), 0)
    failed = [name for name, part in parts.items() if part["exit_code"]]
    seconds = {name: part["seconds"] for name, part in parts.items()}
    return {"exit_code": code, "seconds": round(sum(seconds.values()), 1), "parts": seconds, "failed": failed, **texts}


def step_build(seconds: float) -> dict[str, Any]:
    """The CUDA module for this GPU alone, then the CPU module, without which the rest can go on; no pip, no network."""
    major, minor = _capability()
    number = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    command, deadline, parts = [sys.executable, "setup.py", "build_ext", "--inplace"], time.monotonic() + seconds, {}
    for kind in ("none",) if dry else ("cuda", "cpu"):
        left = deadline - time.monotonic()
        parts[kind] = run(command, max(left, 2), TORCH_CUDA_ARCH_LIST=number, PYKERNELS_BUILD=kind)
    return _joined(parts)


def step_tests(seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", *(DRY_TESTS if dry else GPU_TESTS)]
    if importlib.util.find_spec("xdist") and not dry:
        # The contract alone has 3000 launches that Triton compiles apart, 1000 s of a processor in all.
        command += ["-n", str(max(2, min(14, (os.cpu_count() or 8) - 2)))]
    outcome = run(command, seconds)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", outcome["output"][-400:])
    }
    outcome["counts"] = counts
    outcome["failed"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", outcome["output"], re.M)
    return outcome


SANITIZED = """
import sys
import torch
from pykernels.testing.run import evaluate
from pykernels.testing.spec import load
device, room, *backends = sys.argv[1:]
specs = load(room or None)
for n in range(6):  # a case of every operator before the next case of any: time may run out
    dtype = (torch.float16, torch.float32)[n % 2]
    for spec in specs:
        for backend in {*backends} & {*spec.kernels}:
            for case in spec.cases[n : n + 1]:
                evaluate(spec.function, case, case.make(dtype, device), backend=backend)
    print(f"{n + 1} cases of each operator", flush=True)
if device == "cuda":
    torch.cuda.synchronize()
"""


def step_sanitizer(seconds: float) -> dict[str, Any]:
    """Memory errors; the emulator of a dry run looks for them itself."""
    program = [
        sys.executable,
        "-c",
        SANITIZED,
        *(("cpu", "activation", "emulator") if dry else ("cuda", "", "triton", "cuda")),
    ]
    if dry:
        return run(program, seconds)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"exit_code": None, "why": "compute-sanitizer is not installed here"}
    return run([tool, "--tool", "memcheck", "--error-exitcode", "9", *program], seconds)


def step_bench(seconds: float) -> dict[str, Any]:
    """What gpu_rows.py measures until the time ends; behind a job that took its process down, another process does."""
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {"exit_code": 0, "rows": [], "failed": [], "left_out": []}
    first, texts = 0, []
    while True:
        left = deadline - time.monotonic()
        command = [sys.executable, "benchmarks/gpu_rows.py", "--seconds", f"{max(left - 3 * GRACE, left / 2):.0f}"]
        outcome = run([*command, "--first", str(first), *(["--small"] if dry else [])], max(left, 2))
        texts.append((outcome["output"], outcome["errors"]))
        last = None
        for line in outcome["output"].splitlines():
            try:
                said = json.loads(line)
            except ValueError:  # something else's print, or the last line of a process that was stopped
                continue
            last = said if "job" in said else last
            found["rows"] += [said["row"]] if "row" in said else []
            found["failed"] += [f"{said['failed']}: {said['why']}"] if "failed" in said else []
            found["left_out"] += said.get("left_out", [])
            found |= {key: said[key] for key in ("limits", "copy_bytes_per_second") if key in said}
        if outcome["exit_code"] == 0:
            break
        found["output_tail"] = outcome["output_tail"]
        if last is None or outcome["exit_code"] == 124 or last["job"] + 1 >= last["of"]:
            found["exit_code"] = outcome["exit_code"]
            break
        if outcome["exit_code"] != 70:  # 70: it has said itself what failed
            found["failed"].append(f"{last['name']}: ended its process (exit code {outcome['exit_code']})")
        first = last["job"] + 1
    wrong = [
        f"{row['op']} {row['shape']} {row['dtype']} {row['backend']}" for row in found["rows"] if not row["correct"]
    ]
    found["failed"] += dict.fromkeys(f"{name}: check failed" for name in wrong)
    found["exit_code"] = found["exit_code"] or int(bool(found["failed"]))
    found["seconds"] = round(seconds - (deadline - time.monotonic()), 1)
    return found | {
        key: "\n".join(text) for key, text in zip(("output", "errors"), zip(*texts, strict=True), strict=True)
    }


def _capability() -> tuple[int, int]:
    import torch

    return (9, 0) if dry else torch.cuda.get_device_capability()


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def describe() -> dict[str, Any]:
    import torch

    machine: dict[str, Any] = {"gpu": "dry run on the emulator"}
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        machine = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver, clock, maximum clock, power limit": _said_by(
                "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"
            ),
        }
    return machine | {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch.version.cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _said_by("nvcc", "--version")[-60:],
        "commit": _said_by("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def summary(record: dict[str, Any]) -> str:
    lines = [f"{record['machine']['gpu']}, torch {record['machine']['torch']}, {record['machine']['commit'][:10]}"]
    for name, outcome in record["steps"].items():
        state = {None: f"left out: {outcome.get('why')}", 0: "ok", 124: "OUT OF TIME"}.get(
            outcome["exit_code"], "FAILED"
        )
        left_out = f"{len(outcome['left_out'])} jobs had no time left" if outcome.get("left_out") else ""
        lines.append(f"{name:10} {state:12} {outcome.get('seconds', '')} s  {outcome.get('counts', left_out)}")
        lines += [f"    {test[:200]}" for test in outcome.get("failed", [])[:20]]
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


def _trouble() -> str | None:
    """Why nothing can be run here."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed for this python ({sys.executable})"
    if dry or torch.cuda.is_available():
        return None
    built = "" if torch.version.cuda else f"; torch {torch.__version__} was built without CUDA"
    return f"no CUDA device is visible to torch here{built}; nothing was run (--dry-run needs none)"


def _take(step: str, seconds: float, folder: Path | None) -> dict[str, Any]:
    """Runs a step, whose own mistakes must not cost what the others found."""
    try:
        outcome = globals()[f"step_{step}"](seconds)
    except Exception:
        outcome = {"exit_code": 1, "output_tail": traceback.format_exc()}
        print(outcome["output_tail"], flush=True)
    whole = f"{outcome.pop('output', '')}\n{outcome.pop('errors', '')}"
    if folder:
        (folder / f"{step}.log").write_text(whole)
    return outcome


def _interrupted(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHARE), help="steps to run (default: all)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the record and logs (default: the record only)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; the steps' shares follow")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on the emulator")
    arguments = parser.parse_args()
    global dry
    dry = arguments.dry_run
    if trouble := _trouble():
        print(f"make gpu: {trouble}", file=sys.stderr)
        return 3
    if not dry:
        os.environ.pop("TRITON_INTERPRET", None)
    signal.signal(signal.SIGTERM, _interrupted)
    machine = describe()
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    folder = arguments.output or (ROOT / "build" / "dry-run" if dry else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{machine['date'][:10]}.json"
    record: dict[str, Any] = {"machine": machine, "steps": {}}
    if arguments.only and path.exists():
        record["steps"] = json.loads(path.read_text())["steps"]
    steps = [step for step in SHARE if not arguments.only or step in arguments.only]
    whole = 60 * arguments.minutes - GRACE  # what is left over pays for starting and for the summary
    planned = 0.0
    try:
        for step in steps:
            planned += whole * SHARE[step] / sum(SHARE[one] for one in steps)
            seconds = max(planned - (time.monotonic() - begun), 2 * GRACE if not dry else 2)
            record["steps"][step] = _take(step, seconds, arguments.output or (folder if dry else None))
            path.write_text(json.dumps(record, indent=1) + "\n")  # after each step: what was measured is never lost
    finally:
        print(f"\nrecord: {path}\n{summary(record)}", flush=True)
    return 0 if all(outcome["exit_code"] in (0, None) for outcome in record["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
