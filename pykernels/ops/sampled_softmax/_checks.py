"""Checks of the sampled_softmax room's arguments: torch's exception classes, and which argument is wrong."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .. import _check, _ids

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(function: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        allowed = ", ".join(REDUCTIONS)
        raise ValueError(f"{function}(): argument 'reduction' must be one of {allowed}, not {reduction!r}")


def check_count(function: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{function}(): argument '{name}' must be int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{function}(): argument '{name}' must be at least {least}, not {value}")


def check_matrices(function: str, input: Tensor, weight: Tensor, rows: str = "V", names: str = "input weight") -> None:
    """Both floating, of one dtype and device, (B, D) and (V, D)."""
    of_input, of_weight = names.split()
    _check.floating(function, of_input, input)
    _check.floating(function, of_weight, weight)
    _check.same(function, of_weight, weight, of_input, input)
    if input.dim() != 2:
        raise ValueError(f"{function}(): argument '{of_input}' must have the shape (B, D), not {tuple(input.shape)}")
    size = input.shape[1]
    if weight.dim() != 2 or weight.shape[1] != size:
        shape = tuple(weight.shape)
        raise ValueError(f"{function}(): argument '{of_weight}' must have the shape ({rows}, {size}), not {shape}")


def check_ids(function: str, name: str, ids: Tensor, count: int, other: str, like: Tensor) -> None:
    """int32 or int64, on `like`'s device, in [0, count)."""
    _ids.integers(function, name, ids)
    _ids.same_device(function, name, ids, other, like)
    _ids.in_range(function, name, ids, count)


def check_shape(function: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{function}(): argument '{name}' must have the shape {shape}, not {tuple(value.shape)}")


def check_labels(function: str, name: str, labels: Tensor, num_true: int, batch: int | None = None) -> None:
    """(B, num_true), or (B,) with one label a row."""
    if labels.dim() == 1 and num_true == 1:
        wrong = batch is not None and labels.shape[0] != batch
    else:
        wrong = labels.dim() != 2 or labels.shape[1] != num_true or (batch is not None and labels.shape[0] != batch)
    if wrong:
        rows = "B" if batch is None else batch
        raise ValueError(
            f"{function}(): argument '{name}' must have the shape ({rows}, {num_true}), not {tuple(labels.shape)}"
        )


def check_positive(function: str, name: str, expected: Tensor) -> None:
    """Expected counts whose logarithm is finite, where they may be read."""
    if expected.numel() == 0 or not _ids.readable(expected):
        return
    if not bool((expected > 0).all()):
        at = (~(expected > 0)).nonzero()[0].tolist()
        value = expected[tuple(at)].item()
        raise ValueError(
            f"{function}(): argument '{name}': {name}{at} is {value}: a class that is never sampled has no logit; "
            "expected counts must be above 0"
        )
