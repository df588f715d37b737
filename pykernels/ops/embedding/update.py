"""Fused row updates: the backward of a lookup or of bags and an optimizer's step on the rows they touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._backends import is_compiling
from ...reference.embedding.update import row_gradients
from .. import _check, _ids
from .._library import as_seed, define
from .._pending import Positions, Rule
from ._checks import (
    before,
    check_bags,
    check_mode,
    check_offsets,
    check_padding,
    check_per_sample_weights,
    check_table,
    report_code,
)
from ._functions import (
    ROOM,
    embedding_backward_sparse,
    embedding_bag_backward_sparse,
    embedding_bag_forward,
)

__all__ = ["embedding_adagrad_", "embedding_adam_", "embedding_rowwise_adagrad_", "embedding_sgd_"]

# One operator serves every rule. With g the gradient of a row as `embedding_bag_backward_sparse` gives it, but in
# float32 (float64 for a float64 table) and never rounded, and w, s, m, v the row and its state in that type:
#
#     g = g + weight_decay * w
#     "sgd"              w -= lr * g
#     "adagrad"          s += g^2;                 w -= lr * g / (sqrt(s) + eps)          state s (V, D)
#     "rowwise_adagrad"  s += mean over D of g^2;  w -= lr * g / (sqrt(s) + eps)          state s (V,)
#     "adam"             m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2         state m, second_state v (V, D)
#                        w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
#
# `pooling` is "none" (plain lookup; offsets and per_sample_weights None), "sum", "mean" or "max" (`maxima` as
# embedding_bag_forward gave them). padding_idx: -1 for none. A row is touched when its id is at a position that is in a
# bag and is not the padding; no other row, nor its state, is read or written. States are contiguous, float32 (float64
# for a float64 table); rows of `weight` have unit inner stride and any outer one. With `seed` (one int64, bfloat16
# tables only) w is rounded stochastically: the upper 16 bits of (bits of the float32 + (word >> 16)), word the Philox
# word (pykernels/reference/_random.py) of the element's offset id * D + column; infinity and NaN as always. Invalid ids
# and offsets: as in the forward operators, reported as `what`.
embedding_update = define(
    ROOM,
    "embedding_update(Tensor(a!) weight, Tensor(b!)? state, Tensor(c!)? second_state, Tensor ids, Tensor dy, "
    "Tensor? offsets, Tensor? per_sample_weights, Tensor? maxima, str pooling, bool include_last_offset, "
    "int padding_idx, bool by_frequency, str rule, float lr, float weight_decay, float eps, float beta1, float beta2, "
    "SymInt step, Tensor? seed, int what) -> ()",
    lambda *arguments: None,
)

_CODES = {name: report_code(f"embedding_{name}_", "indices") for name in ("sgd", "adagrad", "rowwise_adagrad", "adam")}


def _update(
    function: str,
    weight: Tensor,
    states: tuple[tuple[str, Tensor], ...],
    at: Positions,
    rule: Rule,
    seed: Tensor | None,
    bounds_check: str,
    backend: str | None,
) -> Tensor:
    _check_positions(function, weight, at)
    for name, state in states:
        _check_state(function, name, state, weight, rule)
    _check_numbers(function, rule)
    backend = ROOM.resolve(function, backend, weight, *_features(weight))
    what = before(function, bounds_check, _CODES[rule.name])
    if what and backend != "cpu":  # the native kernels look for themselves before they write
        check_offsets(function, at.ids, at.offsets)
        _ids.in_range(function, "indices", at.ids, weight.shape[0])
    with torch.no_grad():
        _check.writable(function, weight, "weight")
        _dispatch(backend, weight, tuple(state for _, state in states), at, rule, seed, what)
    _ids.after(bounds_check)
    return weight


def apply_rule(
    weight: Tensor, states: tuple[Tensor, ...], noted: list[Positions], rule: Rule, seed: Tensor | None
) -> None:
    """An optimizer's step on what the backward of all lookups of a table noted, on the backend of `auto`.

    One lookup is consumed as it is. Several touch some rows together, which must be stepped once by the sum of their
    gradients: each is reduced to the rows that it touches (as a sparse gradient is), and these are consumed.
    """
    function = f"embedding_{rule.name}_"
    backend = ROOM.resolve(function, None, weight, *_features(weight))
    what = before(function, "error", _CODES[rule.name])
    at = noted[0]
    if len(noted) > 1:
        rows = [_touched_rows(backend, weight, one) for one in noted]
        at = Positions(torch.cat([ids for ids, _ in rows]), torch.cat([values for _, values in rows]))
    _dispatch(backend, weight, states, at, rule, seed, what)


def _features(weight: Tensor) -> tuple[str, ...]:
    apart = weight.shape[1] > 1 and weight.stride(1) != 1
    return ("a table whose columns are apart in memory",) if apart else ()


def _touched_rows(backend: str, weight: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        ids, values = row_gradients(
            weight,
            at.ids,
            at.dy,
            offsets=at.offsets,
            mode=at.mode,
            per_sample_weights=at.per_sample_weights,
            include_last_offset=at.include_last_offset,
            padding_idx=at.padding_idx,
            scale_grad_by_freq=at.by_frequency,
        )
        return ids.long(), values.to(weight.dtype)
    rows, padding = weight.shape[0], -1 if at.padding_idx is None else at.padding_idx % weight.shape[0]
    if at.mode is None:
        found = embedding_backward_sparse[backend](at.dy, at.ids, rows, padding, at.by_frequency)
    else:
        found = embedding_bag_backward_sparse[backend](
            at.dy,
            at.ids,
            at.offsets,
            at.per_sample_weights,
            at.maxima,
            rows,
            at.mode,
            at.include_last_offset,
            padding,
            at.by_frequency,
        )
    return found[0][0], found[1]


def _dispatch(
    backend: str, weight: Tensor, states: tuple[Tensor, ...], at: Positions, rule: Rule, seed: Tensor | None, what: int
) -> None:
    if backend == "reference":
        _by_reference(weight, states, at, rule, seed)
        return
    padding = -1 if at.padding_idx is None else at.padding_idx % weight.shape[0]
    maxima = at.maxima
    if at.mode == "max" and maxima is None:
        _, maxima = embedding_bag_forward[backend](
            at.ids, weight, at.offsets, None, "max", at.include_last_offset, padding, True, what
        )
    embedding_update[backend](
        weight,
        states[0] if states else None,
        states[1] if len(states) > 1 else None,
        at.ids,
        at.dy,
        at.offsets,
        at.per_sample_weights,
        maxima,
        at.mode or "none",
        at.include_last_offset,
        padding,
        at.by_frequency,
        rule.name,
        rule.lr,
        rule.weight_decay,
        rule.eps,
        *rule.betas,
        rule.step,
        seed,
        what,
    )
    if not is_compiling():
        torch.autograd.graph.increment_version((weight, *states))


def _by_reference(weight: Tensor, states: tuple[Tensor, ...], at: Positions, rule: Rule, seed: Tensor | None) -> None:
    function = getattr(reference, f"embedding_{rule.name}_")
    numbers: dict[str, Any] = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    if rule.name != "sgd":
        numbers["eps"] = rule.eps
    if rule.name == "adam":
        numbers.update(betas=rule.betas, step=rule.step)
    function(
        weight,
        *states,
        at.ids,
        at.dy,
        offsets=at.offsets,
        mode=at.mode,
        per_sample_weights=at.per_sample_weights,
        include_last_offset=at.include_last_offset,
        padding_idx=at.padding_idx,
        scale_grad_by_freq=at.by_frequency,
        stochastic_rounding=seed is not None,
        seed=seed,
        **numbers,
    )


def _check_positions(function: str, weight: Tensor, at: Positions) -> None:
    check_table(function, at.ids, weight, None, True, "indices")
    if at.mode is None:
        for name, value in (("offsets", at.offsets), ("per_sample_weights", at.per_sample_weights)):
            if value is not None:
                raise ValueError(f"{function}(): argument '{name}' must be None with mode None (plain lookup)")
        expected = (*at.ids.shape, weight.shape[1])
    else:
        check_mode(function, at.mode, at.by_frequency, False)
        check_bags(function, at.ids, at.offsets, at.include_last_offset, "indices")
        check_per_sample_weights(function, at.per_sample_weights, at.ids, weight, at.mode, "indices")
        bags = at.ids.shape[0] if at.offsets is None else at.offsets.shape[0] - int(at.include_last_offset)
        expected = (bags, weight.shape[1])
    if at.padding_idx is not None:
        check_padding(function, at.padding_idx, weight.shape[0])
    _check.tensor(function, "grad_output", at.dy)
    if at.dy.shape != expected:
        raise ValueError(
            f"{function}(): argument 'grad_output' must have the shape {expected}, not {tuple(at.dy.shape)}"
        )
    _check.same(function, "grad_output", at.dy, "weight", weight)


def _check_state(function: str, name: str, state: Tensor, weight: Tensor, rule: Rule) -> None:
    _check.tensor(function, name, state)
    shape = weight.shape[:1] if rule.name == "rowwise_adagrad" else weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    argument = f"{function}(): argument '{name}' must"
    if state.shape != shape:
        raise ValueError(f"{argument} have the shape {tuple(shape)}, not {tuple(state.shape)}")
    if state.dtype != dtype:
        raise ValueError(f"{argument} be {dtype} for a table of {weight.dtype}, not {state.dtype}")
    if not state.is_contiguous():
        raise ValueError(f"{argument} be contiguous")
    _ids.same_device(function, name, state, "weight", weight)


def _check_numbers(function: str, rule: Rule) -> None:
    for name, value in (("lr", rule.lr), ("weight_decay", rule.weight_decay), ("eps", rule.eps)):
        if _check.number(function, name, value) < 0:
            raise ValueError(f"{function}(): argument '{name}' must not be negative, not {value}")
    for value in rule.betas:
        if not 0 <= value < 1:
            raise ValueError(f"{function}(): argument 'betas' must be two numbers in [0, 1), not {rule.betas}")
    if rule.step < 1:
        raise ValueError(f"{function}(): argument 'step' must be at least 1, not {rule.step}")


def _rounding_seed(function: str, weight: Tensor, stochastic: bool, seed: int | Tensor | None) -> Tensor | None:
    if not stochastic:
        if seed is not None:
            raise ValueError(f"{function}(): argument 'seed' must be None without stochastic_rounding")
        return None
    _check.tensor(function, "weight", weight)
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"{function}(): argument 'stochastic_rounding' is for bfloat16 tables, not {weight.dtype}")
    return as_seed(seed, weight, function)


def embedding_sgd_(
    weight: Tensor,
    indices: Tensor,
    grad_output: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    offsets: Tensor | None = None,
    mode: str | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    stochastic_rounding: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """SGD on the touched rows: `g = gradient + weight_decay * w; w -= lr * g`. In place; returns `weight`.

    The gradient of a row is the sum over its positions: of `grad_output` at that position for a plain lookup, of its
    bag's row for bags ("mean": divided by the bag's size; "max": in the columns that the position won). It is summed
    first, in float32 (float64 for a float64 table) and in a fixed order, then the row is updated once: the step that
    torch.optim.SGD takes with the whole gradient, on the rows it touches. No gradient is stored: nothing of size V x D
    or N x D is allocated. For half-precision tables the arithmetic is float32, rounded once to the row.

    Args:
        weight: Tensor[V, D], float32, float16, bfloat16 or float64. May be a leaf that requires grad.
        indices: ids, int32 or int64, as given to the lookup.
        grad_output: gradient of the lookup's output, of `weight`'s dtype: Tensor[*indices.shape, D], or Tensor[B, D].
        lr, weight_decay: numbers, not negative.
        mode: None for `embedding`; "sum", "mean" or "max" for `embedding_bag`. For "max" the maxima are found again, so
            `weight` must not have changed since.
        offsets, per_sample_weights, include_last_offset, padding_idx, scale_grad_by_freq: as in the lookup.
        stochastic_rounding: bfloat16 tables only: round up or down with the probability that makes the mean exact, so
            that steps smaller than half a unit in the last place are not lost.
        seed: of the rounding, int or one int64; default drawn from torch's generator. The same bits on every backend.
        bounds_check: as in `embedding`; nothing is written for an invalid id, on the CPU nothing at all.
        backend: see `pykernels.explain`.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as `embedding` and `embedding_bag`.
        ValueError: wrong shapes; `offsets` or `per_sample_weights` with mode None; negative numbers; stochastic
        rounding of
            another dtype; as `embedding_bag`.
        IndexError: an id is outside [0, V), named with its position.
        BackendError: the named backend cannot serve the call.
    """
    return _update(
        "embedding_sgd_",
        weight,
        (),
        Positions(
            indices,
            grad_output,
            offsets,
            per_sample_weights,
            None,
            mode,
            include_last_offset,
            padding_idx,
            scale_grad_by_freq,
        ),
        Rule("sgd", lr, weight_decay),
        _rounding_seed("embedding_sgd_", weight, stochastic_rounding, seed),
        bounds_check,
        backend,
    )


def embedding_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    indices: Tensor,
    grad_output: Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    offsets: Tensor | None = None,
    mode: str | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    stochastic_rounding: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Adagrad on the touched rows: `s += g^2; w -= lr * g / (sqrt(s) + eps)`, g as in `embedding_sgd_`.

    The step of torch.optim.Adagrad (Duchi et al., 2011) on the rows that the gradient touches. `state_sum` s: Tensor[V,
    D], float32 (float64 for a float64 table), contiguous, updated in place. Other arguments, errors: `embedding_sgd_`.
    """
    return _update(
        "embedding_adagrad_",
        weight,
        (("state_sum", state_sum),),
        Positions(
            indices,
            grad_output,
            offsets,
            per_sample_weights,
            None,
            mode,
            include_last_offset,
            padding_idx,
            scale_grad_by_freq,
        ),
        Rule("adagrad", lr, weight_decay, eps),
        _rounding_seed("embedding_adagrad_", weight, stochastic_rounding, seed),
        bounds_check,
        backend,
    )


