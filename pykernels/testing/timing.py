"""How long functions take, side by side: rounds interleaved A B A B, warm-up dropped, medians with their spread.

CPU: one thread and its own CPU time, which other processes cannot stretch. GPU: events, with the L2 cache flushed
before each call.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

_SAMPLE = 2e-3  # seconds: shorter functions are called several times a sample, clocks being no finer than microseconds


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20th and 80th percentile, and the samples in the order of the rounds."""

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(*_spread(samples), tuple(samples))

    def ratio(self, other: Timing) -> tuple[float, float, float]:
        """Median, p20 and p80 over the rounds of other's time / this one's: above 1, this one is faster."""
        return _spread([b / a for a, b in zip(self.samples, other.samples, strict=True)])


def _spread(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    fifths = quantiles(samples, n=5, method="inclusive")
    return median(samples), fifths[0], fifths[-1]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: what it computes does not depend on the machine, and CPU time means work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 20,
    warmup: int = 3,
    seconds: float = 3.0,
    device: str = "cpu",
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, Timing]:
    """Times each function in every round; the order turns round by round.

    Args:
        rounds: at most this many, at least 5 (3 where these take over three times `seconds`).
        warmup: calls of each that are dropped; fewer of one that takes long.
        seconds: about how long all rounds together may take; slow functions get fewer rounds.
        device: "cpu" (call under `one_thread()`; nothing else is sensible with the default clock) or "cuda".
        clock: of the CPU; `time.perf_counter` for several threads, on an idle machine.

    Returns:
        name -> Timing.
    """
    timed = _time_cuda if device.startswith("cuda") else partial(_time_cpu, clock)
    repeats = {}
    for name, function in functions.items():
        start = time.perf_counter()
        for _ in range(max(warmup, 1) - 1):
            function()
            if time.perf_counter() - start > seconds / 4:
                break
        once = max(timed(function, 1), 1e-7)
        repeats[name] = 1 if device.startswith("cuda") else max(1, int(_SAMPLE / once))
        if repeats[name] > 1:  # a first estimate from one call of a fast function is mostly clock and cold caches
            once = max(timed(function, repeats[name]), 1e-7)
            repeats[name] = max(1, int(_SAMPLE / once))
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(max(rounds, 5)):
        spent = time.perf_counter() - start
        if (done >= 5 and spent > seconds * done / (done + 1)) or (done >= 3 and spent > 3 * seconds):
            break
        for name in names if done % 2 == 0 else reversed(names):
            samples[name].append(timed(functions[name], repeats[name]))
    return {name: Timing.of(values) for name, values in samples.items()}


def _time_cpu(clock: Callable[[], float], function: Callable[[], Any], repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def _time_cuda(function: Callable[[], Any], repeats: int) -> float:
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.int8, device="cuda")
    total = 0.0
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        total += start.elapsed_time(end) * 1e-3
    return total / repeats


def copy_function(nbytes: int, device: str = "cpu") -> Callable[[], Any]:
    """A copy that reads nbytes / 2 and writes nbytes / 2, into memory that is there already: the limit for kernels that
    move as much."""
    count = max(nbytes // 8, 1)
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    return lambda: target.copy_(source)


def copy_bandwidth(nbytes: int = 64 << 20, device: str = "cpu") -> float:
    """Bytes a second, read and written, of a copy with a working set of `nbytes`."""
    with one_thread() if device == "cpu" else contextlib.nullcontext():
        return nbytes / measure({"copy": copy_function(nbytes, device)}, device=device)["copy"].median
