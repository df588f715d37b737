"""The sampled_softmax room's contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional import HuffmanTree
from ..spec import Case, Input, OpSpec
from ._sampled_steps import STEPS as STEPS

_KERNELS = ("cpu", "triton", "cuda", "emulator")
_LONG = frozenset(("input", "weight", "inputs", "weights", "biases", "linear_weight", "linear_bias"))


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _element(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


# Negative sampling


def _negative(
    label: str,
    batch: int,
    size: int,
    classes: int,
    negatives: tuple[int, ...],
    dy: str = "contiguous",
    scale: float = 1.0,
    layout: str = "contiguous",
    id_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> Case:
    inputs = {
        "input": Input((batch, size), scale=scale, layout=layout),
        "weight": Input((classes, size), scale=scale, layout=layout),
        "target": Input((batch,), "ids", high=classes, dtype=id_dtype),
        "negatives": Input(negatives, "ids", high=classes, dtype=id_dtype),
    }
    return Case(label, inputs, options, dy)


def _negative_cases(reduction: str) -> tuple[Case, ...]:
    cases = [
        _negative("sample", 4, 33, 4, (4, 4), reduction=reduction),
        _negative("shared", 7, 17, 50, (9,), reduction=reduction),
        # Of one class, target and negative would cancel, and nothing but rounding would be compared.
        _negative("one", 1, 1, 2, (1, 1), reduction=reduction),
        _negative("no-negatives", 5, 8, 10, (5, 0), reduction=reduction),
        _negative("saturated", 9, 33, 20, (9, 5), scale=5.0, reduction=reduction),
    ]
    if reduction != "mean":  # which is the sum, divided
        cases.append(_negative("long", 300, 5, 7, (300, 6), reduction=reduction))
        cases.append(_negative("no-rows", 0, 8, 10, (0, 3), reduction=reduction))
    if reduction == "none":
        cases.append(_negative("dy-expanded", 6, 8, 10, (6, 3), dy="expanded", reduction=reduction))
        cases.append(_negative("int32", 6, 127, 10, (6, 3), id_dtype=torch.int32, reduction=reduction))
        cases += [
            _negative(kind, 6, 8, 10, (6, 3), layout=kind, reduction=reduction) for kind in ("transposed", "rows")
        ]
    return tuple(cases)


def _negative_peer(input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor, reduction: str = "mean") -> Tensor:
    """The eager composition that users write: gather, batched product, log-sigmoid."""
    positive = torch.einsum("bd,bd->b", input, weight[target])
    shared = negatives.dim() == 1
    negative = input @ weight[negatives].T if shared else torch.einsum("bd,bkd->bk", input, weight[negatives])
    return _reduced(-F.logsigmoid(positive) - F.logsigmoid(-negative).sum(1), reduction)


def _negative_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads x and the target's and negatives' rows; backward reads x again, writes dx and the dense dw."""
    (batch, size), (classes, _) = case.inputs["input"].shape, case.inputs["weight"].shape
    shape = case.inputs["negatives"].shape
    rows = batch + shape[0] * (shape[1] if len(shape) == 2 else 1)
    read = (batch + rows) * size * _element(dtype) + 8 * rows
    return {"forward": read, "backward": read + (batch + classes) * size * _element(dtype)}


_NEGATIVE_BENCH = (
    _negative("100kx128-K5", 4096, 128, 100_000, (4096, 5)),
    _negative("100kx128-K64", 1024, 128, 100_000, (1024, 64)),
    _negative("100kx128-shared-K1024", 1024, 128, 100_000, (1024,)),
)


def _negative_spec(reduction: str) -> OpSpec:
    return OpSpec(
        "negative_sampling_loss",
        "sampled_softmax",
        _negative_cases(reduction),
        _NEGATIVE_BENCH if reduction == "mean" else (),
        _negative_peer,
        kernels=_KERNELS,
        bytes_moved=_negative_bytes,
        long_sums=_LONG,
    )


# Hierarchical softmax


Counts = tuple[int, ...] | int
"""An int: so many words by Zipf's law. (torch.compile takes 20 s to guard a tuple of 30,000.)"""

