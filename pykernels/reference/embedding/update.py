"""Optimizer steps on the rows of a table that a lookup touched, in plain torch.

The gradient of a row is what autograd of `embedding` or `embedding_bag` gives it: the sum over its positions, in
float32 for a half-precision table (float64 for float64), never rounded to the table's dtype. A row is touched when its
id is at a position that is in a bag and is not `padding_idx`; nothing is read or written of any other row, nor of its
state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._random import philox_words, seed_on
from .lookup import bag_of_each, embedding, embedding_bag

__all__ = ["embedding_adagrad_", "embedding_adam_", "embedding_rowwise_adagrad_", "embedding_sgd_"]


def row_gradients(
    weight: Tensor,
    indices: Tensor,
    grad_output: Tensor,
    *,
    offsets: Tensor | None = None,
    mode: str | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> tuple[Tensor, Tensor]:
    """The touched rows: ids (U,), ascending, and their gradients (U, D) in float32 (float64 for a float64 table).

    For mode "max" the maxima are those of `weight` as it is now.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat = indices.reshape(-1)
    touched = torch.ones_like(flat, dtype=torch.bool)
    if offsets is not None and include_last_offset:
        bag, bags = bag_of_each(flat, offsets, True)
        touched = bag < bags
    padding = None
    if padding_idx is not None:
        touched &= flat != padding_idx % weight.shape[0]
    ids, places = flat.unique(return_inverse=True)
    places = places.reshape(indices.shape)
    if padding_idx is not None and (at := (ids == padding_idx % weight.shape[0]).nonzero()).numel():
        padding = int(at)
    scale = None if per_sample_weights is None else per_sample_weights.detach().to(wide)
    with torch.enable_grad():
        rows = weight.detach().index_select(0, ids).to(wide).requires_grad_()
        if mode is None:
            out = embedding(places, rows, padding, scale_grad_by_freq=scale_grad_by_freq)
        else:
            out = embedding_bag(
                places,
                rows,
                offsets,
                scale_grad_by_freq=scale_grad_by_freq,
                mode=mode,
                per_sample_weights=scale,
                include_last_offset=include_last_offset,
                padding_idx=padding,
            )
        (gradient,) = torch.autograd.grad(out, rows, grad_output.detach().to(wide))
    found = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    found[places.reshape(-1)[touched]] = True
    return ids[found], gradient[found]


def _store(weight: Tensor, ids: Tensor, rows: Tensor, stochastic_rounding: bool, seed: int | Tensor | None) -> None:
    if stochastic_rounding and weight.dtype == torch.bfloat16:
        columns = torch.arange(weight.shape[1], device=weight.device)
        words = philox_words(seed_on(seed, weight.device), ids.long().unsqueeze(1) * weight.shape[1] + columns)
        rows = round_stochastically(rows, words)
    weight.index_copy_(0, ids.long(), rows.to(weight.dtype))


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """float32 -> bfloat16, up with the probability of the part that is cut off: (bits + (word >> 16)) & 0xFFFF0000.

    Infinity and NaN are rounded as always.
    """
    bits = (x.view(torch.int32).long() + (words >> 16)) & 0xFFFF0000
    rounded = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


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
) -> Tensor:
    """g = gradient + weight_decay * w;  w -= lr * g, for the touched rows. torch.optim.SGD's step on them."""
    ids, g = row_gradients(
        weight,
        indices,
        grad_output,
        offsets=offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
    )
    with torch.no_grad():
        w = weight.index_select(0, ids).to(g.dtype)
        g = g + weight_decay * w if weight_decay else g
        _store(weight, ids, w - lr * g, stochastic_rounding, seed)
    return weight


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
) -> Tensor:
    """g = gradient + weight_decay * w;  s += g^2;  w -= lr * g / (sqrt(s) + eps). torch.optim.Adagrad's step.

    `state_sum` s: Tensor[V, D].
    """
    ids, g = row_gradients(
        weight,
        indices,
        grad_output,
        offsets=offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
    )
    with torch.no_grad():
        w = weight.index_select(0, ids).to(g.dtype)
        g = g + weight_decay * w if weight_decay else g
        s = state_sum.index_select(0, ids).to(g.dtype) + g * g
        state_sum.index_copy_(0, ids.long(), s.to(state_sum.dtype))
        _store(weight, ids, w - lr * g / (s.sqrt() + eps), stochastic_rounding, seed)
    return weight


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
) -> Tensor:
    """g = gradient + weight_decay * w;  s += mean over D of g^2;  w -= lr * g / (sqrt(s) + eps).

    `state_sum` s: Tensor[V], one number a row: the mean square of the summed gradient (FBGEMM's EXACT_ROWWISE_ADAGRAD).
    """
    ids, g = row_gradients(
        weight,
        indices,
        grad_output,
        offsets=offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
    )
    with torch.no_grad():
        w = weight.index_select(0, ids).to(g.dtype)
        g = g + weight_decay * w if weight_decay else g
        s = state_sum.index_select(0, ids).to(g.dtype)
        if g.shape[1]:
            s = s + (g * g).mean(1)
        state_sum.index_copy_(0, ids.long(), s.to(state_sum.dtype))
        _store(weight, ids, w - lr * g / (s.sqrt() + eps).unsqueeze(1), stochastic_rounding, seed)
    return weight


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
) -> Tensor:
    """Lazy Adam: torch.optim.Adam's step number `step` (from 1) on the touched rows, the moments of the others kept.

    g = gradient + weight_decay * w;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
    w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps).
    `exp_avg` m, `exp_avg_sq` v: Tensor[V, D].
    """
    ids, g = row_gradients(
        weight,
        indices,
        grad_output,
        offsets=offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
    )
    with torch.no_grad():
        w = weight.index_select(0, ids).to(g.dtype)
        g = g + weight_decay * w if weight_decay else g
        m = exp_avg.index_select(0, ids).to(g.dtype)
        m = m + (1 - betas[0]) * (g - m)
        v = exp_avg_sq.index_select(0, ids).to(g.dtype) * betas[1] + (1 - betas[1]) * g * g
        exp_avg.index_copy_(0, ids.long(), m.to(exp_avg.dtype))
        exp_avg_sq.index_copy_(0, ids.long(), v.to(exp_avg_sq.dtype))
        denominator = v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
        _store(weight, ids, w - lr / (1 - betas[0] ** step) * m / denominator, stochastic_rounding, seed)
    return weight
