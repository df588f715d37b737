"""What pytest-benchmark drives: the rows of a room, one test for each provider. `benchmark_<room>.py` names the room.

    pytest benchmarks/benchmark_attention.py --benchmark-only

Shapes, peers and the check are the specs', as in `pykernels bench`, which prints the same rows as a table and adds
torch.compile, percent of the limits and peak memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pykernels.testing.bench import DIRECTIONS, Call
from pykernels.testing.run import check_case
from pykernels.testing.spec import Case, OpSpec, load
from pykernels.testing.step import Step, load_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
PROVIDERS = ("pykernels", "torch")
Row = tuple[OpSpec, Case, torch.dtype]


def _name(row: Row) -> str:
    spec, case, dtype = row
    options = (str(value) for value in case.options.values() if isinstance(value, (str, float)))
    return "-".join((spec.name, *options, case.label, str(dtype).removeprefix("torch."))).replace(" ", "-")


def speed(room: str) -> Callable[..., None]:
    """A test of every benchmark case of a room, direction and provider."""
    rows = [(s, c, d) for s in load(room) for c in s.timed(DEVICE) for d in DTYPES if s.compile_modes(c, d) is not None]
    directed = [(row, way) for row in rows for way in (DIRECTIONS if row[0].differentiable else DIRECTIONS[:1])]

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize(("row", "direction"), directed, ids=[f"{_name(row)}-{way}" for row, way in directed])
    def test_speed(benchmark: Any, row: Row, direction: str, provider: str) -> None:
        spec, case, dtype = row
        torch.set_num_threads(1)
        if provider == "pykernels":
            assert all(c.passed for c in check_case(spec, case, "auto", dtype, DEVICE)), "a wrong kernel has no speed"
        function = spec.function if provider == "pykernels" else spec.call_timed_peer
        call = Call(lambda **leaves: function(**leaves, **case.options), case, case.make(dtype, DEVICE))
        benchmark.group = f"{_name(row)} {direction}"
        for kind, count in (("bytes", spec.bytes_moved), ("flops", spec.flops)):
            figures = count(case, dtype) if count else {}
            benchmark.extra_info[kind] = figures.get(direction) or sum(figures.values()) or None
        benchmark.extra_info.update(dtype=str(dtype), shape=case.label, device=DEVICE)
        benchmark(_synchronised(call.direction(direction)))

    return test_speed


def steps(room: str) -> Callable[..., None]:
    """A test of every training step of a room that is timed whole; all of its peers are in one group."""

    @pytest.mark.parametrize("provider", ["pykernels", "eager"])
    @pytest.mark.parametrize("step", load_steps(room), ids=lambda step: f"{step.name} {step.shape}".replace(" ", "-"))
    def test_step(benchmark: Any, step: Step, provider: str) -> None:
        torch.set_num_threads(1)
        try:
            providers = step.make()
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name}, a peer of this step, is not installed")
        if provider not in providers:
            pytest.skip("torch has no such step")
        benchmark.group = f"{step.name} {step.shape}"
        benchmark(providers[provider].run)

    return test_step


def _synchronised(function: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call
