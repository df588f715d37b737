"""`make gpu` where there is no GPU, and its summary from a record."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pykernels.testing.spec import load

ROOT = Path(__file__).parent.parent


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


def test_the_shares_fit_nine_minutes(gpu: ModuleType) -> None:
    assert sum(gpu.SHARE.values()) <= 540
    assert all((ROOT / path).exists() for path in gpu.GPU_TESTS)


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


def test_a_step_that_hangs_is_recorded_with_what_it_printed(gpu: ModuleType) -> None:
    code = "import time; print('begun', flush=True); time.sleep(30)"
    outcome = gpu.run([sys.executable, "-c", code], 1.5)
    assert outcome["exit_code"] == 124 and "begun" in outcome["output_tail"] and "out of time" in outcome["output_tail"]
    assert gpu.run(["no-such-program"], 5)["exit_code"] == 127


def test_shapes_for_clusters_fit_them() -> None:
    """Each of the two rows that are left has a shape that fills a GPU."""
    specs = [spec for spec in load("recurrent") if spec.name in ("lstm", "gru") and spec.gpu_bench]
    fitting = [case.label for spec in specs for case in spec.timed("cuda") if case.inputs["h0"].shape[-1] <= 512]
    assert fitting == ["T1024-B16-H512"] * 2
