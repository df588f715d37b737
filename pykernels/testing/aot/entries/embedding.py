"""The embedding room: lookups, bags of every mode, and the passes of the backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..dryrun import room
from ..rules import Entry, Rules

ROWS, IDS, BAGS = 100_000, 65536, 4096
DTYPES = {"float32": (torch.float32, 128), "bfloat16": (torch.bfloat16, 256)}

#: Rows move 128 bits at a time. Four of them in flight in every thread: 24 warps are 48 KiB, where memory latency times
#: bandwidth asks for 15 KiB a multiprocessor on an H100.
GATHER = Rules(vector=True, occupancy=0.375)

#: A factor for each row, the same for all of its columns: one narrow load in half precision.
WEIGHTED = dataclasses.replace(GATHER, narrow=5)

#: Eight columns a thread, 8 or 4 bytes, of four rows in flight: no byte is read by itself.
QUANTISED = Rules(occupancy=0.375)

#: One warp to a block, nothing to wait for, four rows in flight: 16 warps are 32 KiB.
SEGMENT = Rules(vector=True, occupancy=0.25, barriers=0)

#: The other passes move a few bytes for each id, or run for the few ids that cross a chunk.
PASSES = {"segment_kernel": SEGMENT, "": Rules()}

#: The random words of stochastic rounding, in what is made once per run: 8 bytes are spilled on sm_80, not in the loop.
UPDATES = {"segment_kernel": dataclasses.replace(SEGMENT, spill_bytes=8), "": Rules()}

#: So are 32 bytes where a run ends with the sum of its squares over a program.
WIDE_UPDATES = {"segment_kernel": dataclasses.replace(SEGMENT, spill_bytes=32), "": Rules()}


def call(operator: str, *args: Any) -> Callable[[], Any]:
    return lambda: getattr(room("embedding"), operator)(*args)


def entries(name: str) -> Iterator[Entry]:
    dtype, cols = DTYPES[name]
    weight, ids = torch.empty(ROWS, cols, dtype=dtype), torch.zeros(IDS, dtype=torch.int64)
    many, offsets = torch.zeros(BAGS * 20, dtype=torch.int64), torch.arange(0, BAGS * 20, 20)
    scale, dy = torch.empty(BAGS * 20, dtype=dtype), torch.empty(BAGS, cols, dtype=dtype)
    maxima = torch.zeros(BAGS, cols, dtype=torch.int32)
    targets = (80, 90) if name == "bfloat16" else (90,)

    def entry(label: str, rules: Any, launch: Callable[[], Any]) -> Entry:
        return Entry(f"{label} {name}", launch, rules, targets)

    yield entry("embedding lookup", GATHER, call("embedding_forward", ids, weight, 1))
    yield entry(
        "embedding backward",
        PASSES,
        call("embedding_backward", torch.empty(IDS, cols, dtype=dtype), ids, ROWS, -1, False),
    )
    for mode, factors in (("sum", None), ("mean", None), ("max", None), ("sum weighted", scale)):
        args = mode.split()[0], False, -1
        more = (maxima,) if mode == "max" else (None,)
        forward = call("embedding_bag_forward", many, weight, offsets, factors, *args, mode == "max", 1)
        rows = GATHER if factors is None else WEIGHTED
        yield entry(f"embedding bag {mode}", {"bag_fwd_kernel": rows, "": Rules()}, forward)
        backward = call("embedding_bag_backward", dy, many, offsets, factors, *more, ROWS, *args, False)
        yield entry(f"embedding bag {mode} backward", PASSES, backward)
    wide, narrow, seed = torch.empty(ROWS, cols), torch.empty(ROWS), torch.zeros(1, dtype=torch.int64)
    for rule, states in (("sgd", (None, None)), ("adagrad", (wide, None)), ("adam", (wide, wide)),
                         ("rowwise_adagrad", (narrow, None))):  # fmt: skip
        numbers = rule, 0.1, 0.1, 1e-8, 0.9, 0.99, 3, seed if dtype == torch.bfloat16 else None, 1
        given = weight, *states, ids, torch.empty(IDS, cols, dtype=dtype)
        arguments = *given, None, None, None, "none", False, -1, False
        yield entry(f"embedding update {rule}", UPDATES, call("embedding_update", *arguments, *numbers))
    if name == "bfloat16":  # rows that no program holds: two passes
        given = torch.empty(IDS, 16384, dtype=dtype), narrow[:IDS], None, ids, torch.empty(IDS, 16384, dtype=dtype)
        numbers = "rowwise_adagrad", 0.1, 0.1, 1e-8, 0.9, 0.99, 3, None, 1
        wide_rows = call("embedding_update", *given, None, None, None, "none", False, -1, False, *numbers)
        yield Entry("embedding update rowwise_adagrad wide", wide_rows, WIDE_UPDATES, (90,))
    bags = [torch.zeros(BAGS, 20, dtype=torch.int64)] * 3
    several = call("embedding_bag_multi_forward", bags, [None] * 3, [weight] * 3, [], "sum", False, False, 1)
    yield entry("embedding bag multi", GATHER, several)
    dense, sparse = torch.empty(BAGS, cols, dtype=dtype), torch.empty(BAGS, 26, cols, dtype=dtype)
    products = Rules(occupancy=0.25)
    yield entry("embedding interaction", products, call("dot_interaction_forward", dense, sparse, False))
    dpairs = torch.empty(BAGS, cols + 27 * 26 // 2, dtype=dtype)
    backward = call("dot_interaction_backward", dpairs, dense, sparse, False, (True, True))
    yield entry("embedding interaction backward", products, backward)
    weights = call("embedding_bag_backward_weights", dy, many, weight, offsets, "sum", False, -1)
    yield entry("embedding bag weights backward", Rules(occupancy=0.5), weights)


def quantised() -> Iterator[Entry]:
    """Rows of 136 and 68 bytes, whose parts of 8 and 4 bytes begin where accesses of that width may."""
    ids = torch.zeros(BAGS, 20, dtype=torch.int64)
    for bits, width, mode, dtype in (
        (8, 136, "sum", torch.float32), (4, 68, "mean", torch.float32), (4, 68, "none", torch.bfloat16)
    ):  # fmt: skip
        packed = torch.zeros(ROWS, width, dtype=torch.uint8)
        launch = call("embedding_bag_quantized_forward", packed, ids, None, None, bits, mode, False, -1, dtype, 1)
        yield Entry(f"embedding quantised {bits} bits {mode}", launch, QUANTISED, (90,))
    pack = call("quantize_rows_forward", torch.empty(ROWS, 128), 4)
    yield Entry("embedding quantise 4 bits", pack, Rules(occupancy=0.5), (90,))


ENTRIES = [*(entry for name in DTYPES for entry in entries(name)), *quantised()]
