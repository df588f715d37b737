"""pytest-benchmark rows of the activation room: `pytest benchmarks/benchmark_activation.py`.

Shapes, bytes and the check come from the spec; `pykernels bench activation` prints the same rows as a table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pykernels.testing.run import check_case
from pykernels.testing.spec import Case, OpSpec, load

DTYPES = (torch.float32, torch.bfloat16)
ROWS = [(spec, case, dtype) for spec in load("activation") for case in spec.bench for dtype in DTYPES]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _name(row: tuple[OpSpec, Case, torch.dtype]) -> str:
    spec, case, dtype = row
    return "-".join((spec.name, *map(str, case.options.values()), case.label, str(dtype).removeprefix("torch.")))


@pytest.mark.parametrize("provider", ["pykernels", "torch"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_speed(benchmark: Any, row: tuple[OpSpec, Case, torch.dtype], direction: str, provider: str) -> None:
    spec, case, dtype = row
    torch.set_num_threads(1)
    assert all(c.passed for c in check_case(spec, case, "auto", dtype, DEVICE)), "a wrong kernel has no speed"
    tensors = case.make(dtype, DEVICE)
    inputs = {name: x.requires_grad_(direction != "forward") for name, x in tensors.items()}
    function = spec.function if provider == "pykernels" else spec.call_timed_peer

    def call() -> None:
        out = function(**inputs, **case.options)
        if direction != "forward":
            torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{_name(row)} {direction}"
    if spec.bytes_moved:
        moved = spec.bytes_moved(case, dtype)
        benchmark.extra_info["bytes"] = moved["forward"] if direction == "forward" else sum(moved.values())
    benchmark.extra_info.update(dtype=str(dtype), shape=case.label, device=DEVICE)
    benchmark(call)
