"""The attention room: every kernel by itself, causal and not, head sizes up to 256, and what masks and biases add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..dryrun import room
from ..rules import Entry, Rules

BATCH, HEADS, KEY_HEADS, LENGTH = 2, 4, 2, 1024
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

#: kernel -> (what the backward is asked for, products in a turn of its loop)
KERNELS: dict[str, tuple[tuple[bool, ...], int]] = {
    "forward": ((), 2),
    "dq": ((True, False, False, False, False), 3),
    "dkdv": ((False, True, True, False, False), 4),
    "dbias": ((False, False, False, True, False), 2),
}


def call(
    kernel: str,
    dtype: torch.dtype,
    size: int,
    causal: str = "bottom_right",
    bias: tuple[int, ...] | None = None,
    masks: dict[int, torch.Tensor] | None = None,
    packed: bool = False,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
) -> Callable[[], Any]:
    """A launch of the wrapper. masks: by place among the operator's seven."""
    shape = (LENGTH, HEADS, size) if packed else (BATCH, HEADS, LENGTH, size)
    keys = (LENGTH, KEY_HEADS, size) if packed else (BATCH, KEY_HEADS, LENGTH, size)
    q, k, v = (torch.empty(s, dtype=dtype) for s in (shape, keys, keys))
    out, lse = torch.empty(shape, dtype=dtype), torch.empty(shape[:-1])
    added = None if bias is None else torch.empty(bias, dtype=dtype)
    given = dict(masks or {})
    if packed:
        given |= {4: torch.tensor([0, 300, LENGTH]), 5: torch.tensor([0, 400, LENGTH])}
    rest = (added, None, *(given.get(n) for n in range(7)), causal, -1, -1, softcap, dropout_p, 0.125)
    if kernel == "forward":
        return lambda: room("attention").attention_forward(q, k, v, *rest)
    wanted = KERNELS[kernel][0]
    return lambda: room("attention").attention_backward(out, lse, q, k, v, out, lse, lse, *rest, wanted)


def entry(
    kernel: str,
    dtype: torch.dtype,
    size: int,
    name: str = "causal",
    targets: tuple[int, ...] = (90,),
    blocks: int = 1,
    **more: Any,
) -> Entry:
    in_float32 = dtype == FLOAT32 and size > 128
    products = Rules() if in_float32 else Rules(tensor_cores=True, mma_efficiency=0.95, blocks=blocks)
    launching = room("_attention_launch")
    half = dtype != FLOAT32
    tiles = next(t for least, capability, t in launching.TABLE[kernel, half] if size <= least and capability <= 90)
    turns = KERNELS[kernel][1] if half and not tiles.apart else 0
    return Entry(
        name=f"attention {kernel} {name} {str(dtype)[6:]} {size}",
        launch=call(kernel, dtype, size, **more),
        rules={"attention_rows_kernel": Rules(occupancy=0.4), "": products},
        targets=targets,
        loop_flops=2 * turns * tiles.queries * tiles.keys * size or None,
    )


def entries() -> Iterator[Entry]:
    for kernel in ("forward", "dq", "dkdv"):
        for size in (64, 128):
            blocks = 1 if kernel == "forward" and size > 64 else 2
            yield entry(kernel, BFLOAT16, size, blocks=blocks)
            yield entry(kernel, BFLOAT16, size, "full", blocks=blocks, causal="none")
            yield entry(kernel, BFLOAT16, size, "ampere", targets=(80,))
        yield entry(kernel, BFLOAT16, 256)
        yield entry(kernel, FLOAT32, 64)
        yield entry(kernel, FLOAT32, 256)
    bias = (1, HEADS, LENGTH, LENGTH)
    padding = {1: torch.ones(BATCH, LENGTH, dtype=torch.bool)}
    yield entry("dbias", BFLOAT16, 64, "bias", bias=bias)
    for kernel in ("forward", "dkdv"):
        yield entry(kernel, BFLOAT16, 64, "bias", bias=bias)
        yield entry(kernel, BFLOAT16, 64, "padding", masks=padding)
        yield entry(kernel, BFLOAT16, 64, "packed", packed=True)


ENTRIES = list(entries())
