"""The embedding room's contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case, Input, OpSpec
from ._embedding_quantized import SPECS as _QUANTIZED
from ._embedding_steps import STEPS as STEPS


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


def _with_offsets(function: Callable[..., Any], beside: str = "input") -> Callable[..., Any]:
    """Takes `offsets` as a tuple, which fits any device."""

    def call(offsets: tuple[int, ...] | None = None, **arguments: Any) -> Any:
        if offsets is not None:
            arguments["offsets"] = torch.tensor(offsets, device=arguments[beside].device)
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
_KERNELS = ("cpu", "triton", "cuda", "emulator")
_UPDATE_KERNELS = _KERNELS
_TABLES_KERNELS = _INTERACTION_KERNELS = _KERNELS
_BENCH = (_lookup("100kx128-64k", (65536,), 100_000, 128),)


def _bag_spec(mode: str) -> OpSpec:
    bench: tuple[Case, ...] = (_bag("100kx128-4096x20", (4096, 20), 100_000, 128, mode=mode),)
    if mode == "sum":
        bench += (_bag("100kx128-4096x20-padding", (4096, 20), 100_000, 128, mode=mode, padding_idx=1),)
    gpu = (_bag("1Mx128-16384x20", (16384, 20), 1_000_000, 128, mode=mode),)
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
        gpu_bench=gpu,
    )


def _on_copies(function: Callable[..., Any]) -> Callable[..., Any]:
    """An update of copies of the table and its states (float32 for half-precision tables), which it returns."""

    def call(weight: Tensor, indices: Tensor, grad_output: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        states = [arguments.pop(name).to(wide, copy=True) for name in ("state", "second_state") if name in arguments]
        weight = weight.clone()
        function(weight, *states, indices, grad_output, **arguments)
        return (weight, *states)

    return call


_RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "sgd": (0, {"lr": 0.3}),
    "adagrad": (2, {"lr": 0.3, "eps": 1e-2}),
    "rowwise_adagrad": (1, {"lr": 0.3, "eps": 1e-2}),
    "adam": (4, {"lr": 0.3, "eps": 1e-2, "step": 3, "betas": (0.8, 0.9)}),
}


def _update(
    rule: str, label: str, ids: tuple[int, ...], rows: int, size: int, dy: tuple[int, ...] | None = None, **options: Any
) -> Case:
    """`dy`: shape of grad_output where it is not that of a lookup or of bags that are the rows of 2-D ids."""
    dimensions, numbers = _RULES[rule]
    lookup = options.get("mode") is None
    gradient = dy or ((*ids, size) if lookup else (ids[0], size))
    inputs = {
        "weight": Input((rows, size), grad=False),
        "indices": Input(ids, "ids", high=rows),
        "grad_output": Input(gradient, layout=options.pop("layout", "contiguous"), grad=False),
    }
    for name in ("state", "second_state")[: (dimensions + 1) // 2]:
        inputs[name] = Input((rows,) if dimensions == 1 else (rows, size), "uniform", grad=False)
    if options.pop("weighted", False):
        inputs["per_sample_weights"] = Input(ids, grad=False)
    return Case(label, inputs, {**numbers, **options})


def _update_spec(rule: str) -> OpSpec:
    bags = {"offsets": _OFFSETS, "padding_idx": 1}
    cases = [
        _update(rule, "sample", (3, 5), 4, 65, weight_decay=0.1),
        _update(rule, "none", (0,), 5, 3),
        _update(rule, "no-columns", (4,), 5, 0),
        _update(rule, "repeated", (600,), 3, 7, weight_decay=0.1),
        _update(rule, "padding", (40,), 6, 130, padding_idx=2),
        _update(rule, "by-frequency", (40,), 6, 17, scale_grad_by_freq=True),
        _update(rule, "dy-expanded", (4, 9), 11, 13, layout="expanded"),
        _update(rule, "sum", (20,), 30, 17, (7, 17), mode="sum", weighted=True, **bags),
        _update(rule, "mean", (20,), 4, 17, (6, 17), mode="mean", include_last_offset=True, **bags),
        _update(rule, "max", (4, 30), 9, 33, mode="max", padding_idx=1, weight_decay=0.1),
    ]
    return OpSpec(
        f"embedding_{rule}_",
        "embedding",
        tuple(cases),
        kernels=_UPDATE_KERNELS,
        differentiable=False,
        wrap=lambda function: _with_offsets(_on_copies(function), "weight"),
    )


def _of_tables(function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the tables, ids and weights of ids by number, and offsets as tuples."""

    def call(offsets: tuple[Any, ...] | None = None, **arguments: Any) -> Any:
        lists = [
            [arguments.pop(f"{name}{table}") for table in range(9) if f"{name}{table}" in arguments]
            for name in ("ids", "weight", "scale")
        ]
        if offsets is not None:
            device = lists[0][0].device
            offsets = tuple(None if one is None else torch.tensor(one, device=device) for one in offsets)
        return function(lists[0], offsets, lists[1], per_sample_weights=lists[2] or None, **arguments)

    return call


