"""The attention room's contract."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..spec import Case, Input, OpSpec


def _case(
    label: str,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...] | None = None,
    mask: Input | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    dy: str = "contiguous",
    layout: str = "contiguous",
    **options: Any,
) -> Case:
    inputs = {
        "query": Input(query, scale=scales[0], layout=layout),
        "key": Input(key, scale=scales[1], layout=layout),
        "value": Input(value or key, layout=layout),
    }
    if mask is not None:
        inputs["attn_mask"] = mask
    return Case(label, inputs, options, dy)


def _bool(shape: tuple[int, ...]) -> Input:
    """A bool mask; True (may attend) for half of the keys."""
    return Input(shape, "ids", high=2, dtype=torch.bool)


def _cases() -> tuple[Case, ...]:
    q = (2, 2, 9, 8)
    cases = [
        _case("plain", q, q),
        _case("causal", q, q, is_causal=True),
        _case("causal-long-key", (1, 2, 5, 8), (1, 2, 12, 8), is_causal=True),
        _case("causal-long-query", (1, 2, 12, 8), (1, 2, 5, 8), is_causal=True),
        _case("cross", (2, 3, 7, 16), (2, 3, 65, 16), (2, 3, 65, 5)),
        _case("one-key", q, (2, 2, 1, 8)),
        _case("head-size-59", (1, 2, 17, 59), (1, 2, 33, 59)),
        _case("two-dimensions", (5, 8), (7, 8)),
        _case("five-dimensions", (2, 1, 2, 5, 8), (2, 1, 2, 7, 8)),
        _case("broadcast", (2, 2, 9, 8), (1, 2, 7, 8), (1, 1, 7, 8)),
        _case("gqa", (2, 6, 5, 8), (2, 2, 7, 8), enable_gqa=True),
        _case("mqa-causal", (2, 4, 9, 8), (2, 1, 9, 8), enable_gqa=True, is_causal=True),
        _case("scale", q, q, scale=0.7),
        _case("scale-0", q, q, scale=0.0),
        _case("sharp", q, q, scales=(5.0, 3.0)),
        _case("bool-mask", q, q, mask=_bool((9, 9))),
        _case("bool-mask-key", q, q, mask=_bool((2, 1, 1, 9))),
        _case("bias", q, q, mask=Input((9, 9))),
        _case("bias-heads", q, q, mask=Input((2, 9, 9))),
        _case("bias-broadcast", q, q, mask=Input((2, 1, 9, 1))),
        _case("no-key", q, (2, 2, 0, 8)),
        _case("no-query", (2, 2, 0, 8), q),
        _case("no-batch", (0, 2, 9, 8), (0, 2, 9, 8)),
        _case("dy-expanded", q, q, dy="expanded"),
    ]
    cases += [_case(layout, q, q, layout=layout) for layout in ("transposed", "expanded", "rows", "every_other")]
    return tuple(cases)


def _dropout_cases() -> tuple[Case, ...]:
    seed = {"seed": torch.tensor([0x1234_5678_9ABC_DEF])}
    q = (2, 2, 9, 8)
    return (
        _case("dropout", q, q, dropout_p=0.3, **seed),
        _case("dropout-causal", (1, 2, 17, 8), (1, 2, 17, 8), dropout_p=0.5, is_causal=True, **seed),
        _case("dropout-all", q, q, dropout_p=1.0, **seed),
    )


def _flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Two products forward, five backward; half of that where causal."""
    q, k, v = (case.inputs[name].shape for name in ("query", "key", "value"))
    pairs = math.prod(q[:-1]) * k[-2]
    forward = 2 * pairs * (q[-1] + v[-1]) // (2 if case.options.get("is_causal") else 1)
    return {"forward": forward, "backward": 5 * forward // 2}


def _bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads q, k, v, writes out; backward reads these and dy, writes dq, dk, dv."""
    size = torch.finfo(dtype).bits // 8
    inputs = sum(math.prod(x.shape) for x in case.inputs.values()) * size
    out = math.prod(case.inputs["query"].shape[:-1]) * case.inputs["value"].shape[-1] * size
    return {"forward": inputs + out, "backward": 2 * inputs + 2 * out}


_BENCH = tuple(
    _case(f"causal-{length}x{size}", (1, 8, length, size), (1, 8, length, size), is_causal=True)
    for length in (512, 2048)
    for size in (64, 128)
)

SPECS = (
    OpSpec(
        "scaled_dot_product_attention",
        "attention",
        _cases(),
        _BENCH,
        F.scaled_dot_product_attention,
        bytes_moved=_bytes,
        flops=_flops,
        long_sums=frozenset(("key", "value", "attn_mask")),
    ),
    OpSpec("scaled_dot_product_attention", "attention", _dropout_cases(), extra=frozenset(("seed",))),
)
