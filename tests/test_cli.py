"""The command line: what is printed, pure JSON, and exit codes that scripts can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import pykernels
from pykernels import functional
from pykernels.cli import _plot, bench, info, main, verify
from pykernels.testing import memory, timing
from pykernels.testing.limits import Limits
from pykernels.testing.spec import Case, Input, OpSpec, load


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("command", ["info", "verify", "bench", "demo"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"Example: pykernels {command}" in result.stdout and "--json" in result.stdout


def test_version_and_unknown_command() -> None:
    assert pykernels.__version__ in run("--version").stdout
    assert run("nothing").exit_code == 2


def test_the_module_runs_as_a_program() -> None:
    environment = {**os.environ, "PYKERNELS_BACKEND": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", "pykernels.cli", "info"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "nonsense (unknown: allowed are auto, reference, cpu" in done.stdout


# info


def test_info_says_what_is_there_and_how_to_get_the_rest() -> None:
    found = json.loads(run("info", "--json").stdout)
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["threads"] == torch.get_num_threads()
    assert set(found["backends"]) == {"activation", "attention", "recurrent", "embedding", "sampled_softmax"}
    reasons = {(entry["backend"], room): entry["reason"] for entry in found["missing"] for room in entry["rooms"]}
    for room, backends in found["backends"].items():
        for name, state in backends.items():
            assert state["available"] == ((name, room) not in reasons) == (state["reason"] is None)
    assert found["output_pool"]["max_bytes"] > 0
    text = run("info").stdout
    assert torch.__version__ in text and "sampled_softmax" in text and "PYKERNELS_BUILD" in text
    assert "MiB kept for reuse" in text


@pytest.mark.parametrize(
    ("backend", "reason", "tools", "driver", "said", "command"),
    [
        ("triton", "triton is not installed; pip install triton", (), True, "not installed", "pip install triton"),
        ("triton", "this torch is a CPU build (...)", (), False, "no NVIDIA driver", None),
        ("triton", "this torch is a CPU build (...)", (), True, "CPU build", "pip install --force-reinstall torch=="),
        ("cpu", "_cpu_ext is not built; ...", (), False, "no C++ compiler", "sudo apt install g++ && pip install"),
        ("cpu", "_cpu_ext is not built; ...", ("g++",), False, "not built", "pip install --no-deps -e"),
        ("cpu", "the CPU kernels are for Linux on x86-64; ...", ("g++",), False, "x86-64", None),
        ("cuda", "pykernels._cuda_ext was not built; ...", ("g++",), False, "nor an NVIDIA driver", None),
        ("cuda", "pykernels._cuda_ext was not built; ...", ("g++",), True, "install the CUDA toolkit", "pip install"),
        ("cuda", "pykernels._cuda_ext was not built; ...", ("g++", "nvcc"), False, "not built", "pip install"),
        ("cuda", "the embedding room has no CUDA C++ kernels yet", ("g++",), True, "no CUDA C++ kernels", None),
        ("emulator", "pykernels._emulator_ext was not built; ...", ("g++",), False, "tests", "PYKERNELS_BUILD=all pip"),
    ],
)  # fmt: skip
def test_what_info_says_is_missing_and_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch, backend: str, reason: str, tools: tuple[str, ...], driver: bool,
    said: str, command: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(info.shutil, "which", lambda tool: tool if tool in tools else None)
    monkeypatch.setattr(info, "_nvidia_driver", lambda: driver)
    for variable in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    text, found = info._remedy(backend, reason)
    assert said in text and (found is None) == (command is None) and (command or "") in (found or "")


# verify


def test_verify_passes_and_says_by_how_much() -> None:
    result = run("verify", "--op", "relu", "--backend", "cpu", "--dtype", "float32", "--dtype", "bfloat16", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["passed"] is True, result.output
    assert [row["dtype"] for row in found["rows"]] == ["float32", "bfloat16"]
    for row in found["rows"]:
        assert row["cases"] > 10 and row["output"]["error"] <= row["output"]["bound"] and row["gradient"] is not None
    text = run("verify", "--op", "relu", "--backend", "cpu", "--dtype", "float32").stdout
    assert "1 of 1 passed" in text


def test_verify_tells_operators_of_one_name_apart() -> None:
    names = [verify.label(spec) for spec in load("activation")]
    assert len(names) == len(set(names)) and {"gelu", "gelu tanh", "swish", "swish 1.702"} <= set(names)


def test_verify_finds_a_planted_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.relu
    monkeypatch.setattr(functional, "relu", lambda input, **more: right(input, **more) * 1.001)
    result = run("verify", "--op", "relu", "--backend", "reference", "--dtype", "float32")
    assert result.exit_code == 1 and "FAILED" in result.stdout and "out: error" in result.stdout


def test_verify_reports_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.relu

    def broken(input: torch.Tensor, **more: Any) -> torch.Tensor:
        if input.dim() == 3 and not input.is_contiguous():
            right(input, **more)
            raise RuntimeError("no such stride")
        return right(input, **more)

    monkeypatch.setattr(functional, "relu", broken)
    result = run("verify", "--op", "relu", "--backend", "reference", "--dtype", "float32", "--json")
    (row,) = json.loads(result.stdout)["rows"]
    assert (
        result.exit_code == 1
        and row["verdict"] == "failed"
        and "raised RuntimeError: no such stride" in row["failures"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--op", "relux"], "--op relux: no such operator; there are "),
        (["--backend", "cpux"], "'cpux' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (
            ["--op", "relu", "--backend", "triton", "--dtype", "float64"],
            "--backend triton: relu(): backend 'triton' cannot",
        ),
    ],
)
def test_verify_refuses_bad_input(arguments: list[str], complaint: str) -> None:
    result = run("verify", *arguments)
    assert result.exit_code == 2 and complaint in result.stderr and result.stdout == ""


def test_verify_starts_another_process_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def fake(arguments: list[str], env: dict[str, str]) -> SimpleNamespace:
        calls.append((arguments, env))
        return SimpleNamespace(returncode=1)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(verify.subprocess, "run", fake)
    result = run("verify", "--op", "relu", "--backend", "triton", "--dtype", "float16", "--device", "cpu", "--json")
    ((arguments, environment),) = calls
    assert result.exit_code == 1 and environment["TRITON_INTERPRET"] == "1"
    assert arguments[1:] == [
        "-m", "pykernels.cli", "verify", "--op=relu", "--backend=triton", "--dtype=float16", "--device=cpu", "--json",
    ]  # fmt: skip


# bench


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The activation room's benchmarks at toy shapes."""

    def small(spec: OpSpec) -> OpSpec:
        inputs = {name: Input((8, 64)) for name in spec.bench[0].inputs}
        return replace(spec, bench=(Case("8x64", inputs, spec.bench[0].options),))

    monkeypatch.setattr(bench, "load", lambda room: [small(spec) for spec in load(room) if spec.bench])
    monkeypatch.setattr(
        bench.take, "probe", lambda device, seconds: Limits(device, 1e10, 1e10, 2e10, {"float32": 1e11})
    )


