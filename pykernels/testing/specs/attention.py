"""The attention room's contract."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..spec import Case, Input, OpSpec
from . import _attention_decode as decoding

KERNELS = ("cpu", "triton", "cuda", "emulator")


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
        _case("sample", (1, 2, 5, 8), (1, 2, 7, 8), mask=Input((2, 5, 7))),
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
        _case("sample", (1, 2, 5, 8), (1, 2, 7, 8), dropout_p=0.3, **seed),
        _case("dropout", q, q, dropout_p=0.3, **seed),
        _case("dropout-causal", (1, 2, 17, 8), (1, 2, 17, 8), dropout_p=0.5, is_causal=True, **seed),
        _case("dropout-all", q, q, dropout_p=1.0, **seed),
    )


def _pairs(case: Case) -> int:
    """(query, key) pairs that are allowed by position, over batch and heads; other masks count in full."""
    q, k = case.inputs["query"].shape, case.inputs["key"].shape
    causal, window, prefix = (case.options.get(name) for name in ("causal", "window", "prefix_length"))
    if case.options.get("is_causal"):
        causal = "top_left"
    if not causal and not window:
        return math.prod(q[:-1]) * k[-2]
    return math.prod(q[:-2]) * int(_positions(q[-2], k[-2], causal or False, window, prefix).sum())


def _flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Two products forward, five backward, over the pairs that the masks by position leave."""
    forward = 2 * _pairs(case) * (case.inputs["query"].shape[-1] + case.inputs["value"].shape[-1])
    return {"forward": forward, "backward": 5 * forward // 2}


def _bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads q, k, v, writes out; backward reads these and dy, writes dq, dk, dv."""
    size = torch.finfo(dtype).bits // 8
    inputs = sum(math.prod(x.shape) for x in case.inputs.values()) * size
    out = math.prod(case.inputs["query"].shape[:-1]) * case.inputs["value"].shape[-1] * size
    return {"forward": inputs + out, "backward": 2 * inputs + 2 * out}


def _saved(case: Case, dtype: torch.dtype) -> int:
    """The inputs, the output and one float32 for each query and head."""
    queries = math.prod(case.inputs["query"].shape[:-1])
    size = torch.finfo(dtype).bits // 8
    inputs = sum(math.prod(x.shape) for x in case.inputs.values())
    return (inputs + queries * case.inputs["value"].shape[-1]) * size + 4 * queries


@functools.lru_cache(maxsize=8)
def _positions(q: int, k: int, causal: bool | str, window: tuple[int, int] | None, prefix: int | None) -> Tensor:
    """The masks by position as one bool (Lq, Lk); kept, so that a timed peer is not charged for making it."""
    distance = torch.arange(k) - torch.arange(q).unsqueeze(-1) - (0 if causal == "top_left" else k - q)
    allowed = torch.ones(q, k, dtype=torch.bool)
    if causal:
        allowed &= (distance <= 0) | (torch.arange(k) < (prefix or 0))
    left, right = window or (-1, -1)
    return allowed & ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))


def _dense(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """torch's scaled_dot_product_attention with one dense mask, where that can say it; else the reference."""
    causal, window, prefix = options.get("causal", False), options.get("window"), options.get("prefix_length")
    allowed = {"bias", "mask", "key_padding_mask", "causal", "window", "prefix_length", "scale"}
    if set(options) - allowed or isinstance(prefix, Tensor) or options.get("scale") == 0:  # there torch gives NaN
        return reference.attention(query, key, value, **options)
    mask = _positions(query.shape[2], key.shape[2], causal, window, prefix)
    mask = mask if "mask" not in options else mask & options["mask"]
    mask = mask if "key_padding_mask" not in options else mask & options["key_padding_mask"][:, None, None]
    if "bias" in options:
        mask = torch.where(mask, options["bias"], -torch.inf)
    square = set(options) <= {"causal", "scale"} and query.shape[2] == key.shape[2] and options.get("scale", 1.0) > 0
    gqa = query.shape[1] != key.shape[1]
    if square:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=bool(causal), scale=options.get("scale"), enable_gqa=gqa
        )
    return F.scaled_dot_product_attention(query, key, value, mask, scale=options.get("scale"), enable_gqa=gqa)


