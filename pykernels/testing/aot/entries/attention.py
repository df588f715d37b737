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

#: What a call adds to the causal mask.
EXTRAS: dict[str, dict[str, Any]] = {
    "bias": {"bias": (1, HEADS, LENGTH, LENGTH)},
    "padding": {"masks": {1: torch.ones(BATCH, LENGTH, dtype=torch.bool)}},
    "dropout": {"masks": {6: torch.tensor([1])}, "dropout_p": 0.1},
    "prefix": {"masks": {2: torch.tensor([300, 500])}},
    "softcap": {"softcap": 30.0},
    "packed": {"packed": True},
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


def chosen_tiles(kernel: str, launch: Callable[[], Any]) -> Any:
    """What the wrapper takes for this call on a GPU of capability 90; nothing is compiled."""
    found: dict[str, Any] = {}
    lib: Any = room("_lib")
    launching: Any = room("_attention_launch")
    take, run = launching.tiles_for, lib.launch

    def noted(name: str, shared: dict[str, Any]) -> Any:
        found[name] = take(name, shared)
        return found[name]

    launching.tiles_for, lib.launch = noted, lambda *args, **options: None
    try:
        with lib.override_device_properties(lib.DeviceProperties(90, 132)):
            launch()
    finally:
        launching.tiles_for, lib.launch = take, run
    return found[kernel]


def entry(
    kernel: str,
    dtype: torch.dtype,
    size: int,
    name: str = "causal",
    targets: tuple[int, ...] = (90,),
    blocks: int = 1,
    tensor_cores: bool = True,
    **more: Any,
) -> Entry:
    half = dtype != FLOAT32
    launch = call(kernel, dtype, size, **more)
    products = Rules(tensor_cores=tensor_cores, mma_efficiency=0.95 if half else 0.0, blocks=blocks)
    tiles = chosen_tiles(kernel, launch)
    turns = KERNELS[kernel][1] if half and not tiles.apart else 0
    width = room("_attention_launch").padded(size)
    return Entry(
        name=f"attention {kernel} {name} {str(dtype)[6:]} {size}",
        launch=launch,
        rules={**dict.fromkeys(("attention_rows_kernel", "attention_seen_kernel"), Rules(occupancy=0.5)), "": products},
        targets=targets,
        loop_flops=2 * turns * tiles.queries * tiles.keys * width or None,
    )


def entries() -> Iterator[Entry]:
    for kernel in ("forward", "dq", "dkdv"):
        for size in (64, 128):
            blocks = 1 if kernel == "forward" and size > 64 else 2
            yield entry(kernel, BFLOAT16, size, targets=(90, 100), blocks=blocks)
            yield entry(kernel, BFLOAT16, size, "full", blocks=blocks, causal="none")
            yield entry(kernel, BFLOAT16, size, "ampere", targets=(80,))
            yield entry(kernel, BFLOAT16, size, "padding", **EXTRAS["padding"])
            for name in ("bias", "dropout"):
                yield entry(kernel, BFLOAT16, size, name, targets=(80, 90, 100), **EXTRAS[name])
            yield entry(kernel, FLOAT32, size)
            yield entry(kernel, FLOAT32, size, "blackwell", targets=(100,), tensor_cores=False)
        yield entry(kernel, BFLOAT16, 256, targets=(90, 100))
        yield entry(kernel, FLOAT32, 256, tensor_cores=False)
        yield entry(kernel, BFLOAT16, 64, "packed", **EXTRAS["packed"])
    for name in ("prefix", "softcap"):
        yield entry("forward", BFLOAT16, 128, name, **EXTRAS[name])
    yield entry("forward", BFLOAT16, 80, "padded")
    for size in (64, 128):
        yield entry("dbias", BFLOAT16, size, "bias", **EXTRAS["bias"])
    yield Entry(
        name="attention dbias of rows bfloat16 64",
        launch=call("dbias", BFLOAT16, 64, bias=(1, HEADS, LENGTH, 1)),
        rules=Rules(occupancy=0.5),
        targets=(90,),
    )


ENTRIES = list(entries())