FAST = ("--rounds", "5", "--seconds", "0")


@pytest.mark.usefixtures("short")
def test_bench_times_what_it_has_checked(tmp_path: Path) -> None:
    result = run("bench", "activation", "--op", "swiglu", "--compile", "none", *FAST, "--json", "--plot", str(tmp_path))
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and [row["direction"] for row in found["rows"]] == [*bench.bench.DIRECTIONS]
    for row in found["rows"]:
        assert set(row["seconds"]) == {"pykernels", "eager", "copy"} and row["correct"] and row["best_peer"] == "eager"
        assert row["bytes_per_second"] == row["moved"] / row["seconds"]["pykernels"]["median"]
    assert found["rows"][2]["moved"] == found["rows"][0]["moved"] + found["rows"][1]["moved"]
    assert found["rows"][0]["saved"] == {"pykernels": 0, "eager": 8 * 32 * 4}, (
        "eager keeps silu(gate) beyond the inputs"
    )
    assert set(found["call_overhead"]["swiglu"]) == {"no grad", "forward", "forward+backward"}
    plots = list(tmp_path.glob("*.svg"))
    assert len(plots) == 3
    for plot in plots:
        assert ET.parse(plot).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.usefixtures("short")
def test_bench_prints_no_speed_for_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.silu
    monkeypatch.setattr(functional, "silu", lambda input, **more: right(input, **more) * 1.001)
    result = run("bench", "activation", "--op", "silu", "--compile", "none", *FAST)
    assert result.exit_code == 1 and result.stdout.count("CHECK FAILED") == 3 and "out: error" in result.stdout


@pytest.mark.usefixtures("short")
def test_bench_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    result = run("bench", "activation", "--op", "relu", "--compile", "default", *FAST)
    assert result.exit_code == 0 and "compile: RuntimeError: no C++ compiler" in result.stdout


def test_bench_refuses_what_it_does_not_have() -> None:
    assert run("bench", "kitchen").exit_code == 2
    result = run("bench", "activation", "--op", "relux")
    assert result.exit_code == 2 and "operators with benchmark shapes: " in result.stderr


# what the commands stand on


def test_a_ratio_above_one_means_faster() -> None:
    def work(count: int) -> None:
        sum(range(count))

    timings = timing.measure({"ours": lambda: work(20_000), "theirs": lambda: work(100_000)}, rounds=9)
    low, high = timings["ours"], timings["theirs"]
    ratio = low.ratio(high)
    assert ratio[1] <= ratio[0] <= ratio[2] and 2 < ratio[0] < 12
    assert len(low.samples) == len(high.samples) == 9 and low.p20 <= low.median <= low.p80


def test_one_thread_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with timing.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def together() -> torch.Tensor:
        a, b = torch.empty(1 << 18), torch.empty(1 << 18)
        return a[0] + b[0]

    def in_turn() -> None:
        for _ in range(3):
            torch.empty(1 << 18)

    assert memory.peak_bytes(in_turn) == 1 << 20
    assert 2 << 20 <= memory.peak_bytes(together) < (2 << 20) + 1024


def test_saved_memory_counts_each_storage_once() -> None:
    x = torch.randn(64, requires_grad=True)
    assert memory.saved_bytes(lambda: x.sin(), [x]) == 0
    assert memory.saved_bytes(lambda: x.sin()) == 256
    assert memory.saved_bytes(lambda: x.exp() * x.sin(), [x]) == 512  # both factors; exp keeps its output, the same one


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1e-9, 0.0, 5.0], [float("nan"), 1.0, 2.0], [float("nan")], []])
def test_plots_are_well_formed_whatever_the_values(values: list[float], log: bool) -> None:
    root = ET.fromstring(_plot.lines([_plot.Series("<a & b>", values)], "a < b", log=log, limit=(0.5, "<bound>")))
    drawn = root.findall("polyline")
    assert len(drawn) == 1 and "nan" not in drawn[0].get("points", "")
    ET.fromstring(_plot.bars([_plot.Series("<x>", [value]) for value in values], "a & b", ["<1>"] * len(values)))
