"""Embedding lookup and pooled lookup: torch's functions, strict about ids and offsets."""

from __future__ import annotations

from torch import Tensor

from .. import _backends, reference
from . import _check, _ids

__all__ = ["embedding", "embedding_bag"]

_ROOM = _backends.Room("embedding")
_MODES = ("sum", "mean", "max")


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Looks up rows of a table: `output[..., :] = weight[input[...], :]`. As `torch.nn.functional.embedding`.

    Args:
        input: ids, int32 or int64, any shape.
        weight: Tensor[V, D], any dtype; gradients of float16 and bfloat16 tables are summed in float32.
        padding_idx: the row of this id (negative counts from V) is returned like any other but gets no gradient.
        max_norm: rows of `input`'s ids whose norm is larger are first scaled to this norm, **in place in `weight`**.
        norm_type: p of that norm.
        scale_grad_by_freq: divide each row's gradient by the number of times its id is in `input`. Served with
            `sparse=True` too, where torch refuses it.
        sparse: give `weight` a row-sparse gradient (`torch.sparse_coo`).
        backend: see `pykernels.explain`.

    Returns:
        Tensor[*input.shape, D] of `weight`'s dtype. Under autocast as given.

    Raises:
        TypeError: `input` or `weight` is not a Tensor, `padding_idx` is not an int.
        RuntimeError: `input` is not int32 or int64; `weight` is not 2-D, or not floating point with `max_norm` or
            `scale_grad_by_freq`; different devices.
        AssertionError: `padding_idx` is outside [-V, V).
        IndexError: an id is outside [0, V): position and value are named, before `max_norm` writes anything. Read on
            the CPU in eager mode; elsewhere the lookup raises (on CUDA, torch's device-side assertion).
        BackendError: the named backend cannot serve the call.
    """
    _check_table("embedding", input, weight, max_norm, scale_grad_by_freq)
    _check_padding("embedding", padding_idx, weight.shape[0])
    _ids.in_range("embedding", "input", input, weight.shape[0])
    _ROOM.resolve("embedding", backend, weight)
    return reference.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Looks up rows and reduces them bag by bag. As `torch.nn.functional.embedding_bag`.

    `output[b] = reduction over i of per_sample_weights[i] * weight[input[i]]`, i running over the positions of bag b
    whose id is not `padding_idx`. A bag without such a position gives 0 in every mode; "mean" divides by their number;
    of equal maxima the first gets the gradient; a NaN in a bag makes its maximum NaN.

    Args:
        input: ids, int32 or int64: Tensor[B, L], B bags of L, or Tensor[N], bags one after the other.
        weight: Tensor[V, D], floating point.
        offsets: int32 or int64 Tensor[B] (Tensor[B + 1] with `include_last_offset`), the position where each bag
            begins; only with, and required by, 1-D `input`.
        max_norm, norm_type, scale_grad_by_freq, sparse: as in `embedding`; the last two not with mode "max". (torch
            2.13's CPU code divides by the count of another id of the call; here each row has its own.)
        mode: "sum", "mean" or "max".
        per_sample_weights: Tensor of `input`'s shape and `weight`'s dtype, with gradient; for "sum" and, where torch
            refuses it, "mean".
        include_last_offset: the last element of `offsets` is the end of the last bag; ids beyond it are in no bag.
        padding_idx: this id (negative counts from V) is left out of every bag and gets no gradient.
        backend: see `pykernels.explain`.

    Returns:
        Tensor[B, D] of `weight`'s dtype; sums are taken in float32 (float64 for float64). Under autocast as given.

    Raises:
        TypeError: an argument is not a Tensor, `padding_idx` is not an int.
        ValueError: `input` is not 1-D or 2-D, `weight` not 2-D; `offsets` missing, not 1-D, or given with 2-D input;
            `per_sample_weights` not of `input`'s shape; unknown `mode`; "max" with `sparse` or `scale_grad_by_freq`.
        NotImplementedError: `per_sample_weights` with mode "max".
        RuntimeError: wrong dtypes; different devices; `padding_idx` outside [-V, V); empty `offsets` with
            `include_last_offset`; offsets that do not begin with 0, decrease, or exceed N (torch returns garbage for
            decreasing ones).
        IndexError: an id is outside [0, V), named with its position before anything is written. (torch: RuntimeError.)
            Values of ids and offsets are read on the CPU in eager mode only.
        BackendError: the named backend cannot serve the call.
    """
    name = "embedding_bag"
    _check_table(name, input, weight, max_norm, scale_grad_by_freq)
    _check.floating(name, "weight", weight)
    _check_bags(input, offsets, include_last_offset)
    _check_mode(mode, scale_grad_by_freq, sparse)
    _check_per_sample_weights(per_sample_weights, input, weight, mode)
    _check_padding(name, padding_idx, weight.shape[0])
    _ids.in_range(name, "input", input, weight.shape[0])
    _ROOM.resolve(name, backend, weight)
    return reference.embedding_bag(
        input,
        weight,
        offsets,
        max_norm,
        norm_type,
        scale_grad_by_freq,
        mode,
        sparse,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )


def _check_table(function: str, input: Tensor, weight: Tensor, max_norm: float | None, by_freq: bool) -> None:
    _check.tensor(function, "input", input)
    _check.tensor(function, "weight", weight)
    _ids.integers(function, "input", input)
    if weight.dim() != 2:
        error = ValueError if function == "embedding_bag" else RuntimeError
        raise error(f"{function}(): argument 'weight' must be 2-D, not {weight.dim()}-D")
    if max_norm is not None or by_freq:
        _check.floating(function, "weight", weight)
    _ids.same_device(function, "input", input, "weight", weight)


def _check_padding(function: str, padding_idx: int | None, count: int) -> None:
    if padding_idx is None:
        return
    if not isinstance(padding_idx, int):
        raise TypeError(f"{function}(): argument 'padding_idx' must be int or None, not {type(padding_idx).__name__}")
    if not -count <= padding_idx < count:
        error = AssertionError if function == "embedding" else RuntimeError
        raise error(f"{function}(): argument 'padding_idx' must be in [{-count}, {count}), not {padding_idx}")


def _check_bags(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
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
    if offsets.shape[0] == 0 or not _ids.readable(offsets):
        return
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


def _check_mode(mode: str, scale_grad_by_freq: bool, sparse: bool) -> None:
    if mode not in _MODES:
        raise ValueError(f"embedding_bag(): argument 'mode' must be one of {', '.join(_MODES)}, not {mode!r}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("embedding_bag(): argument 'scale_grad_by_freq' must be False with mode 'max', not True")
    if mode == "max" and sparse:
        raise ValueError("embedding_bag(): argument 'sparse' must be False with mode 'max', not True")


def _check_per_sample_weights(per_sample_weights: Tensor | None, input: Tensor, weight: Tensor, mode: str) -> None:
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