def embedding_rowwise_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    indices: Tensor,
    grad_output: Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    offsets: Tensor | None = None,
    mode: str | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    stochastic_rounding: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Adagrad with one state a row: `s += mean over D of g^2; w -= lr * g / (sqrt(s) + eps)`, g as in `embedding_sgd_`.

    g^2 is of the summed gradient of the row (FBGEMM's EXACT_ROWWISE_ADAGRAD), weight decay included. `state_sum` s:
    Tensor[V], float32 (float64 for a float64 table), contiguous, updated in place. Others: `embedding_sgd_`.
    """
    return _update(
        "embedding_rowwise_adagrad_",
        weight,
        (("state_sum", state_sum),),
        Positions(
            indices,
            grad_output,
            offsets,
            per_sample_weights,
            None,
            mode,
            include_last_offset,
            padding_idx,
            scale_grad_by_freq,
        ),
        Rule("rowwise_adagrad", lr, weight_decay, eps),
        _rounding_seed("embedding_rowwise_adagrad_", weight, stochastic_rounding, seed),
        bounds_check,
        backend,
    )


def embedding_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    indices: Tensor,
    grad_output: Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    offsets: Tensor | None = None,
    mode: str | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    stochastic_rounding: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Lazy Adam: the step of torch.optim.Adam on the touched rows; rows that are not touched keep their moments.

    `m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2`
    `w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)`, g as in `embedding_sgd_`.

    `exp_avg` m, `exp_avg_sq` v: Tensor[V, D], float32 (float64 for a float64 table), contiguous, updated in place.
    `step`: number of this step, from 1. (torch.optim.SparseAdam is the same but for eps, which it adds to the
    uncorrected root.)
    Others: `embedding_sgd_`.
    """
    return _update(
        "embedding_adam_",
        weight,
        (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)),
        Positions(
            indices,
            grad_output,
            offsets,
            per_sample_weights,
            None,
            mode,
            include_last_offset,
            padding_idx,
            scale_grad_by_freq,
        ),
        Rule("adam", lr, weight_decay, eps, betas, step),
        _rounding_seed("embedding_adam_", weight, stochastic_rounding, seed),
        bounds_check,
        backend,
    )
