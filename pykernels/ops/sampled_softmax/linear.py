"""Cross entropy of a linear layer over all classes, without its logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...reference import sampled_softmax as reference
from ...reference.sampled_softmax.linear import reduce_weighted
from .. import _autocast, _check, _ids
from .._function import apply
from ._checks import check_reduction
from ._functions import ROOM, LinearRows

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`. As
    `torch.nn.functional.linear_cross_entropy` of torch 2.13, here for every supported torch.

    With z = W x_i + b, L = logsumexp(z) and class weights c (1 without):
    `loss[i] = (1 - s) c_y (L - z_y) + s / C sum_j c_j (L - z_j) + z_loss c_y L^2`, s = `label_smoothing`.
    The kernels take the classes in blocks and keep a running maximum and sum: nothing of size N x C exists, forward or
    backward; two numbers a row are kept for the backward pass, which computes the logits again.

    Args:
        input: Tensor[N, D] or Tensor[D], floating point.
        linear_weight: Tensor[C, D] of `input`'s dtype, or Tensor[C, d1, ..., D] (served by the reference).
        target: class ids, Tensor[N], int64 (or int32); or what torch takes beside: probabilities, a K-dimensional
            target (both served by the reference).
        linear_bias: Tensor[C] of `input`'s dtype.
        weight: Tensor[C] of `input`'s dtype, factors of the classes; no gradient.
        reduction: "none" (Tensor[N]), "mean" (divided by the sum of the targets' class weights) or "sum".
        ignore_index: rows with this target have loss 0, no gradient and no part in the mean. None: -100.
        label_smoothing: in [0, 1].
        options: torch's `LinearCrossEntropyOptions`. Accepted and not needed: the logits never exist here.
        z_loss: factor of L^2, which keeps the logits from drifting (Chowdhery et al., "PaLM", 2022).
        bounds_check: of `target`, as in `negative_sampling_loss`; on a GPU a wrong target counts as `ignore_index`.
        backend: see `pykernels.explain`.

    Returns:
        The loss, computed in float32 (float64 for float64) and rounded to `input`'s dtype. Under autocast as given to
        torch's losses: cast to float32.

    Raises:
        TypeError: an argument is not a Tensor.
        NotImplementedError: `input` or `linear_weight` is not floating point.
        RuntimeError: dtypes or devices differ; wrong dimensions; `ignore_index` given with targets that are
            probabilities (as torch).
        ValueError: sizes of `target` or `weight` that do not fit; unknown `reduction`; `label_smoothing` outside
            [0, 1].
        IndexError: a target is neither `ignore_index` nor in [0, C), named with its position; see `bounds_check`.
        BackendError: the named backend cannot serve the call.
    """
    name = "linear_cross_entropy"
    _ids.before(name, bounds_check)
    for key, value in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        _check.tensor(name, key, value)
    for key, value in (("linear_bias", linear_bias), ("weight", weight)):
        if value is not None:
            _check.tensor(name, key, value)
    floats = (input, linear_weight, linear_bias, weight)
    input, linear_weight, linear_bias, weight = _autocast.float32(floats, input.device)
    _check_sizes(name, input, linear_weight, target, linear_bias, weight)
    check_reduction(name, reduction)
    label_smoothing = _check.number(name, "label_smoothing", label_smoothing)
    z_loss = _check.number(name, "z_loss", z_loss)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}(): argument 'label_smoothing' must be in [0, 1], not {label_smoothing}")
    plain = input.dim() == 2 and linear_weight.dim() == 2 and not target.is_floating_point()
    if target.is_floating_point() and ignore_index is not None:
        raise RuntimeError(f"{name}(): argument 'ignore_index' must be None with targets that are probabilities")
    ignored = -100 if ignore_index is None else ignore_index
    if not target.is_floating_point():
        _check_target(name, target, linear_weight.shape[0], ignored)
    features = () if plain else ("a target of probabilities, an unbatched input or a K-dimensional loss",)
    backend = ROOM.resolve(name, backend, input, *features)
    if not target.is_floating_point():
        classes = linear_weight.shape[0]
        target = _ids.checked(backend, bounds_check, name, "target", target, classes, fill=ignored, ignored=True)
    if backend == "reference":
        return reference.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignored if not target.is_floating_point() else None,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
    factors = None if weight is None else weight.detach()
    arguments = (input, linear_weight, linear_bias, target, factors, ignored, label_smoothing, z_loss)
    loss = apply(LinearRows, backend, False, None, *arguments)
    _ids.after(bounds_check)
    return reduce_weighted(loss, target, factors, ignored, reduction, input.dtype)


def checked_target(
    function: str, name: str, input: Tensor, target: Tensor, classes: int, bounds_check: str, backend: str | None
) -> Tensor:
    """For modules that make several targets of one: wrong ones are looked at here, and become -100."""
    _ids.before(function, bounds_check)
    chosen = ROOM.resolve("linear_cross_entropy", backend, input)
    return _ids.checked(chosen, bounds_check, function, name, target, classes, fill=-100)


def _check_sizes(
    name: str, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
) -> None:
    _check.floating(name, "input", input)
    _check.floating(name, "linear_weight", linear_weight)
    _check.same(name, "linear_weight", linear_weight, "input", input)
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{name}(): argument 'input' must be 1-D or 2-D, not {input.dim()}-D")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"{name}(): argument 'linear_weight' must be at least 2-D, not {linear_weight.dim()}-D")
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(f"{name}(): argument 'input' must be 2-D with a linear_weight of more than two dimensions")
    if linear_weight.shape[-1] != input.shape[-1]:
        sizes = f"{input.shape[-1]} as input has, not {linear_weight.shape[-1]}"
        raise RuntimeError(f"{name}(): argument 'linear_weight' must have a last dimension of {sizes}")
    classes, inner = linear_weight.shape[0], tuple(linear_weight.shape[1:-1])
    if linear_bias is not None:
        _check.same(name, "linear_bias", linear_bias, "input", input)
        if tuple(linear_bias.shape) != (classes, *inner):
            shape = tuple(linear_bias.shape)
            raise RuntimeError(f"{name}(): argument 'linear_bias' must have the shape {(classes, *inner)}, not {shape}")
    if weight is not None:
        _check.same(name, "weight", weight, "input", input)
        if tuple(weight.shape) != (classes,):
            raise ValueError(f"{name}(): argument 'weight' must have the shape ({classes},), not {tuple(weight.shape)}")
    batch = tuple(input.shape[:-1])
    wanted = (*batch, classes, *inner) if target.is_floating_point() else (*batch, *inner)
    if tuple(target.shape) != wanted:
        raise ValueError(f"{name}(): argument 'target' must have the shape {wanted}, not {tuple(target.shape)}")
    _ids.same_device(name, "target", target, "input", input)


def _check_target(name: str, target: Tensor, classes: int, ignored: int) -> None:
    _ids.integers(name, "target", target)
    if target.numel() == 0 or not _ids.readable(target):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignored)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        where, value = f"target{at}" if at else "target", target[tuple(at)].item()
        raise IndexError(
            f"{name}(): argument 'target': {where} is {value}, which is neither ignore_index = {ignored} nor in "
            f"[0, {classes})"
        )
