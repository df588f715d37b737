"""Time and memory against sequence length, vocabulary, hidden size, batch, negatives and threads, beside every peer.

python benchmarks/scaling.py > benchmarks/results/cpu-scaling.json        then: python benchmarks/report.py

Forward and backward (or a training step) in float32. One thread and its CPU time; against threads the wall time, which
means something on an idle machine only. Memory: the most that torch's allocator held at once above the inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from cost import exponent
from torch import Tensor, nn

import pykernels as pk
from pykernels import reference
from pykernels.testing import machine
from pykernels.testing.memory import peak_bytes
from pykernels.testing.run import outputs_of
from pykernels.testing.specs._sampled_steps import negative_step
from pykernels.testing.timing import Timing, measure, one_thread

Call = Callable[[], Any]


@dataclass(frozen=True)
class Study:
    """One axis of one operator.

    Attributes:
        axis: its name; `fixed`: the other sizes.
        make: size -> {"pykernels" and every peer: call}. A peer that is absent at a size is not drawn there.
        avoided: what must never lie in memory as a whole, and its bytes at a size.
        threads: the sizes are numbers of threads, and time is wall time.
    """

    name: str
    title: str
    axis: str
    fixed: str
    sizes: tuple[int, ...]
    make: Callable[[int], dict[str, Call]]
    avoided: tuple[str, Callable[[int], int]] | None = None
    threads: bool = False


def both(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Call:
    """Forward and backward with the gradients of all leaves."""
    own = [x.detach().clone().requires_grad_() for x in leaves]
    dy = torch.ones_like(outputs_of(function(*own))[0])
    return lambda: torch.autograd.grad(outputs_of(function(*own))[0], own, dy)


def attention(length: int) -> dict[str, Call]:
    leaves = [torch.randn(1, 1, length, 64) for _ in range(3)]
    found = {
        "pykernels": both(lambda *x: pk.functional.scaled_dot_product_attention(*x, is_causal=True), leaves),
        "torch": both(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), leaves),
    }
    if length <= 2048:
        found["formula"] = both(lambda *x: reference.scaled_dot_product_attention(*x, is_causal=True), leaves)
    return found


def linear_cross_entropy(classes: int) -> dict[str, Call]:
    x, weight, target = torch.randn(256, 128) * 0.25, torch.randn(classes, 128) * 0.25, torch.randint(classes, (256,))
    found = {
        "pykernels": both(lambda x, w: pk.functional.linear_cross_entropy(x, w, target), (x, weight)),
        "torch, logits": both(lambda x, w: F.cross_entropy(F.linear(x, w), target), (x, weight)),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)
        found["torch, chunks"] = both(lambda x, w: F.linear_cross_entropy(x, w, target, options=options), (x, weight))
    return found


def _step(classes: int, negatives: int) -> dict[str, Call]:
    names = {"pykernels": "pykernels", "eager": "torch, sparse"}
    providers = negative_step("", classes, negatives).make()
    return {names[name]: provider.run for name, provider in providers.items()}


def _layer(name: str, steps: int, batch: int, hidden: int) -> dict[str, Call]:
    stock = getattr(nn, name)(hidden, hidden)
    ours = getattr(pk.nn, name)(hidden, hidden)
    ours.load_state_dict(stock.state_dict())
    x, found = torch.randn(steps, batch, hidden), {}
    for kind, layer in (("pykernels", ours), ("torch", stock)):
        leaf = x.clone().requires_grad_()

        def call(layer: nn.Module = layer, leaf: Tensor = leaf) -> Any:
            y = layer(leaf)[0]
            return torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))

        found[kind] = call
    return found


def swiglu(rows: int, width: int = 8192) -> dict[str, Call]:
    x = torch.randn(rows, width)
    return {
        "pykernels": both(pk.functional.swiglu, (x,)),
        "torch": both(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], (x,)),
    }


def bags(count: int) -> dict[str, Call]:
    ids, weight = torch.randint(20_000, (count, 20)), torch.randn(20_000, 64)
    return {
        "pykernels": both(lambda w: pk.functional.embedding_bag(ids, w, mode="sum"), (weight,)),
        "torch": both(lambda w: F.embedding_bag(ids, w, mode="sum"), (weight,)),
    }


def threads() -> tuple[int, ...]:
    count = os.cpu_count() or 1
    return tuple(sorted({1, *(2**i for i in range(count.bit_length()) if 2**i <= count), count}))


POWERS = tuple(2**i for i in range(20))
STUDIES = (
    Study("attention-length", "attention, causal", "length", "one head of 64", POWERS[8:14], attention,
          ("the scores", lambda n: 4 * n * n)),
    Study("lstm-length", "LSTM", "steps", "batch 8, hidden 128", POWERS[4:10], lambda n: _layer("LSTM", n, 8, 128)),
    Study("lstm-hidden", "LSTM", "hidden size", "32 steps, batch 16", POWERS[5:11],
          lambda n: _layer("LSTM", 32, 16, n)),
    Study("gru-batch", "GRU", "batch", "32 steps, hidden 128", POWERS[0:8], lambda n: _layer("GRU", 32, n, 128)),
    Study("cross-entropy-vocabulary", "linear cross entropy", "classes", "256 rows of 128", POWERS[11:18],
          linear_cross_entropy, ("the logits", lambda n: 4 * 256 * n)),
    Study("negatives-vocabulary", "negative sampling and SGD", "classes", "1024 rows of 128, 5 negatives",
          (10_000, 30_000, 100_000, 300_000, 1_000_000), lambda n: _step(n, 5)),
    Study("negatives-count", "negative sampling and SGD", "negatives a row", "1024 rows of 128, 100k classes",
          (1, 4, 16, 64), lambda n: _step(100_000, n), ("the drawn rows", lambda n: 4 * 1024 * n * 128)),
    Study("swiglu-rows", "SwiGLU", "rows", "8192 columns", POWERS[0:12], swiglu),
    Study("bags-batch", "embedding bag, sum", "bags of 20", "20k rows of 64, dense gradient", POWERS[4:14:2], bags),
    Study("attention-threads", "attention, causal, 2048 x 64, 4 heads", "threads", "wall time", threads(),
          lambda n: {"pykernels": _heads(pk.functional), "torch": _heads(F)}, threads=True),
    Study("swiglu-threads", "SwiGLU, 512 x 8192", "threads", "wall time", threads(), lambda n: swiglu(512),
          threads=True),
    Study("lstm-threads", "LSTM, 64 steps, batch 32, hidden 256", "threads", "wall time", threads(),
          lambda n: _layer("LSTM", 64, 32, 256), threads=True),
)  # fmt: skip


def _heads(functional: Any) -> Call:
    leaves = [torch.randn(1, 4, 2048, 64) for _ in range(3)]
    return both(lambda *x: functional.scaled_dot_product_attention(*x, is_causal=True), leaves)


def take(study: Study, seconds: float) -> dict[str, Any]:
    """seconds: about, for each size."""
    times: dict[str, list[Timing | None]] = {}
    peaks: dict[str, list[int | None]] = {}
    for i, size in enumerate(study.sizes):
        torch.manual_seed(0)
        calls = study.make(size)
        if study.threads:
            torch.set_num_threads(size)
        timings = measure(
            calls, rounds=15, seconds=seconds, clock=time.perf_counter if study.threads else time.thread_time
        )
        torch.set_num_threads(1)
        for name, call in calls.items():
            times.setdefault(name, [None] * len(study.sizes))[i] = timings[name]
            peaks.setdefault(name, [None] * len(study.sizes))[i] = None if study.threads else peak_bytes(call)
    providers = {
        name: {
            "seconds": [t and t.median for t in found],
            "p20": [t and t.p20 for t in found],
            "p80": [t and t.p80 for t in found],
            "peak_bytes": peaks[name],
            "exponents": {
                "seconds": fit(study.sizes, [t and t.median for t in found]),
                "peak_bytes": fit(study.sizes, peaks[name]),
            },
        }
        for name, found in times.items()
    }
    ours = providers["pykernels"]["seconds"]
    crossings = {n: list(cross(study.sizes, ours, p["seconds"])) for n, p in providers.items() if n != "pykernels"}
    said: dict[str, Any] = {"name": study.name, "title": study.title, "axis": study.axis, "fixed": study.fixed}
    if study.avoided:
        what, count = study.avoided
        said["avoided"] = {"what": what, "bytes": [count(size) for size in study.sizes]}
    return {**said, "sizes": study.sizes, "threads": study.threads, "providers": providers, "crossings": crossings}


def fit(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """The exponent over the larger half of the sizes, at least three: small ones are the cost of the call."""
    known = [(size, value) for size, value in zip(sizes, values, strict=True) if value]
    if len(known) < 3:
        return None
    x, y = zip(*known[-max(3, (len(known) + 1) // 2) :], strict=True)
    return exponent(x, list(y))


def cross(sizes: Sequence[int], ours: Sequence[float], theirs: Sequence[float | None]) -> Iterator[dict[str, Any]]:
    """Where the quicker of the two changes: {"size", "then": who is quicker from there on}; between two sizes as the
    straight lines on logarithmic axes cross. Sizes at which they are within 3% decide nothing."""
    ratios = [(size, math.log(b / a)) for size, a, b in zip(sizes, ours, theirs, strict=True) if b]
    ratios = [(size, ratio) for size, ratio in ratios if abs(ratio) > 0.03]
    for (small, low), (large, high) in pairwise(ratios):
        if (low > 0) != (high > 0):
            share = low / (low - high)
            size = math.exp(math.log(small) + share * (math.log(large) - math.log(small)))
            yield {"size": size, "then": "pykernels" if high > 0 else "peer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[study.name for study in STUDIES], help="default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="about, a size")
    options = parser.parse_args()
    found = []
    with one_thread():
        for study in STUDIES:
            if not options.only or study.name in options.only:
                found.append(take(study, options.seconds))
                print(study.name, found[-1]["crossings"], file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine.describe().as_dict(), "studies": found}, indent=1))


if __name__ == "__main__":
    main()
