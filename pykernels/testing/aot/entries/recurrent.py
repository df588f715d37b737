"""The recurrent room: the loop in one launch at the largest hidden size it takes, and one step of a large layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..dryrun import room
from ..rules import Entry, Rules

GATES = {"lstm": 4, "gru": 3, "tanh": 1}
STEPS, SIZE = 2, 16

PRODUCTS = Rules(tensor_cores=True)
LOOP = {torch.bfloat16: 64, torch.float32: 32}
STEP_HIDDEN = 512


def call(
    kind: str, direction: str, dtype: torch.dtype, batch: int, hidden: int, peephole: bool = False, ways: int = 1
) -> Callable[[], Any]:
    """The operator over one direction of a layer, or both, or what `recompute` runs."""
    tokens, gated, many = STEPS * batch, GATES[kind] * hidden, (2,) if ways == 2 else ()

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, y, h = empty(tokens, SIZE), empty(tokens, ways * hidden), empty(*many, batch, hidden)
    w_ih, w_hh, bias = empty(*many, gated, SIZE), empty(*many, gated, hidden), empty(*many, gated)
    states, floor = ((h, h) if kind == "lstm" else (h,)), room("recurrent")
    extra = (None, empty(*many, 3 * hidden) if peephole else None) if kind == "lstm" else ()
    name = "rnn" if kind == "tanh" else kind
    layer = (x, *states, w_ih, w_hh, bias, bias, *extra, None)
    if direction == "recompute":
        return lambda: getattr(floor, f"{name}_recompute")(*layer, y)
    if direction == "forward":
        return lambda: getattr(floor, f"{name}_forward")(*layer, "tanh" if kind == "tanh" else True)
    kept: tuple[torch.Tensor, ...] = ()
    if kind != "tanh":
        narrow = kind == "lstm" and dtype != torch.float32
        kept = (empty(*many, tokens, 4 * hidden, dtype=torch.float16 if narrow else torch.float32),)
    if kind == "lstm":
        kept += (empty(*many, tokens, hidden, dtype=torch.float32),)
    options = ("tanh",) if kind == "tanh" else ()
    mask = (False, True, *(False,) * {"lstm": 6, "gru": 3, "tanh": 3}[kind])
    given = (y, *states, x, *states, w_ih, w_hh, *extra, None, y, *kept, *options, mask)
    return lambda: getattr(floor, f"{name}_backward")(*given)


def rows(kind: str, direction: str, batch: int, hidden: int) -> Callable[[], Any]:
    """Steps with layer normalisation, zoneout by a mask, and what else a cell may have."""
    tokens, gated, floor, zeros = STEPS * batch, GATES[kind] * hidden, room("recurrent"), torch.zeros
    lstm, width = kind == "lstm", hidden if kind == "tanh" else 4 * hidden
    h, c = zeros(batch, hidden), zeros(batch, hidden) if lstm else None
    of_c = (zeros(hidden), zeros(hidden)) if lstm else (None, None)
    extra = (zeros(3 * hidden) if lstm else None, zeros(gated), *of_c)
    given = (None, zeros(1, dtype=torch.int64), zeros(tokens, dtype=torch.int64))
    options = (kind, torch.bfloat16, (0.5, 0.5), (0, 0), True, False)
    if direction == "forward":
        bias = zeros(hidden) if kind == "gru" else None
        arguments = (zeros(tokens, gated), h, c, zeros(gated, hidden), None, bias, *extra, *given, *options, True)
        return lambda: floor.rows_forward(*arguments)
    y = zeros(tokens, hidden)
    kept = (y, zeros(tokens, gated), zeros(tokens, width), zeros(tokens, 3), y if lstm else None)
    final = (h, c)
    arguments = (y, *final, h, c, zeros(gated, hidden), None, *extra, *given, *kept, *options, (True,) * 10)
    return lambda: floor.rows_backward(*arguments)


def entries() -> Iterator[Entry]:
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype)[6:]
        for kind in GATES:
            for direction in ("forward", "backward"):
                # 16 rows are too few for Hopper's own instruction: there the loop has the one of before.
                launch = call(kind, direction, dtype, 16, LOOP[dtype])
                loop = f"recurrent loop {kind} {direction} {name} {LOOP[dtype]}"
                yield Entry(loop, launch, PRODUCTS, (80,))
                yield Entry(loop, launch, targets=(90,))
                launch = call(kind, direction, dtype, 64, STEP_HIDDEN)
                step = f"recurrent step {kind} {direction} {name} {STEP_HIDDEN}"
                yield Entry(step, launch, PRODUCTS, (80, 90) if kind == "lstm" else (90,))
    for direction in ("forward", "backward"):
        for way, batch, hidden in (("loop", 16, LOOP[torch.bfloat16]), ("step", 64, STEP_HIDDEN)):
            launch = call("lstm", direction, torch.bfloat16, batch, hidden, peephole=True)
            yield Entry(f"recurrent peephole {way} {direction} bfloat16 {hidden}", launch, targets=(90,))
        for way, batch, hidden in (("loop", 16, LOOP[torch.bfloat16]), ("step", 64, STEP_HIDDEN)):
            launch = call("lstm", direction, torch.bfloat16, batch, hidden, ways=2)
            yield Entry(f"recurrent both ways {way} {direction} bfloat16 {hidden}", launch, targets=(90,))
    for kind in GATES:
        for direction in ("forward", "backward"):
            launch = rows(kind, direction, 16, STEP_HIDDEN)
            yield Entry(f"recurrent rows {kind} {direction} {STEP_HIDDEN}", launch, targets=(80, 90)[kind != "lstm" :])
    for kind in ("lstm", "gru"):
        launch = call(kind, "recompute", torch.bfloat16, 64, STEP_HIDDEN)
        yield Entry(f"recurrent recompute {kind} bfloat16 {STEP_HIDDEN}", launch, targets=(90,))


ENTRIES = list(entries())
