"""Losses that look at a sample of the classes instead of all of them."""

from __future__ import annotations

from torch import Tensor

from .. import _backends, reference
from . import _autocast, _check, _ids

__all__ = ["negative_sampling_loss"]

_ROOM = _backends.Room("sampled_softmax")
_REDUCTIONS = ("none", "mean", "sum")


def negative_sampling_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    negatives: Tensor,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """word2vec's negative sampling: tell the true class from K sampled ones, each by a logistic regression.

    `loss[i] = -log sigmoid(x_i . w[target_i]) - sum_k log sigmoid(-x_i . w[negatives_ik])`, x = `input`, w = `weight`.
    A negative that equals the target counts like any other. No correction for the sampling probabilities.
    Source: Mikolov et al., "Distributed representations of words and phrases and their compositionality" (2013).

    Args:
        input: Tensor[B, D], floating point.
        weight: Tensor[V, D] of `input`'s dtype, one row per class.
        target: Tensor[B], int32 or int64.
        negatives: Tensor[B, K], or Tensor[K] shared by all rows; int32 or int64.
        reduction: "none" (Tensor[B]), "mean" over B (of no rows: NaN, as torch's losses give) or "sum".
        backend: see `pykernels.explain`.

    Returns:
        The loss, computed in float32 (float64 for float64) and rounded to `input`'s dtype. Under autocast `input` and
        `weight` are cast to float32, as torch casts its losses.

    Raises:
        TypeError: an argument is not a Tensor.
        NotImplementedError: `input` or `weight` is not floating point.
        RuntimeError: `target` or `negatives` is not int32 or int64; `input` and `weight` differ in dtype; different
            devices.
        ValueError: wrong shapes; unknown `reduction`.
        IndexError: a target or negative is outside [0, V), named with its position. Read on the CPU in eager mode;
            elsewhere the lookup raises (on CUDA, torch's device-side assertion).
        BackendError: the named backend cannot serve the call.
    """
    name = "negative_sampling_loss"
    for key, value in (("input", input), ("weight", weight), ("target", target), ("negatives", negatives)):
        _check.tensor(name, key, value)
    _check.floating(name, "input", input)
    _check.floating(name, "weight", weight)
    input, weight = _autocast.float32((input, weight), input.device)
    _check.same(name, "weight", weight, "input", input)
    _check_shapes(input, weight, target, negatives)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}(): argument 'reduction' must be one of {', '.join(_REDUCTIONS)}, not {reduction!r}")
    for key, ids in (("target", target), ("negatives", negatives)):
        _ids.integers(name, key, ids)
        _ids.same_device(name, key, ids, "input", input)
        _ids.in_range(name, key, ids, weight.shape[0])
    _ROOM.resolve(name, backend, input)
    return reference.negative_sampling_loss(input, weight, target, negatives, reduction)


def _check_shapes(input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor) -> None:
    name = "negative_sampling_loss(): argument"
    if input.dim() != 2:
        raise ValueError(f"{name} 'input' must have the shape (B, D), not {tuple(input.shape)}")
    batch, size = input.shape
    if weight.dim() != 2 or weight.shape[1] != size:
        raise ValueError(f"{name} 'weight' must have the shape (V, {size}), not {tuple(weight.shape)}")
    if target.shape != (batch,):
        raise ValueError(f"{name} 'target' must have the shape ({batch},), not {tuple(target.shape)}")
    if negatives.dim() != 1 and (negatives.dim() != 2 or negatives.shape[0] != batch):
        raise ValueError(f"{name} 'negatives' must have the shape ({batch}, K) or (K,), not {tuple(negatives.shape)}")
