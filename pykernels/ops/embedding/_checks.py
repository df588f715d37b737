"""Checks of the embedding room's arguments: torch's exception classes, and which argument is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _ids

MODES = ("sum", "mean", "max")
_INTEGERS = (torch.int64, torch.int32)


def check_table(function: str, input: Tensor, weight: Tensor, max_norm: float | None, by_freq: bool) -> None:
    plain = max_norm is None and not by_freq and isinstance(input, Tensor) and isinstance(weight, Tensor)
    if plain and input.dtype in _INTEGERS and weight.dim() == 2 and input.is_cpu and weight.is_cpu:
        return  # what nearly every call is
    _check.tensor(function, "input", input)
    _check.tensor(function, "weight", weight)
    _ids.integers(function, "input", input)
    if weight.dim() != 2:
        error = ValueError if function == "embedding_bag" else RuntimeError
        raise error(f"{function}(): argument 'weight' must be 2-D, not {weight.dim()}-D")
    if max_norm is not None or by_freq:
        _check.floating(function, "weight", weight)
    _ids.same_device(function, "input", input, "weight", weight)


def check_padding(function: str, padding_idx: int, count: int) -> None:
    if not isinstance(padding_idx, int):
        raise TypeError(f"{function}(): argument 'padding_idx' must be int or None, not {type(padding_idx).__name__}")
    if not -count <= padding_idx < count:
        error = AssertionError if function == "embedding" else RuntimeError
        raise error(f"{function}(): argument 'padding_idx' must be in [{-count}, {count}), not {padding_idx}")


def check_bags(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
    name = "embedding_bag(): argument 'offsets'"
    if input.dim() not in (1, 2):
        raise ValueError(f"embedding_bag(): argument 'input' must be 1-D or 2-D, not {input.dim()}-D")
    if input.dim() == 2:
        if offsets is not None:
            kind = type(offsets).__name__
            raise ValueError(f"{name} must be None with 2-D input, whose rows are the bags, not {kind}")
        return
    if offsets is None:
        raise ValueError(f"{name} must be a 1-D Tensor with 1-D input, not None")
    _check.tensor("embedding_bag", "offsets", offsets)
    if offsets.dim() != 1:
        raise ValueError(f"{name} must be 1-D, not {offsets.dim()}-D")
    _ids.integers("embedding_bag", "offsets", offsets)
    _ids.same_device("embedding_bag", "offsets", offsets, "input", input)
    if include_last_offset and offsets.shape[0] == 0:
        raise RuntimeError(f"{name} must hold at least one element with include_last_offset, not 0")


def check_offsets(input: Tensor, offsets: Tensor | None) -> None:
    """Values of the offsets, where they may be read."""
    if offsets is None or offsets.shape[0] == 0 or not _ids.readable(offsets):
        return
    name = "embedding_bag(): argument 'offsets'"
    if offsets[0].item() != 0:
        raise RuntimeError(f"{name}: offsets[0] must be 0, not {offsets[0].item()}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if falls.numel():
        at = int(falls[0].item())
        pair = f"offsets[{at}] is {offsets[at].item()} and offsets[{at + 1}] is {offsets[at + 1].item()}"
        raise RuntimeError(f"{name} must not decrease, but {pair}")
    if offsets[-1].item() > input.shape[0]:
        last = offsets[-1].item()
        raise RuntimeError(f"{name} must not exceed the length {input.shape[0]} of input, but offsets[-1] is {last}")


def check_mode(mode: str, scale_grad_by_freq: bool, sparse: bool) -> None:
    if mode not in MODES:
        raise ValueError(f"embedding_bag(): argument 'mode' must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("embedding_bag(): argument 'scale_grad_by_freq' must be False with mode 'max', not True")
    if mode == "max" and sparse:
        raise ValueError("embedding_bag(): argument 'sparse' must be False with mode 'max', not True")


def check_per_sample_weights(per_sample_weights: Tensor | None, input: Tensor, weight: Tensor, mode: str) -> None:
    if per_sample_weights is None:
        return
    _check.tensor("embedding_bag", "per_sample_weights", per_sample_weights)
    name = "embedding_bag(): argument 'per_sample_weights'"
    if per_sample_weights.shape != input.shape:
        shapes = f"the shape {tuple(input.shape)} of input, not {tuple(per_sample_weights.shape)}"
        raise ValueError(f"{name} must have {shapes}")
    if mode == "max":
        raise NotImplementedError(f"{name} must be None with mode 'max'")
    _check.same("embedding_bag", "per_sample_weights", per_sample_weights, "weight", weight)
