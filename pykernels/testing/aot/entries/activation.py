"""The activation room: every operator, float32 and bfloat16, lengths that divide and lengths that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ..dryrun import room
from ..rules import ELEMENTWISE, Entry, Rules

UNARY = ("sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "swish")
GATED = ("sigmoid", "relu", "gelu", "gelu_tanh", "silu", "identity")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALIGNED_TARGETS, ODD_TARGETS = {"float32": (90,), "bfloat16": (80, 90)}, {"float32": (90,), "bfloat16": (90,)}

#: Blackwell compiles like Hopper here, so it is asked once for each main kernel.
ON_BLACKWELL = ("unary_forward gelu", "unary_backward gelu", "gated_backward silu")

#: Philox4x32-10, a word for each element, is some forty wide multiplications: these kernels wait for it, not for DRAM.
PHILOX = {
    "float32": dataclasses.replace(ELEMENTWISE, instructions_per_byte=8.5),
    "bfloat16": dataclasses.replace(ELEMENTWISE, instructions_per_byte=17.0),
}

#: Rows whose stride is odd start at any element, so no access can be wide: eight instructions instead of one.
ODD_ROWS = Rules(instructions_per_byte=7.0, occupancy=0.5)

#: All threads share the weight of a channel: one narrow load. The second stage reads a buffer of at most 1024 rows.
PARAMETRIC = {"": dataclasses.replace(ELEMENTWISE, narrow=1), "sum_parts_kernel": Rules()}


def entry(
    operator: str, variant: str, dtype: str, args: tuple[Any, ...], kernel: str = "", accesses: float = 0,
    rules: Rules | dict[str, Rules] = ELEMENTWISE,
) -> Entry:  # fmt: skip
    """One call of `operator`. `kernel` reads and writes `accesses` bytes for each byte of the first argument."""
    x: torch.Tensor = args[0]
    odd = x.numel() % 16 != 0
    targets = (ODD_TARGETS if odd else ALIGNED_TARGETS)[dtype]
    if not odd and dtype == "bfloat16" and f"{operator} {variant}" in ON_BLACKWELL:
        targets = (*targets, 100)
    shape = "x".join(map(str, x.shape))
    return Entry(
        name=f"{operator} {variant} {dtype} {shape}",
        launch=lambda: getattr(room("activation"), operator)(*args),
        rules=rules,
        targets=targets,
        bytes={kernel: int(accesses * x.numel() * x.element_size())} if kernel else {},
    )


def dense(dtype: str, shape: tuple[int, int]) -> Iterator[Entry]:
    x = torch.empty(shape, dtype=DTYPES[dtype])
    for name in UNARY:
        yield entry("unary_forward", name, dtype, (x, name, 1.0), "unary_fwd_kernel", 2)
        yield entry("unary_backward", name, dtype, (x, x, name, 1.0), "unary_bwd_kernel", 3)
    for name in GATED:
        yield entry("gated_forward", name, dtype, (x, x, name), "gated_fwd_kernel", 3)
        yield entry("gated_backward", name, dtype, (x, x, x, name, (True, True)), "gated_bwd_kernel", 5)
    for name in ("prelu", "swish"):
        weight = torch.empty(1, dtype=x.dtype)
        yield entry("parametric_forward", name, dtype, (x, weight, name), "parametric_fwd_kernel", 2, PARAMETRIC)
        yield entry("parametric_backward", name, dtype, (x, x, weight, name, (True, True)), rules=PARAMETRIC)
    seed = torch.zeros(1, dtype=torch.int64)
    yield entry("rrelu_forward", "", dtype, (x, 0.1, 0.3, seed), "rrelu_kernel", 2, PHILOX[dtype])


def strided(dtype: str) -> Iterator[Entry]:
    """Halves of one fused tensor in place, and weights by channel: channels in the middle, and innermost."""
    for fused, rules in ((torch.empty(1024, 8192), ELEMENTWISE), (torch.empty(1023, 8198), ODD_ROWS)):
        x = fused.to(DTYPES[dtype])
        dy = x.new_empty(x.shape[0], x.shape[1] // 2)
        for name in ("silu", "gelu"):
            yield entry("glu_forward", name, dtype, (x, -1, name, True), "gated_fwd_kernel", 1.5, rules)
            yield entry("glu_backward", name, dtype, (dy, x, -1, name, True), "gated_bwd_kernel", 5, rules)
    for shape in ((32, 64, 32, 32), (8192, 512)):
        x, weight = torch.empty(shape, dtype=DTYPES[dtype]), torch.empty(shape[1], dtype=DTYPES[dtype])
        yield entry("parametric_forward", "prelu", dtype, (x, weight, "prelu"), "parametric_fwd_kernel", 2, PARAMETRIC)
        args = (x, x, weight, "prelu", (True, True))
        yield entry("parametric_backward", "prelu", dtype, args, rules=PARAMETRIC)


def fused(dtype: str) -> Iterator[Entry]:
    """Bias, activation and dropout: an activation and a gated unit stand for the others, whose arithmetic is above."""
    seed = torch.zeros(1, dtype=torch.int64)
    for name, p, cols in (("gelu", 0.1, 4096), ("swiglu", 0.0, 8192)):
        x, bias = torch.empty(1024, cols, dtype=DTYPES[dtype]), torch.empty(cols, dtype=DTYPES[dtype])
        dy = x.new_empty(1024, 4096)
        # The words of PHILOX, and GELU beside them.
        most = {"float32": 12.5, "bfloat16": 22.5}[dtype] if p else ELEMENTWISE.instructions_per_byte
        words = dataclasses.replace(ELEMENTWISE, instructions_per_byte=most)
        # The gradient of the bias is a second stage, and its first keeps sums in registers.
        backward = {"fused_bwd_kernel": dataclasses.replace(words, occupancy=0.3), "sum_parts_kernel": Rules()}
        args = (name, 0.0, p)
        yield entry(
            "fused_forward", name, dtype, (x, bias, seed, *args), "fused_fwd_kernel", 3 / 2 if p == 0 else 2, words
        )
        mask = (True, True, False)
        yield entry("fused_backward", name, dtype, (dy, x, bias, seed, *args, mask), "fused_bwd_kernel",
                    5 if p == 0 else 3, backward)  # fmt: skip


ENTRIES = [
    entry
    for dtype in DTYPES
    for entries in (dense(dtype, (1024, 4096)), dense(dtype, (1023, 4099)), strided(dtype), fused(dtype))
    for entry in entries
]
