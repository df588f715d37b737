"""The embedding room's contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..spec import Case, Input, OpSpec


def _lookup(label: str, ids: tuple[int, ...], rows: int, size: int, dy: str = "contiguous", **options: Any) -> Case:
    table = Input((rows, size), layout=options.pop("layout", "contiguous"))
    index = Input(ids, "ids", high=rows, dtype=options.pop("id_dtype", torch.int64))
    return Case(label, {"input": index, "weight": table}, options, dy)


def _lookup_cases() -> tuple[Case, ...]:
    cases = [
        _lookup("sample", (3, 5), 4, 65),
        _lookup("scalar", (), 7, 5),
        _lookup("one", (1,), 1, 1),
        _lookup("none", (0, 3), 7, 5),
        _lookup("no-columns", (4,), 7, 0),
        _lookup("int32", (2, 3, 4), 50, 33, id_dtype=torch.int32),
        _lookup("repeated", (1500,), 3, 7),
        _lookup("padding", (40,), 6, 17, padding_idx=2),
        _lookup("padding-from-the-end", (40,), 6, 17, padding_idx=-1),
        _lookup("by-frequency", (60,), 6, 17, scale_grad_by_freq=True),
        _lookup("by-frequency-padding", (60,), 6, 17, scale_grad_by_freq=True, padding_idx=0),
    ]
    for layout in ("transposed", "expanded", "rows", "every_other"):
        cases.append(_lookup(layout, (4, 9), 11, 13, layout=layout))
        cases.append(_lookup(f"dy-{layout}", (4, 9), 11, 13, dy=layout))
    return tuple(cases)


def _with_offsets(function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes `offsets` as a tuple, which fits any device."""

    def call(offsets: tuple[int, ...] | None = None, **arguments: Any) -> Any:
        if offsets is not None:
            arguments["offsets"] = torch.tensor(offsets, device=arguments["input"].device)
        return function(**arguments)

    return call


def _bag(label: str, ids: tuple[int, ...], rows: int, size: int, dy: str = "contiguous", **options: Any) -> Case:
    inputs = {"input": Input(ids, "ids", high=rows), "weight": Input((rows, size))}
    if options.pop("weighted", False):
        inputs["per_sample_weights"] = Input(ids)
    return Case(label, inputs, options, dy)


_OFFSETS = (0, 0, 3, 4, 4, 20, 20)


def _bag_cases(mode: str) -> tuple[Case, ...]:
    cases = [
        _bag("sample", (3, 5), 4, 60, mode=mode),
        _bag("one", (1, 1), 1, 1, mode=mode),
        _bag("no-bags", (0, 4), 5, 3, mode=mode),
        _bag("offsets", (20,), 30, 17, mode=mode, offsets=_OFFSETS),
        _bag("last-offset", (20,), 30, 17, mode=mode, offsets=_OFFSETS, include_last_offset=True),
        _bag("padding", (20,), 4, 17, mode=mode, offsets=_OFFSETS, padding_idx=1),
        _bag("all-padding", (2, 6), 1, 3, mode=mode, padding_idx=0),
        _bag("repeated", (4, 150), 3, 7, mode=mode),
        _bag("dy-expanded", (6, 5), 20, 9, mode=mode, dy="expanded"),
    ]
    if mode == "sum":
        cases.append(_bag("weighted", (4, 5), 20, 9, mode=mode, weighted=True))
        cases.append(_bag("weighted-padding", (20,), 4, 9, mode=mode, weighted=True, offsets=_OFFSETS, padding_idx=-2))
    return tuple(cases)


def _weighted_mean_cases() -> tuple[Case, ...]:
    return (
        _bag("sample", (3, 4), 4, 60, mode="mean", weighted=True),
        _bag("weighted-mean-padding", (20,), 4, 9, mode="mean", weighted=True, offsets=_OFFSETS, padding_idx=1),
        _bag("by-frequency", (20,), 8, 9, mode="sum", offsets=_OFFSETS, scale_grad_by_freq=True),
    )


def _bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads ids and rows and writes the output; backward reads dy and writes the dense gradient."""
    ids, (rows, size) = math.prod(case.inputs["input"].shape), case.inputs["weight"].shape
    element = torch.finfo(dtype).bits // 8
    out = (case.inputs["input"].shape[0] if "mode" in case.options else ids) * size * element
    return {"forward": 8 * ids + ids * size * element + out, "backward": 8 * ids + out + rows * size * element}


def _saved(case: Case, dtype: torch.dtype) -> int:
    """The ids are the caller's; only mode "max" keeps something of its own, a 32-bit place for each output."""
    maxima = case.options.get("mode") == "max"
    return 4 * case.inputs["input"].shape[0] * case.inputs["weight"].shape[1] if maxima else 0


_LONG = frozenset(("weight", "per_sample_weights"))
_KERNELS = ("cpu", "triton")
_BENCH = (_lookup("100kx128-64k", (65536,), 100_000, 128),)


def _bag_spec(mode: str) -> OpSpec:
    bench = (_bag("100kx128-4096x20", (4096, 20), 100_000, 128, mode=mode),)
    peer = _with_offsets(F.embedding_bag)
    return OpSpec(
        "embedding_bag",
        "embedding",
        _bag_cases(mode),
        bench,
        peer,
        kernels=_KERNELS,
        bytes_moved=_bytes,
        saved=_saved,
        long_sums=_LONG,
        wrap=_with_offsets,
    )


SPECS = (
    OpSpec(
        "embedding",
        "embedding",
        _lookup_cases(),
        _BENCH,
        F.embedding,
        kernels=_KERNELS,
        bytes_moved=_bytes,
        saved=_saved,
        long_sums=_LONG,
    ),
    _bag_spec("sum"),
    _bag_spec("mean"),
    _bag_spec("max"),
    OpSpec(
        "embedding_bag",
        "embedding",
        _weighted_mean_cases(),
        kernels=_KERNELS,
        long_sums=_LONG,
        wrap=_with_offsets,
    ),
)
