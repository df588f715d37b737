"""Checks of the embedding room's arguments: torch's exception classes, and which argument is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _errors
from .. import _check, _ids

MODES = ("sum", "mean", "max")
_INTEGERS = (torch.int64, torch.int32)


report_code = _errors.code


def before(function: str, bounds_check: str, code: int) -> int:
    """Raises what kernels have reported by now; returns the code that this call's kernels report with, 0 for none."""
    _ids.before(function, bounds_check)
    return 0 if bounds_check == "none" else code


def check_table(
    function: str, input: Tensor, weight: Tensor, max_norm: float | None, by_freq: bool, name: str = "input"
) -> None:
    plain = max_norm is None and not by_freq and isinstance(input, Tensor) and isinstance(weight, Tensor)
    if plain and input.dtype in _INTEGERS and weight.dim() == 2 and input.is_cpu and weight.is_cpu:
        return  # what nearly every call is
    _check.tensor(function, name, input)
    _check.tensor(function, "weight", weight)
    _ids.integers(function, name, input)
    if weight.dim() != 2:
        error = RuntimeError if function == "embedding" else ValueError
        raise error(f"{function}(): argument 'weight' must be 2-D, not {weight.dim()}-D")
    if max_norm is not None or by_freq:
        _check.floating(function, "weight", weight)
    _ids.same_device(function, name, input, "weight", weight)


def check_padding(function: str, padding_idx: int, count: int) -> None:
    if not isinstance(padding_idx, int):
        raise TypeError(f"{function}(): argument 'padding_idx' must be int or None, not {type(padding_idx).__name__}")
    if not -count <= padding_idx < count:
        error = AssertionError if function == "embedding" else RuntimeError
        raise error(f"{function}(): argument 'padding_idx' must be in [{-count}, {count}), not {padding_idx}")


def check_bags(
    function: str, input: Tensor, offsets: Tensor | None, include_last_offset: bool, name: str = "input"
) -> None:
    argument = f"{function}(): argument 'offsets'"
    if input.dim() not in (1, 2):
        raise ValueError(f"{function}(): argument '{name}' must be 1-D or 2-D, not {input.dim()}-D")
    if input.dim() == 2:
        if offsets is not None:
            kind = type(offsets).__name__
            raise ValueError(f"{argument} must be None with 2-D {name}, whose rows are the bags, not {kind}")
        return
    if offsets is None:
        raise ValueError(f"{argument} must be a 1-D Tensor with 1-D {name}, not None")
    _check.tensor(function, "offsets", offsets)
    if offsets.dim() != 1:
        raise ValueError(f"{argument} must be 1-D, not {offsets.dim()}-D")
    _ids.integers(function, "offsets", offsets)
    _ids.same_device(function, "offsets", offsets, name, input)
    if include_last_offset and offsets.shape[0] == 0:
        raise RuntimeError(f"{argument} must hold at least one element with include_last_offset, not 0")


def offsets_for_reference(function: str, input: Tensor, offsets: Tensor | None) -> Tensor | None:
    """The offsets; in graphs on the CPU looked at on the way: the reference itself would take wrong ones silently."""
    if offsets is None or offsets.shape[0] == 0:
        return offsets
    return _ids.checked("reference", "error", function, "offsets", offsets, input.shape[0], "offsets")


def check_offsets(function: str, input: Tensor, offsets: Tensor | None) -> None:
    """Values of the offsets, where they may be read. Where torch raises, its RuntimeError."""
    if offsets is None or offsets.shape[0] == 0 or not _ids.readable(offsets):
        return
    name = f"{function}(): argument 'offsets'"
    if offsets[0].item() != 0:
        raise RuntimeError(f"{name}: offsets[0] must be 0, not {offsets[0].item()}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if falls.numel():
        at = int(falls[0].item())
        pair = f"offsets[{at}] is {offsets[at].item()} and offsets[{at + 1}] is {offsets[at + 1].item()}"
        raise ValueError(f"{name} must not decrease, but {pair}")
    if offsets[-1].item() > input.shape[0]:
        last = offsets[-1].item()
        raise RuntimeError(f"{name} must not exceed the length {input.shape[0]} of the ids, but offsets[-1] is {last}")


def check_mode(function: str, mode: str, scale_grad_by_freq: bool, sparse: bool) -> None:
    if mode not in MODES:
        raise ValueError(f"{function}(): argument 'mode' must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError(f"{function}(): argument 'scale_grad_by_freq' must be False with mode 'max', not True")
    if mode == "max" and sparse:
        raise ValueError(f"{function}(): argument 'sparse' must be False with mode 'max', not True")


def check_per_sample_weights(
    function: str, per_sample_weights: Tensor | None, input: Tensor, weight: Tensor, mode: str, name: str = "input"
) -> None:
    if per_sample_weights is None:
        return
    _check.tensor(function, "per_sample_weights", per_sample_weights)
    argument = f"{function}(): argument 'per_sample_weights'"
    if per_sample_weights.shape != input.shape:
        shapes = f"the shape {tuple(input.shape)} of {name}, not {tuple(per_sample_weights.shape)}"
        raise ValueError(f"{argument} must have {shapes}")
    if mode == "max":
        raise NotImplementedError(f"{argument} must be None with mode 'max'")
    _check.same(function, "per_sample_weights", per_sample_weights, "weight", weight)