def _side_by_side(
    indices: list[Tensor],
    offsets: tuple[Any, ...] | None,
    weights: list[Tensor],
    per_sample_weights: list[Tensor] | None,
    **options: Any,
) -> Tensor:
    starts, scales = offsets or [None] * len(weights), per_sample_weights or [None] * len(weights)
    bags = zip(indices, starts, weights, scales, strict=True)
    return torch.cat([F.embedding_bag(i, w, o, per_sample_weights=s, **options) for i, o, w, s in bags], 1)


def _tables(
    label: str,
    ids: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    rows: int,
    weighted: bool = False,
    **options: Any,
) -> Case:
    inputs = {f"ids{t}": Input(shape, "ids", high=rows) for t, shape in enumerate(ids)}
    inputs |= {f"weight{t}": Input((rows, size)) for t, size in enumerate(sizes)}
    if weighted:
        inputs |= {f"scale{t}": Input(shape) for t, shape in enumerate(ids)}
    return Case(label, inputs, options)


def _tables_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    element, moved = torch.finfo(dtype).bits // 8, {"forward": 0, "backward": 0}
    for table in range(sum(name.startswith("weight") for name in case.inputs)):
        (bags, length), (rows, size) = case.inputs[f"ids{table}"].shape, case.inputs[f"weight{table}"].shape
        moved["forward"] += 8 * bags * length + (bags * length + bags) * size * element
        moved["backward"] += 8 * bags * length + (bags + rows) * size * element
    return moved


def _tables_spec(mode: str) -> OpSpec:
    cases = [
        _tables("sample", ((3, 4), (3, 2), (3, 1)), (5, 16, 9), 4, mode=mode),
        _tables("one-table", ((3, 4),), (17,), 6, mode=mode),
        _tables("no-bags", ((0, 4), (0, 2)), (3, 5), 6, mode=mode),
        _tables(
            "offsets", ((20,), (7, 2), (9,)), (33, 1, 8), 12, mode=mode, offsets=(_OFFSETS, None, (0, 0, 1, 2, 3, 9, 9))
        ),
    ]
    if mode == "sum":
        cases.append(_tables("weighted", ((3, 4), (3, 2)), (5, 16), 7, weighted=True, mode=mode))
    bench = (_tables("8x100kx64-2048x8", ((2048, 8),) * 8, (64,) * 8, 100_000, mode=mode),) if mode == "sum" else ()
    return OpSpec(
        "embedding_bag_multi",
        "embedding",
        tuple(cases),
        bench,
        _of_tables(_side_by_side),
        kernels=_TABLES_KERNELS,
        bytes_moved=_tables_bytes,
        long_sums=frozenset(name for case in cases for name in case.inputs if not name.startswith("ids")),
        wrap=_of_tables,
    )


def _dlrm_interaction(dense: Tensor, sparse: Tensor, self_interaction: bool = False) -> Tensor:
    """As DLRM's own code has it: concatenation, batched product, selection of the triangle, concatenation."""
    features = torch.cat([dense.unsqueeze(1), sparse], 1)
    products = torch.bmm(features, features.transpose(1, 2))
    count = features.shape[1]
    i, j = torch.tril_indices(count, count, 0 if self_interaction else -1, device=dense.device)
    return torch.cat([dense, products[:, i, j]], 1)


def _interaction(label: str, batch: int, features: int, size: int, layout: str = "contiguous", **options: Any) -> Case:
    dense, sparse = Input((batch, size), layout=layout), Input((batch, features, size), layout=layout)
    return Case(label, {"dense": dense, "sparse": sparse}, options)


def _interaction_sizes(case: Case) -> tuple[int, int, int, int]:
    batch, features, size = case.inputs["sparse"].shape
    pairs = features * (features + 1) // 2 + (features + 1) * bool(case.options.get("self_interaction"))
    return batch, features, size, pairs


def _interaction_flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Two for each element of a product; the gradient of a pair goes to both of its rows."""
    batch, _, size, pairs = _interaction_sizes(case)
    return {"forward": 2 * batch * pairs * size, "backward": 4 * batch * pairs * size}


def _interaction_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    batch, features, size, pairs = _interaction_sizes(case)
    element, rows = torch.finfo(dtype).bits // 8, (features + 1) * size
    out = size + pairs
    return {"forward": batch * (rows + out) * element, "backward": batch * (2 * rows + out) * element}


_INTERACTION = OpSpec(
    "dot_interaction",
    "embedding",
    (
        _interaction("sample", 3, 4, 7),
        _interaction("self", 3, 5, 16, self_interaction=True),
        _interaction("dlrm", 5, 26, 64),
        _interaction("wide", 2, 35, 130),
        _interaction("one-feature", 4, 1, 1),
        _interaction("no-features", 4, 0, 5),
        _interaction("no-samples", 0, 3, 5),
        *(_interaction(layout, 5, 6, 9, layout) for layout in ("transposed", "expanded", "rows", "every_other")),
    ),
    (_interaction("2048x26x64", 2048, 26, 64), _interaction("2048x26x128", 2048, 26, 128)),
    _dlrm_interaction,
    kernels=_INTERACTION_KERNELS,
    bytes_moved=_interaction_bytes,
    flops=_interaction_flops,
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
    *(_tables_spec(mode) for mode in ("sum", "mean", "max")),
    *(_update_spec(rule) for rule in _RULES),
    _INTERACTION,
    *_QUANTIZED,
)
