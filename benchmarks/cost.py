"""Time and memory of one layer against length n and width d: the classic table of costs per layer, with its exponents
measured.

python benchmarks/cost.py > benchmarks/results/cpu-cost.json        then: python benchmarks/report.py
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import pykernels as pk
from pykernels.testing import machine
from pykernels.testing.memory import peak_bytes
from pykernels.testing.timing import measure, one_thread


@dataclass(frozen=True)
class Layer:
    """A way to mix a sequence of n vectors of size d, and what is said of it: cost, steps that wait for one another,
    and the longest path between two positions.

    lengths: measured at `width`; widths: measured at `length`; large enough that the work outweighs the calls.
    """

    name: str
    call: str
    cost: str
    serial: str
    path: str
    lengths: tuple[int, ...]
    width: int
    widths: tuple[int, ...]
    length: int


WIDTHS = (128, 256, 512, 1024)
LENGTHS = (2048, 4096, 8192, 16384)
LAYERS = (
    Layer("attention", "attention", "n² d", "1", "1", (1024, 2048, 4096, 8192), 64, (32, 64, 128, 256), 2048),
    Layer("recurrence", "nn.LSTM", "n d²", "n", "n", (4096, 8192, 16384, 32768), 64, WIDTHS, 128),
    Layer("convolution, k = 3", "torch.nn.Conv1d", "k n d²", "1", "log n (dilated)", LENGTHS, 64, WIDTHS, 1024),
    Layer("the same, each channel by itself", "torch.nn.Conv1d(groups=d)", "k n d", "1", "log n (dilated)", LENGTHS, 64,
          WIDTHS, 1024),
)  # fmt: skip


def step(layer: Layer, n: int, d: int) -> Callable[[], Any]:
    """Forward and backward of one float32 sequence, the gradients of everything included."""
    if layer.call == "attention":
        leaves = [torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3)]
        function: Callable[[], torch.Tensor] = lambda: pk.functional.attention(*leaves)
    elif layer.call == "nn.LSTM":
        lstm, x = pk.nn.LSTM(d, d, batch_first=True), torch.randn(1, n, d, requires_grad=True)
        leaves, function = [x, *lstm.parameters()], lambda: lstm(x)[0]
    else:
        conv = nn.Conv1d(d, d, 3, padding=1, groups=d if "groups" in layer.call else 1)
        y = torch.randn(1, d, n, requires_grad=True)
        leaves, function = [y, *conv.parameters()], lambda: conv(y)
    dy = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, dy)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the points on logarithmic axes."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def rows(layer: Layer, seconds: float) -> list[dict[str, Any]]:
    found = []
    for axis, sizes in (("n", layer.lengths), ("d", layer.widths)):
        shapes = [(s, layer.width) if axis == "n" else (layer.length, s) for s in sizes]
        timings = measure({str(s): step(layer, *s) for s in shapes}, rounds=15, seconds=seconds)
        medians = [timings[str(s)].median for s in shapes]
        peaks = []
        for shape in shapes:
            run = step(layer, *shape)
            run()  # what a thread keeps for its next call is there before
            peaks.append(peak_bytes(run))
        found.append({
            **asdict(layer), "axis": axis, "sizes": sizes, "seconds": medians, "peak_bytes": peaks,
            "time_exponent": exponent(sizes, medians), "memory_exponent": exponent(sizes, [float(p) for p in peaks]),
        })  # fmt: skip
        print(layer.name, axis, found[-1]["time_exponent"], found[-1]["memory_exponent"], file=sys.stderr)
    return found


def main(seconds: float = 20.0) -> None:
    with one_thread():
        found = [row for layer in LAYERS for row in rows(layer, seconds)]
    print(json.dumps({"machine": machine.describe().as_dict(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