_TREES: dict[Counts, Any] = {}


def _tree(counts: Counts) -> Any:
    if counts not in _TREES:  # built once: torch.compile is to see the tree, not how it is made
        _TREES[counts] = HuffmanTree.from_counts(_zipf(counts) if isinstance(counts, int) else counts)
    return _TREES[counts]


def _with_tree(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*, counts: Counts, **arguments: Any) -> Any:
        return function(tree=_tree(counts), **arguments)

    return call


def _hierarchical(label: str, batch: int, size: int, counts: Counts, **options: Any) -> Case:
    words = counts if isinstance(counts, int) else len(counts)
    inputs = {
        "input": Input((batch, size)),
        "weight": Input((words - 1, size)),
        "target": Input((batch,), "ids", high=words),
    }
    return Case(label, inputs, {"counts": counts, **options})


def _zipf(classes: int) -> tuple[int, ...]:
    return tuple(1 + 10 * classes // (v + 1) for v in range(classes))


_HIERARCHICAL_CASES = (
    _hierarchical("sample", 4, 33, (9, 4, 2, 1, 1)),
    _hierarchical("zipf", 65, 17, _zipf(300)),
    _hierarchical("two", 3, 5, (1, 1)),
    _hierarchical("one-class", 3, 5, (7,)),
    _hierarchical("no-rows", 0, 5, (3, 2, 1), reduction="sum"),
    _hierarchical("long", 400, 3, (5, 5, 1), reduction="none"),
)


def _hierarchical_peer(
    input: Tensor, weight: Tensor, target: Tensor, counts: Counts, reduction: str = "mean"
) -> Tensor:
    """Logits of the padded path, then log-sigmoid."""
    nodes, signs = _tree(counts).to(target.device).paths(target)
    if weight.shape[0] == 0:
        return _reduced(0 * input.sum(1), reduction) + 0 * weight.sum()
    logits = torch.einsum("bd,bkd->bk", input, weight[nodes.clamp(min=0)]) * signs
    return _reduced(-torch.where(nodes < 0, 0, F.logsigmoid(logits)).sum(1), reduction)


def _hierarchical_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """As negative sampling's, with the mean path of the targets that are drawn (uniformly)."""
    (batch, size), (nodes, _) = case.inputs["input"].shape, case.inputs["weight"].shape
    tree = _tree(case.options["counts"])
    rows = batch * tree.points.shape[0] // max(tree.classes, 1)
    read = (batch + rows) * size * _element(dtype) + 5 * rows
    return {"forward": read, "backward": read + (batch + nodes) * size * _element(dtype)}


# Losses over shared samples


def _with_counts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `sampled_values` of the sampled classes; the expected counts are a function of the ids."""

    def call(*, sampled: Tensor, labels: Tensor, **arguments: Any) -> Any:
        values = (sampled, _expected(labels), _expected(sampled))
        sizes = {"num_sampled": sampled.shape[0], "num_classes": arguments["weights"].shape[0]}
        many = labels.shape[1] if labels.dim() == 2 else 1
        return function(labels=labels, sampled_values=values, num_true=many, **sizes, **arguments)

    return call


def _expected(ids: Tensor) -> Tensor:
    return 1.5 / (ids.float() + 1.0)


def _sampled(
    label: str,
    batch: int,
    size: int,
    classes: int,
    samples: int,
    labels: int = 1,
    bias: bool = True,
    scale: float = 1.0,
    layout: str = "contiguous",
    dy: str = "contiguous",
    **options: Any,
) -> Case:
    inputs = {
        "inputs": Input((batch, size), scale=scale, layout=layout),
        "weights": Input((classes, size), scale=scale, layout=layout),
        "labels": Input((batch, labels), "ids", high=classes),
        "sampled": Input((samples,), "ids", high=classes),
    }
    if bias:
        inputs["biases"] = Input((classes,))
    else:
        options["biases"] = None
    return Case(label, inputs, options, dy)


_SAMPLED_CASES = (
    _sampled("sample", 4, 33, 4, 4),
    _sampled("labels", 7, 17, 20, 9, labels=3),
    _sampled("no-bias", 9, 33, 500, 129, bias=False),
    _sampled("one", 1, 1, 1, 1),
    _sampled("no-samples", 5, 8, 10, 0),
    _sampled("no-rows", 0, 8, 10, 5, reduction="sum"),
    _sampled("tiles", 130, 65, 900, 600, reduction="none"),
    _sampled("saturated", 9, 33, 20, 15, scale=5.0, reduction="sum"),
    _sampled("hits-kept", 9, 7, 12, 15, remove_accidental_hits=False),
    _sampled("hits-removed", 9, 7, 12, 15, remove_accidental_hits=True),
    _sampled("rows", 6, 13, 15, 8, layout="rows", reduction="none", dy="expanded"),
    _sampled("transposed", 6, 13, 15, 8, layout="transposed"),
)


def _sampled_peer(kind: str, hits: bool) -> Callable[..., Tensor]:
    """The eager composition: gathered rows, all logits, mask, torch's loss on soft labels."""

    def peer(
        inputs: Tensor,
        weights: Tensor,
        labels: Tensor,
        sampled: Tensor,
        biases: Tensor | None = None,
        remove_accidental_hits: bool = hits,
        reduction: str = "mean",
    ) -> Tensor:
        many = labels.shape[1]
        true = torch.einsum("bd,btd->bt", inputs, weights[labels]) - _expected(labels).log().to(inputs.dtype)
        other = inputs @ weights[sampled].T - _expected(sampled).log().to(inputs.dtype)
        if biases is not None:
            true, other = true + biases[labels], other + biases[sampled]
        if remove_accidental_hits:
            other = other.masked_fill((labels.unsqueeze(2) == sampled).any(1), -torch.inf)
        logits = torch.cat([true, other], 1).to(torch.promote_types(inputs.dtype, torch.float32))
        if kind == "softmax":
            loss = -F.log_softmax(logits, 1)[:, :many].mean(1)
        else:
            loss = -F.logsigmoid(-logits).sum(1) - logits[:, :many].mean(1)
        return _reduced(loss, reduction).to(inputs.dtype)

    return peer


def _sampled_sizes(case: Case) -> tuple[int, int, int, int]:
    batch, size = case.inputs["inputs"].shape
    return batch, size, math.prod(case.inputs["sampled"].shape), case.inputs["weights"].shape[0]


def _sampled_flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    batch, size, samples, _ = _sampled_sizes(case)
    product = 2 * batch * samples * size
    return {"forward": product, "backward": 2 * product}


def _sampled_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """x and the rows of labels and samples; backward reads them again and writes dx and the dense dw."""
    batch, size, samples, classes = _sampled_sizes(case)
    labels = math.prod(case.inputs["labels"].shape)
    read = (batch + labels + samples) * size * _element(dtype)
    return {"forward": read, "backward": read + (batch + classes) * size * _element(dtype)}


def _sampled_spec(name: str, kind: str, hits: bool) -> OpSpec:
    return OpSpec(
        name,
        "sampled_softmax",
        _SAMPLED_CASES,
        # Logits of unit variance: at larger ones most probabilities are denormal, and torch ten times slower.
        (_sampled("100kx128-K8192", 1024, 128, 100_000, 8192, bias=False, scale=0.3),),
        _sampled_peer(kind, hits),
        kernels=_KERNELS,
        bytes_moved=_sampled_bytes,
        flops=_sampled_flops,
        long_sums=_LONG,
        wrap=_with_counts,
    )


# Cross entropy over all classes


def _linear(
    label: str,
    batch: int,
    size: int,
    classes: int,
    bias: bool = False,
    weighted: bool = False,
    layout: str = "contiguous",
    scale: float = 1.0,
    dy: str = "contiguous",
    id_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> Case:
    inputs = {
        "input": Input((batch, size), layout=layout, scale=scale),
        "linear_weight": Input((classes, size), layout=layout, scale=scale),
        "target": Input((batch,), "ids", high=classes, dtype=id_dtype),
    }
    if bias:
        inputs["linear_bias"] = Input((classes,))
    return Case(label, inputs, {**options, "weighted": True} if weighted else options, dy)


_LINEAR_CASES = (
    _linear("sample", 4, 33, 4, bias=True),
    _linear("tiles", 130, 65, 1025),
    _linear("one", 1, 1, 1),
    _linear("no-rows", 0, 5, 7, reduction="sum"),
    _linear("ignored", 17, 9, 5, ignore_index=3),
    _linear("everything", 17, 9, 12, bias=True, weighted=True, ignore_index=2, label_smoothing=0.2, z_loss=0.01),
    _linear("smooth", 9, 7, 130, label_smoothing=0.1, reduction="none", dy="expanded"),
    _linear("z-loss", 9, 7, 130, z_loss=0.1, reduction="sum"),
    _linear("weighted", 40, 7, 9, weighted=True),
    _linear("saturated", 9, 65, 40, scale=5.0),
    _linear("int32", 9, 7, 40, id_dtype=torch.int32),
    _linear("rows", 9, 7, 40, layout="rows"),
    _linear("transposed", 9, 7, 40, layout="transposed"),
)


def _with_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the class weights where a case asks for them: constants, without gradient."""

    def call(weighted: bool = False, **arguments: Any) -> Any:
        if weighted:
            w = arguments["linear_weight"]
            arguments["weight"] = (torch.arange(w.shape[0], device=w.device) % 3 + 0.5).to(w.dtype)
        return function(**arguments)

    return call


def _linear_peer(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weighted: bool = False,
    z_loss: float = 0.0,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """F.linear and F.cross_entropy (what F.linear_cross_entropy of torch 2.13 does), z-loss on the same logits."""
    logits = F.linear(input, linear_weight, linear_bias)
    classes, ignored = linear_weight.shape[0], options.get("ignore_index", -100)
    weight = (torch.arange(classes, device=input.device) % 3 + 0.5).to(input.dtype) if weighted else None
    loss = F.cross_entropy(logits, target.long(), weight=weight, reduction=reduction, **options)
    if z_loss:
        kept = target != ignored
        share = kept.to(input.dtype) if weight is None else torch.where(kept, weight[target.long()], 0)
        extra = z_loss * share * torch.logsumexp(logits, 1).square()
        loss = loss + (extra if reduction == "none" else extra.sum() / (share.sum() if reduction == "mean" else 1))
    return loss


def _linear_sizes(case: Case) -> tuple[int, int, int]:
    return (*case.inputs["input"].shape, case.inputs["linear_weight"].shape[0])  # type: ignore[return-value]


def _linear_flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    batch, size, classes = _linear_sizes(case)
    return {"forward": 2 * batch * size * classes, "backward": 6 * batch * size * classes}


def _linear_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads x and w; backward reads both again and writes dx and dw."""
    batch, size, classes = _linear_sizes(case)
    read = (batch + classes) * size * _element(dtype)
    return {"forward": read, "backward": 2 * read}


def _linear_saved(case: Case, dtype: torch.dtype) -> int:
    return 8 * case.inputs["input"].shape[0]


SPECS = (
    *(_negative_spec(reduction) for reduction in ("none", "mean", "sum")),
    OpSpec(
        "hierarchical_softmax_loss",
        "sampled_softmax",
        _HIERARCHICAL_CASES,
        (_hierarchical("30kx128", 4096, 128, 30_000),),
        _hierarchical_peer,
        kernels=_KERNELS,
        bytes_moved=_hierarchical_bytes,
        long_sums=_LONG,
        wrap=_with_tree,
    ),
    _sampled_spec("sampled_softmax_loss", "softmax", True),
    _sampled_spec("nce_loss", "logistic", False),
    OpSpec(
        "linear_cross_entropy",
        "sampled_softmax",
        _LINEAR_CASES,
        (_linear("512x256-V128k", 512, 256, 128_000, scale=0.25),),
        _linear_peer,
        kernels=_KERNELS,
        bytes_moved=_linear_bytes,
        flops=_linear_flops,
        saved=_linear_saved,
        long_sums=_LONG,
        wrap=_with_weights,
    ),
)