def _attention(
    label: str,
    query: tuple[int, ...],
    key: tuple[int, ...] | None = None,
    value: tuple[int, ...] | None = None,
    more: dict[str, Input] | None = None,
    layout: str = "contiguous",
    dy: str = "contiguous",
    scales: tuple[float, float] = (1.0, 1.0),
    **options: Any,
) -> Case:
    inputs = {
        "query": Input(query, scale=scales[0], layout=layout),
        "key": Input(key or query, scale=scales[1], layout=layout),
        "value": Input(value or key or query, layout=layout),
    }
    return Case(label, {**inputs, **(more or {})}, options, dy)


def _padding(batch: int, length: int) -> Input:
    return Input((batch, length), "ids", high=2, dtype=torch.bool)


def _attention_cases() -> tuple[Case, ...]:
    q, seed = (2, 4, 9, 8), {"seed": torch.tensor([-77])}
    prefix = torch.tensor([5, 0])
    ends = {"cu_seqlens_q": torch.tensor([0, 3, 3, 12]), "cu_seqlens_k": torch.tensor([0, 5, 9, 16])}

    def packed(label: str, more: dict[str, Input] | None = None, **options: Any) -> Case:
        return _attention(label, (12, 4, 8), (16, 2, 8), (16, 2, 6), more, **{**ends, **options})

    slopes = {"alibi_slopes": Input((4,), "uniform", grad=False)}
    sinks, bias = {"sinks": Input((4,))}, {"bias": Input((4, 9, 9))}
    padding, mask = {"key_padding_mask": _padding(2, 9)}, {"mask": _bool((9, 9))}
    everything: dict[str, Any] = {
        **{"causal": True, "prefix_length": 3, "window": (6, 2), "softcap": 3.0, "dropout_p": 0.2},
        **{"return_lse": True, "scale": 0.4, **seed},
    }
    cases = [
        _attention(
            "sample", (1, 2, 5, 8), (1, 1, 7, 8), None, {"bias": Input((2, 5, 7)), "sinks": Input((2,))}, causal=True
        ),
        _attention("plain", q),
        _attention("lse", q, return_lse=True),
        _attention("causal", q, causal=True),
        _attention("long-key", (1, 2, 65, 16), (1, 2, 129, 16), causal=True),
        _attention("long-query", (1, 2, 129, 16), (1, 2, 65, 16), causal=True, return_lse=True),
        _attention("top-left", (1, 2, 65, 16), (1, 2, 129, 16), causal="top_left"),
        _attention("top-left-long-query", (1, 2, 129, 16), (1, 2, 65, 16), causal="top_left"),
        _attention("one-query", (2, 4, 1, 64), (2, 2, 200, 64), causal=True, return_lse=True),
        _attention("one-key", q, (2, 4, 1, 8), return_lse=True),
        _attention("gqa", (2, 6, 5, 8), (2, 2, 7, 8), causal=True),
        _attention("mqa-value-size", (2, 3, 70, 33), (2, 1, 101, 33), (2, 1, 101, 17), causal=True),
        _attention("head-size-1", (1, 2, 7, 1), (1, 2, 3, 1)),
        _attention("head-size-111", (1, 2, 63, 111), (1, 1, 127, 111), (1, 1, 127, 7)),
        _attention("head-size-256", (1, 1, 33, 256), (1, 1, 97, 256)),
        _attention("window", (1, 2, 129, 16), window=(10, 3)),
        _attention("window-causal", (1, 2, 129, 16), causal=True, window=(20, -1)),
        _attention("window-right", (1, 2, 65, 16), (1, 2, 129, 16), window=(-1, 0)),
        _attention("window-itself", (1, 2, 70, 16), window=(0, 0)),
        _attention("prefix", (2, 2, 129, 16), causal=True, prefix_length=70),
        _attention("prefix-lengths", (2, 2, 129, 16), causal=True, prefix_length=prefix, return_lse=True),
        _attention("prefix-long-query", (2, 2, 70, 16), (2, 2, 9, 16), causal=True, prefix_length=prefix),
        _attention("padding", q, more=padding, return_lse=True),
        _attention("padding-causal", (2, 2, 129, 16), more={"key_padding_mask": _padding(2, 129)}, causal=True),
        _attention("mask", q, more=mask),
        _attention("mask-heads", (2, 2, 70, 16), more={"mask": _bool((2, 2, 70, 70))}, causal=True),
        _attention("mask-keys", q, more={"mask": _bool((2, 1, 1, 9))}),
        _attention("mask-queries", q, more={"mask": _bool((4, 9, 1))}, return_lse=True),
        _attention("bias", (2, 2, 70, 16), (2, 1, 100, 16), more={"bias": Input((2, 2, 70, 100))}, causal=True),
        _attention("bias-heads", q, more=bias),
        _attention("bias-all", (2, 2, 70, 16), more={"bias": Input((70, 70))}),
        _attention("bias-keys", q, more={"bias": Input((2, 1, 1, 9))}),
        _attention("bias-queries", q, more={"bias": Input((4, 9, 1))}, return_lse=True),
        _attention("bias-one", q, more={"bias": Input((1,))}),
        _attention("bias-transposed", q, more={"bias": Input((4, 9, 9), layout="transposed")}),
        _attention("alibi", q, more=slopes, causal=True),
        _attention("alibi-batch", q, more={"alibi_slopes": Input((2, 4), "uniform", grad=False)}),
        _attention("softcap", q, softcap=1.5, scale=1.0, return_lse=True),
        _attention("softcap-saturated", q, softcap=0.5, scales=(5.0, 3.0)),
        _attention("sinks", q, more=sinks, return_lse=True),
        _attention("dropout", q, dropout_p=0.3, **seed),
        _attention("dropout-bias", q, more=bias, dropout_p=0.5, causal=True, **seed),
        _attention("everything", q, more={**sinks, **bias, **padding, **slopes}, **everything),
        _attention("everything-mask", q, (2, 2, 9, 8), more={**sinks, **bias, **mask, **slopes}, **everything),
        packed("packed", return_lse=True),
        packed("packed-everything", {**sinks, **slopes}, **everything),
        packed("packed-bias", {"bias": Input((4, 9, 7)), **sinks}, causal=True),
        _attention("no-key", q, (2, 4, 0, 8), return_lse=True),
        _attention("no-query", (2, 4, 0, 8), q, return_lse=True),
        _attention("no-batch", (0, 4, 9, 8), causal=True),
        _attention("sharp", q, scales=(5.0, 3.0), causal=True),
        _attention("x50", (2, 4, 33, 16), scales=(50.0, 1.0)),
        _attention("scale-0", q, scale=0.0, causal=True),
        _attention("scale-negative", q, scale=-0.3, causal=True),
        _attention("dy-expanded", q, dy="expanded", causal=True),
    ]
    cases += [
        _attention(layout, q, layout=layout) for layout in ("transposed", "expanded", "rows", "offset", "every_other")
    ]
    return tuple(cases)


