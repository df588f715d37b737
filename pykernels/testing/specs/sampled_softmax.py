"""The sampled_softmax room's contract."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case, Input, OpSpec


def _case(
    label: str,
    batch: int,
    size: int,
    classes: int,
    negatives: tuple[int, ...],
    dy: str = "contiguous",
    scale: float = 1.0,
    layout: str = "contiguous",
    **options: Any,
) -> Case:
    inputs = {
        "input": Input((batch, size), scale=scale, layout=layout),
        "weight": Input((classes, size), scale=scale, layout=layout),
        "target": Input((batch,), "ids", high=classes),
        "negatives": Input(negatives, "ids", high=classes),
    }
    return Case(label, inputs, options, dy)


def _cases(reduction: str) -> tuple[Case, ...]:
    cases = [
        _case("sample", 4, 33, 4, (4, 4), reduction=reduction),
        _case("shared", 7, 17, 50, (9,), reduction=reduction),
        _case("one", 1, 1, 1, (1, 1), reduction=reduction),
        _case("no-negatives", 5, 8, 10, (5, 0), reduction=reduction),
        _case("long", 300, 5, 7, (300, 6), reduction=reduction),
        _case("saturated", 9, 33, 20, (9, 5), scale=5.0, reduction=reduction),
    ]
    if reduction != "mean":
        cases.append(_case("no-rows", 0, 8, 10, (0, 3), reduction=reduction))
    if reduction == "none":
        cases.append(_case("dy-expanded", 6, 8, 10, (6, 3), dy="expanded", reduction=reduction))
        cases += [_case(kind, 6, 8, 10, (6, 3), layout=kind, reduction=reduction) for kind in ("transposed", "rows")]
    return tuple(cases)


def _peer(input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor, reduction: str = "mean") -> Tensor:
    """The eager composition that users write: gather, batched product, log-sigmoid."""
    positive = torch.einsum("bd,bd->b", input, weight[target])
    rows = weight[negatives].expand(input.shape[0], negatives.shape[-1], input.shape[1])
    negative = torch.einsum("bd,bkd->bk", input, rows)
    loss = -F.logsigmoid(positive) - F.logsigmoid(-negative).sum(1)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads x and the target's and negatives' rows; backward reads them again, writes dx and the dense dw."""
    (batch, size), (classes, _) = case.inputs["input"].shape, case.inputs["weight"].shape
    shape = case.inputs["negatives"].shape
    rows = batch + shape[0] * (shape[1] if len(shape) == 2 else 1)
    element = torch.finfo(dtype).bits // 8
    read = (batch + rows) * size * element + 8 * rows
    return {"forward": read, "backward": read + (batch + classes) * size * element}


_BENCH = (
    _case("100kx128-K5", 4096, 128, 100_000, (4096, 5)),
    _case("100kx128-K64", 1024, 128, 100_000, (1024, 64)),
    _case("100kx128-shared-K1024", 1024, 128, 100_000, (1024,)),
)


def _spec(reduction: str) -> OpSpec:
    bench = _BENCH if reduction == "mean" else ()
    return OpSpec(
        "negative_sampling_loss",
        "sampled_softmax",
        _cases(reduction),
        bench,
        _peer,
        bytes_moved=_bytes,
        long_sums=frozenset(("input", "weight")),
    )


SPECS = tuple(_spec(reduction) for reduction in ("none", "mean", "sum"))
