"""The contract of packed tables. Cases are tables of floats, which the reference packs: every dtype and the oracle read
the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..spec import Case, Input, OpSpec

_OFFSETS = (0, 0, 3, 4, 4, 20, 20)
_KERNELS = ("cpu", "triton", "cuda", "emulator")


def _of_bags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes `offsets` as a tuple, and the weights of ids in the case's dtype."""

    def call(
        weight: Tensor,
        indices: Tensor,
        per_sample_weights: Tensor | None = None,
        offsets: tuple[int, ...] | None = None,
        bits: int = 8,
        **options: Any,
    ) -> Any:
        starts = None if offsets is None else torch.tensor(offsets, device=weight.device, dtype=indices.dtype)
        scale = None if per_sample_weights is None else per_sample_weights.float()
        packed = reference.quantize_rows(weight, bits)
        return function(packed, indices, starts, bits=bits, per_sample_weights=scale, dtype=weight.dtype, **options)

    return call


def _unpacked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What packing leaves of the table, as floats."""

    def call(weight: Tensor, bits: int = 8, **options: Any) -> Any:
        return reference.dequantize_rows(function(weight, bits, **options), bits, weight.dtype)

    return call


def _of_packed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(weight: Tensor, bits: int = 8, **options: Any) -> Any:
        return function(reference.quantize_rows(weight, bits), bits, dtype=weight.dtype, **options)

    return call


def _bag(label: str, ids: tuple[int, ...], rows: int, size: int, **options: Any) -> Case:
    inputs = {
        "weight": Input((rows, size), options.pop("values", "normal"), grad=False),
        "indices": Input(ids, "ids", high=rows, dtype=options.pop("id_dtype", torch.int64)),
    }
    if options.pop("weighted", False):
        inputs["per_sample_weights"] = Input(ids, grad=False)
    return Case(label, inputs, options)


def _table(label: str, rows: int, size: int, bits: int, values: str = "normal", layout: str = "contiguous") -> Case:
    return Case(label, {"weight": Input((rows, size), values, layout, grad=False)}, {"bits": bits})


def _cases(bits: int) -> tuple[Case, ...]:
    return (
        _bag(f"offsets-{bits}", (20,), 30, 66, bits=bits, mode="sum", offsets=_OFFSETS),
        _bag(f"last-offset-{bits}", (20,), 30, 16, bits=bits, mode="mean", offsets=_OFFSETS, include_last_offset=True),
        _bag(f"weighted-{bits}", (4, 5), 20, 8, bits=bits, mode="sum", weighted=True, id_dtype=torch.int32),
        _bag(f"padding-{bits}", (20,), 4, 24, bits=bits, mode="mean", weighted=True, offsets=_OFFSETS, padding_idx=1),
        _bag(f"all-padding-{bits}", (2, 6), 1, 2, bits=bits, mode="mean", padding_idx=0),
        _bag(f"no-bags-{bits}", (0, 4), 5, 2, bits=bits, mode="sum"),
        _bag(f"not-finite-{bits}", (12, 2), 12, 10, bits=bits, mode="sum", values="special"),
        _bag(f"constant-{bits}", (5, 7), 12, 130, bits=bits, mode="sum", values="constant"),
        _bag(f"repeated-{bits}", (2, 40), 3, 264, bits=bits, mode="sum"),
    )


SPECS = (
    OpSpec(
        "embedding_bag_quantized",
        "embedding",
        (_bag("sample", (3, 5), 4, 56, bits=8, mode="sum"), *_cases(8), *_cases(4), _bag("odd", (6, 3), 5, 7, bits=8)),
        kernels=_KERNELS,
        differentiable=False,
        wrap=_of_bags,
    ),
    OpSpec(
        "embedding_bag_quantized",
        "embedding",
        (
            _bag("sample", (2, 3, 4), 50, 34, bits=4, mode=None),
            _bag("scalar", (), 7, 6, bits=8, mode=None),
            _bag("none", (0, 3), 7, 6, bits=4, mode=None),
            _bag("no-columns", (4,), 7, 0, bits=8, mode=None),
            _bag("int32", (33,), 50, 40, bits=8, mode=None, id_dtype=torch.int32, padding_idx=3),
        ),
        kernels=_KERNELS,
        differentiable=False,
        wrap=_of_bags,
    ),
    OpSpec(
        "quantize_rows",
        "embedding",
        (
            _table("sample", 5, 34, 4),
            *(_table(f"outlier-{bits}", 3, 66, bits, "outlier") for bits in (8, 4)),
            *(_table(f"not-finite-{bits}", 30, 6, bits, "special") for bits in (8, 4)),
            *(_table(layout, 6, 10, 8, layout=layout) for layout in ("transposed", "expanded", "rows", "every_other")),
            _table("every-other-4", 6, 10, 4, layout="every_other"),
            _table("odd", 4, 1, 8),
            _table("no-rows", 0, 4, 4),
            _table("no-columns", 3, 0, 8),
            _table("wide", 1, 1500, 4),
        ),
        kernels=_KERNELS,
        differentiable=False,
        wrap=_unpacked,
    ),
    OpSpec(
        "dequantize_rows",
        "embedding",
        (_table("sample", 5, 33, 8), _table("four", 9, 40, 4), _table("no-rows", 0, 4, 4)),
        kernels=_KERNELS,
        differentiable=False,
        wrap=_of_packed,
    ),
)