_BENCH = tuple(
    _case(f"causal-{length}x{size}", (1, 4, length, size), (1, 4, length, size), is_causal=True)
    for length in (512, 2048)
    for size in (64, 128)
)
# 8 heads of 8192 are 512 tiles of 128 rows for some hundred multiprocessors; the oracle's scores are 4 GiB.
_GPU_BENCH = tuple(
    _case(f"{'causal' if causal else 'full'}-8192x{size}", (1, 8, 8192, size), (1, 8, 8192, size), is_causal=causal)
    for size in (64, 128)
    for causal in (True, False)
)
_LONG = (1, 4, 1024, 64)
_BENCH_MASKS = (
    _attention("bias-1024x64", _LONG, more={"bias": Input((1, 4, 1024, 1024))}),
    _attention("prefix-1024x64", _LONG, causal=True, prefix_length=256),
    _attention("window-1024x64", _LONG, causal=True, window=(128, -1)),
)
_LONG_SUMS = frozenset(("key", "value", "attn_mask", "bias", "sinks"))

SPECS = (
    OpSpec(
        "scaled_dot_product_attention",
        "attention",
        _cases(),
        _BENCH,
        F.scaled_dot_product_attention,
        KERNELS,
        bytes_moved=_bytes,
        flops=_flops,
        saved=_saved,
        long_sums=_LONG_SUMS,
        compiled=lambda case, dtype: (),  # torch.compile calls the same kernel
        gpu_bench=_GPU_BENCH,
    ),
    OpSpec(
        "scaled_dot_product_attention",
        "attention",
        _dropout_cases(),
        kernels=KERNELS,
        long_sums=_LONG_SUMS,
        extra=frozenset(("seed",)),
    ),
    OpSpec(
        "attention",
        "attention",
        _attention_cases(),
        _BENCH_MASKS,
        _dense,
        KERNELS,
        bytes_moved=_bytes,
        flops=_flops,
        saved=_saved,
        long_sums=_LONG_SUMS,
    ),
    OpSpec(
        "attention_decode",
        "attention",
        decoding.cases(),
        decoding.BENCH,
        decoding.dense,
        kernels=KERNELS,
        bytes_moved=decoding.moved,
        flops=decoding.flops,
        differentiable=False,
        compiled=lambda case, dtype: (),
        reads=True,
    ),
)
