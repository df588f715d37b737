"""The attention room's operators as both GPU floors have them: what torch does around their kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
MOST_SPLITS = 256  #: parts of a cache that is decoded
MOST_KEYS = 2**30  #: of a sequence in a cache, on GPUs: places of keys are int32 there

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def rows_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Dense, with x's order of heads and positions: what was projected as (B, L, H, D) stays so, and is not copied."""
    if len(shape) == 4 and x.stride(1) < x.stride(2):
        batch, heads, length, size = shape
        return x.new_empty((batch, length, heads, size)).transpose(1, 2)
    return x.new_empty(shape)


def results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, lse_low), to be filled."""
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return rows_like(query, (*query.shape[:-1], value.shape[-1])), lse, torch.empty_like(lse)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    output_mask: tuple[bool, ...],
) -> Grads:
    """(dq, dk, dv, dbias, dsinks), to be filled, of size 0 where output_mask says so."""
    found = []
    for x, wanted in zip((query, key, value, bias, sinks), output_mask, strict=True):
        if x is None or not wanted:
            found.append(query.new_empty(0))
        else:
            found.append(rows_like(x, tuple(x.shape)) if len(found) < 3 else x.new_empty(x.shape))
    dq, dk, dv, dbias, dsinks = found
    return dq, dk, dv, dbias, dsinks


def fill_without_keys(grads: Grads, dlse: Tensor) -> None:
    """The gradients where there is no query, or no key: then the sink is all there is, lse = sink."""
    *others, dsinks = grads
    for x in others:
        x.zero_()
    if dsinks.numel():
        dsinks.copy_(dlse.sum(_but_heads(dlse)))


def sink_share(sinks: Tensor | None, lse: Tensor) -> Tensor | float:
    """The weight of the sink in every query's softmax."""
    if sinks is None:
        return 0.0
    sink = sinks.float().unsqueeze(-1) if lse.dim() == 3 else sinks.float()
    return torch.where(sink == -torch.inf, 0.0, torch.exp(sink - lse))


def sum_over_queries(x: Tensor) -> Tensor:
    """(heads) of a tensor laid out as the lse."""
    return x.sum(_but_heads(x))


def _but_heads(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def factors(scale: float, softcap: float) -> tuple[float, float]:
    """Of products on their way to logits in powers of two, and what those are capped at (0: not)."""
    return scale / softcap if softcap else scale * LOG2E, softcap * LOG2E


def kept(dropout_p: float) -> tuple[int, float]:
    """The least random word that keeps a weight, and the factor of one that is kept."""
    return min(round(dropout_p * 2.0**32), 2**32 - 1), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def longest(lq: int, lk: int, *masks: Tensor | None) -> tuple[int, int]:
    """Bounds on the lengths of packed sequences: of all together, or what tensors over queries and keys say."""
    given = [x for x in masks if x is not None]
    return (
        min((x.shape[-2] for x in given if x.dim() == 4 and x.shape[-2] > 1), default=lq),
        min((x.shape[-1] for x in given if x.shape[-1] > 1), default=lk),
    )


def seen_keys(
    mask: Tensor | None, key_padding_mask: Tensor | None, bias: Tensor | None, keys: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Which keys any query sees by one of these masks alone; uint8 (B or 1, H or 1, keys). And `span_of` them.

    Keys that nobody sees may hold NaN, which a weight of 0 does not silence: the kernels read them as 0.
    """
    found = []
    if key_padding_mask is not None:
        found.append(key_padding_mask[:, None])
    if mask is not None:
        found.append(mask.any(-2))
    if bias is not None:
        found.append(~(bias.amax(-2) <= torch.finfo(bias.dtype).min))
    if not found:
        return None, None
    seen = found[0]
    for other in found[1:]:
        seen = seen & other
    seen = seen.expand(*seen.shape[:2], keys).view(torch.uint8)
    return seen, span_of(seen)


def span_of(seen: Tensor) -> Tensor:
    """The first key that is seen and one past the last, int32 (..., 2): what lies outside is not visited."""
    keys = seen.shape[-1]
    upward = torch.arange(1, keys + 1, dtype=torch.int32, device=seen.device)
    last = (seen * upward).amax(-1)
    first = keys - (seen * upward.flip(0)).amax(-1)
    return torch.stack((first, last), -1)


def room_for_keys(key_cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence of a cache can have."""
    block = key_cache.shape[2]
    return block if block_table is None else block * block_table.shape[1]


def chosen_splits(owners: int, limit: int, keys: int, multiprocessors: int) -> int:
    """Two programs for each multiprocessor, and no part below four tiles of keys. By shapes alone: lengths are on the
    device."""
    return max(1, min(2 * multiprocessors // max(owners, 1), limit // (4 * keys), MOST_SPLITS))


class Parts(NamedTuple):
    """What each part of a cache leaves to the kernel that merges them: sums, largest logits, totals."""

    sums: Tensor | None = None
    top: Tensor | None = None
    total: Tensor | None = None


def parts(lse: Tensor, splits: int, size: int) -> Parts:
    """One part alone is written at once."""
    if splits == 1:
        return Parts()
    top, total = (lse.new_empty((lse.numel(), splits)) for _ in range(2))
    return Parts(lse.new_empty((lse.numel(), splits, size)), top, total)
