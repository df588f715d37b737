"""The sampled_softmax room: the gather of a row's own classes, tiles of logits, and the products of the backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..dryrun import room
from ..rules import Entry, Rules

ROWS, SIZE, CLASSES, OWN, SAMPLES = 1024, 128, 32768, 6, 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Rows of classes at 128 bits, four of each in flight. The sums of a row leave some stores of 32 bits.
GATHER = Rules(occupancy=0.25)

#: Tiles through the tensor cores of each target, filled by asynchronous copies.
TILES = Rules(tensor_cores=True, occupancy=0.125)


#: softplus of a whole tile: sm_80 spills four registers, outside the loop over the tile's depth.
LOGISTIC = dataclasses.replace(TILES, spill_bytes=16)


def call(operator: str, *args: Any) -> Callable[[], Any]:
    return lambda: getattr(room("sampled_softmax"), operator)(*args)


def entries(name: str) -> Iterator[Entry]:
    dtype = DTYPES[name]
    x, w = torch.empty(ROWS, SIZE, dtype=dtype), torch.empty(CLASSES, SIZE, dtype=dtype)
    ids, labels = torch.zeros(ROWS, OWN, dtype=torch.int64), torch.zeros(ROWS, 1, dtype=torch.int64)
    sampled, loss = torch.zeros(SAMPLES, dtype=torch.int64), torch.zeros(ROWS)
    targets = (80, 90) if name == "bfloat16" else (90,)

    def entry(label: str, rules: Any, launch: Callable[[], Any]) -> Entry:
        return Entry(f"sampled_softmax {label} {name}", launch, rules, targets)

    yield entry("own classes", GATHER, call("logistic_rows_forward", x, w, ids, None, True))
    shared = (x, w, None, labels, sampled, torch.zeros(ROWS, 1), torch.zeros(SAMPLES))
    rules = {"true_logits_kernel": GATHER, "weighted_rows_kernel": GATHER, "segment_kernel": Rules(), "": TILES}
    rules["segment_join_kernel"] = Rules()
    for kind, hits in (("softmax", True), ("logistic", False)):
        forward = call("sampled_rows_forward", *shared, kind, hits, False)
        yield entry(f"sample {kind}", rules if hits else {**rules, "": LOGISTIC}, forward)
    statistics = torch.ones(ROWS, 3)
    backward = call(
        "sampled_rows_backward", loss, statistics, torch.empty(0), *shared, "softmax", True, (True, True, False)
    )
    yield entry("sample softmax backward", rules, backward)
    whole = (x, w, None, labels[:, 0], None, -100, 0.0, 0.0)
    yield entry("all classes", TILES, call("linear_rows_forward", *whole))
    backward = call("linear_rows_backward", loss, statistics[:, :2], *whole, (True, True, False))
    yield entry("all classes backward", TILES, backward)


def samplers() -> Iterator[Entry]:
    seed = torch.zeros(1, dtype=torch.int64)
    for unique in (False, True):
        launch = call("candidate_sample", seed, None, None, "log_uniform", SAMPLES, CLASSES, unique)
        yield Entry(f"sampled_softmax draws{' unique' * unique}", launch, Rules(unfused=True))


ENTRIES = [*(entry for name in DTYPES for entry in entries(name)), *samplers()]
