"""`make gpu` where there is no GPU, and its summary from a record."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pykernels.testing.spec import ROOMS, load

ROOT = Path(__file__).parent.parent
SHARES = ("build", "tests", "sanitizer", "bench")


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would run")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and "no CUDA device" in done.stderr and not done.stdout


def test_a_dry_run_takes_every_step_and_writes_the_record(tmp_path: Path) -> None:
    """The script itself, from its arguments to its summary, with the emulator for the GPU."""
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--minutes", "6", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = tmp_path.glob("*.json")
    steps = json.loads(path.read_text())["steps"]
    assert {name: steps[name]["exit_code"] for name in steps} == dict.fromkeys(SHARES, 0)
    assert steps["tests"]["counts"]["passed"] > 0
    rows = steps["bench"]["rows"]
    assert {row["room"] for row in rows} == set(ROOMS) and all(
        row["seconds"]["pykernels"]["median"] > 0 for row in rows
    )
    assert {row["backend"] for row in rows} == {"emulator", "emulator, sm90"}
    assert {row["room"] for row in rows if row["backend"].endswith("sm90")} == {"attention", "recurrent"}
    assert {log.name for log in tmp_path.glob("*.log")} == {f"{name}.log" for name in SHARES}
    assert "passed" in (tmp_path / "tests.log").read_text()
    summary = done.stdout[done.stdout.rindex("record: ") :]
    assert str(path) in summary and all(f"\n{name} " in summary for name in (*SHARES, "sigmoid", "lstm"))


def test_the_shares_fit_nine_minutes(gpu: ModuleType) -> None:
    assert tuple(gpu.SHARE) == SHARES and sum(gpu.SHARE.values()) <= 540
    assert all((ROOT / path).exists() for path in gpu.GPU_TESTS)


def _said(*lines: Any) -> str:
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)


def test_rows_before_and_behind_a_kernel_that_ends_its_process_are_kept(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"op": "gelu", "shape": "8", "dtype": "bfloat16", "backend": "cuda", "correct": True}
    said = [
        (-11, _said({"limits": {}}, {"job": 0, "name": "a", "of": 4}, {"row": good}, {"job": 1, "name": "b", "of": 4})),
        (70, _said({"job": 2, "name": "c", "of": 4}, {"failed": "c", "why": "illegal memory access"})),
        (
            124,
            _said(
                "a print of torch", {"job": 3, "name": "d", "of": 4}, {"row": good | {"correct": False}}, '{"row": {'
            ),
        ),
    ]
    calls = []

    def run(command: list[str], seconds: float) -> dict[str, Any]:
        calls.append(command[command.index("--first") + 1])
        code, output = said[len(calls) - 1]
        return {"exit_code": code, "output": output, "errors": "", "output_tail": output}

    monkeypatch.setattr(gpu, "run", run)
    found = gpu.step_bench(100.0)
    assert calls == ["0", "2", "3"] and len(found["rows"]) == 2 and found["limits"] == {} and found["exit_code"] == 124
    assert found["failed"] == [
        "b: ended its process (exit code -11)", "c: illegal memory access", "gelu 8 bfloat16 cuda: check failed",
    ]  # fmt: skip


def test_a_step_that_raises_costs_no_other(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(seconds: float) -> dict[str, Any]:
        raise KeyError("rows")

    for name in SHARES:
        monkeypatch.setattr(gpu, f"step_{name}", broken if name == "build" else lambda seconds: {"exit_code": 0})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--output", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    (path,) = tmp_path.glob("*.json")
    steps = json.loads(path.read_text())["steps"]
    assert "KeyError" in steps["build"]["output_tail"] and steps["bench"]["exit_code"] == 0
    assert "build      FAILED" in capsys.readouterr().out


def test_the_next_step_starts_without_processes_of_the_one_before(gpu: ModuleType, tmp_path: Path) -> None:
    """A compiler or a test worker that goes on would hold memory of the GPU while others are timed."""
    held = tmp_path / "held"  # locked for as long as the worker lives
    worker = (
        f"import fcntl, time; f = open({str(held)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('begun', flush=True)"
    )
    worker += "; time.sleep(600)"
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)"
    command = [sys.executable, "-c", f"{code}; print(p.stdout.readline().decode(), flush=True)", worker]

    def ended() -> bool:
        end = time.monotonic() + 60  # it is killed, which is not waited for
        with held.open("w") as file:
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                time.sleep(0.05)
        return False

    start = time.monotonic()
    assert gpu.run(command, 300)["output_tail"] == "begun" and time.monotonic() - start < 300 and ended()
    command[2] += "; import time; time.sleep(600)"
    for seconds in (4, 30, 200):  # on a busy machine it takes a while to begin
        outcome = gpu.run(command, seconds)
        assert outcome["exit_code"] == 124 and "out of time" in outcome["output_tail"]
        if "begun" in outcome["output_tail"]:
            break
    assert "begun" in outcome["output_tail"] and ended()


def test_summary_names_failures_and_gives_no_speed_to_a_wrong_kernel(gpu: ModuleType) -> None:
    timing = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3}
    row = {
        "op": "gelu",
        "shape": "256x4096",
        "dtype": "bfloat16",
        "backend": "triton",
        "direction": "forward",
        "moved": 4_000_000,
    }
    record = {
        "machine": {"gpu": "GPU X", "torch": "2.13", "commit": "0123456789ab"},
        "steps": {
            "build": {"exit_code": 0, "seconds": 61.0},
            "tests": {"exit_code": 1, "seconds": 9, "counts": {"failed": 1}, "failed": ["tests/test_contract.py::a"]},
            "sanitizer": {"exit_code": None, "why": "not installed"},
            "bench": {
                "exit_code": 124,
                "rows": [
                    {**row, "seconds": {"pykernels": timing, "eager": {**timing, "median": 2e-3}, "copy": timing}},
                    {**row, "op": "silu", "seconds": {}},
                ],
            },
        },
    }  # fmt: skip
    lines = gpu.summary(record).splitlines()
    text = "\n".join(lines)
    assert "FAILED" in text and "tests/test_contract.py::a" in text and "left out: not installed" in text
    assert "OUT OF TIME" in text
    gelu, silu = (next(line for line in lines if line.startswith(op)) for op in ("gelu", "silu"))
    assert "1.0000" in gelu and "4 " in gelu and gelu.endswith("2.00")
    assert silu.endswith("check FAILED")


def test_a_program_that_is_missing_is_recorded(gpu: ModuleType) -> None:
    assert gpu.run(["no-such-program"], 5)["exit_code"] == 127


def test_shapes_for_clusters_fit_them() -> None:
    """Each of the two rows that are left has a shape that fills a GPU."""
    specs = [spec for spec in load("recurrent") if spec.name in ("lstm", "gru") and spec.gpu_bench]
    fitting = [case.label for spec in specs for case in spec.timed("cuda") if case.inputs["h0"].shape[-1] <= 512]
    assert fitting == ["T1024-B16-H512"] * 2
